"""The result of a training, as it is printed and kept with the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from jobs.ctr.gate import Comparison, CtrLimits, Difference
from jobs.models.versions import CtrVersion

NO_METRICS = ("version", "validation_from", "started_from", "champion", "same_codebook", "seconds", "nothing_to_do")


@dataclass(frozen=True)
class TrainResult:
    """A metric that is None is undefined, or of a control that was not trained. Without a `version` the log had no rows
    and nothing was trained.
    """

    version: int | None = None
    auc: float | None = None
    auc_control: float | None = None
    gauc: float | None = None
    gauc_control: float | None = None
    gauc_users: int = 0  # with clicks and non-clicks in the test split, over which GAUC is the mean
    log_loss: float | None = None
    log_loss_control: float | None = None
    calibration: float | None = None  # mean prediction / click rate
    auc_cold: float | None = None  # of items that the training split shows fewer than 5 times
    cold_impressions: int = 0  # of such items in the test split; with few clicks or non-clicks auc_cold is undefined
    cold_clicks: int = 0
    rows_in: int = 0  # of the log: rows_used + those dropped
    rows_used: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason
    examples: int = 0
    without_negative: int = 0  # rows for which no negative could be sampled: behaviour, but no examples
    items: int = 0  # of the log
    without_id: int = 0  # of these, how many have no semantic ID
    share_without_id: float = 0.0  # of the used rows of the log, those about such items
    note: str = ""
    validation_from: int | None = None  # first moment after the training split, in microseconds; None without a clock
    started_from: int | None = None  # version of the model whose parameters training started from
    champion: int | None = None  # version of the model that the gate compared with
    same_codebook: bool = True  # whether that model was trained on the current codebook and so can go on serving
    differences: Mapping[str, Difference] = field(default_factory=dict)  # to the champion
    champion_calibration: float | None = None  # on the same impressions
    reasons: Sequence[str] = ()  # why the gate refuses the model
    seconds: float = 0.0
    nothing_to_do: bool = False

    @property
    def passed(self) -> bool:
        """Whether the model may replace the champion."""
        return not self.reasons

    @property
    def refusal(self) -> str | None:
        """Why the model is not the champion; None if it is."""
        if self.passed:
            return None
        consequence = (
            f"Version {self.champion} stays"
            if self.same_codebook
            else f"Version {self.champion} is of an earlier codebook, so the current one has no CTR champion"
        )
        return (
            f"CTR model version {self.version} did not pass the gate: {'; '.join(self.reasons)}. {consequence}; change "
            "the data or train.*, or the limits under ctr_gate.* if they are wrong for your log (the next run then "
            "judges this model again, without training)"
        )

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers under the names that they have in MLflow."""
        facts = {**asdict(self), **{f"dropped_{reason}": count for reason, count in self.dropped.items()}}
        return {
            name: value for name, value in facts.items() if isinstance(value, int | float) and name not in NO_METRICS
        }

    @classmethod
    def of(cls, version: CtrVersion) -> TrainResult:
        """What was kept with a model."""
        differences = {name: Difference(**ends) for name, ends in version.result["differences"].items()}
        kept = {**version.result, "differences": differences, "reasons": tuple(version.result["reasons"])}
        return cls(**{**kept, "version": version.number, "nothing_to_do": True})

    def compared(self, champion: CtrVersion | None, codebook_hash: str, comparison: Comparison | None) -> TrainResult:
        """With the comparison with the champion, if there is one."""
        return replace(
            self,
            champion=champion.number if champion else None,
            same_codebook=champion is None or champion.codebook_hash == codebook_hash,
            differences=comparison.differences if comparison else {},
            champion_calibration=defined(comparison.champion_calibration) if comparison else None,
        )

    def judged(self, limits: CtrLimits) -> TrainResult:
        """With the verdict under these limits. A model without a champion to compare with passes."""
        if self.champion is None:
            return replace(self, reasons=())
        calibrations = (math.nan if value is None else value for value in (self.calibration, self.champion_calibration))
        return replace(self, reasons=Comparison(self.differences, *calibrations).reasons(limits))

    def summary(self) -> str:
        if self.version is None:
            return self.note
        text = f"AUC {self.shown('auc')}, GAUC {self.shown('gauc')}"
        if self.auc is None or self.auc_control is None:
            return text
        return f"{text}; {self.shown('auc_control')} without semantic IDs (lift {self.auc - self.auc_control:+.4f})"

    def shown(self, metric: str) -> str:
        value = getattr(self, metric)
        return "undefined" if value is None else f"{value:.4f}"


def defined(value: float) -> float | None:
    """None instead of NaN, which JSON does not have."""
    return None if math.isnan(value) else value
