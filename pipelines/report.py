"""What a night prints: progress while it runs, and a summary at the end, which is also available as flat JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

if TYPE_CHECKING:
    from jobs.ctr.train_result import TrainResult
    from jobs.evaluate import EvaluateResult
    from pipelines.nightly import Night
    from tokenizer import Iteration


class Terminal:
    """Prints progress: on a terminal one line that updates, in a log one line per event without control characters."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._status: Any = None
        self._name = ""
        self._began = time.monotonic()

    @contextmanager
    def step(self, name: str, why: str) -> Iterator[None]:
        self._name = name
        if not self.console.is_terminal:
            self._line(f"{name}: {why}")
            yield
            return
        with self.console.status(Text(f"{name}: {why}")) as status:
            self._status = status
            yield
        self._status = None

    def done(self, name: str, facts: str) -> None:
        self._line(f"{name}: {facts}")

    def iteration(self, step: Iteration) -> None:
        text = f"fit: {step.summary()}"
        if self._status is not None:
            self._status.update(Text(text))
        elif step.iteration % 20 == 0:
            self._line(text)

    def note(self, text: str) -> None:
        if self._status is not None:
            self._status.update(Text(f"{self._name}: {text}"))
        else:
            self._line(f"{self._name}: {text}")

    def _line(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self._began:6.1f} s  {text}")


def page() -> Console:
    """Standard output, as wide as the terminal, or 140 columns for a log.

    Text is printed as it is: in an item id `[red]` is no colour and `:smile:` no picture.
    """
    return Console(
        highlight=False, markup=False, emoji=False, file=sys.stdout, width=None if sys.stdout.isatty() else 140
    )


def facts(night: Night, warehouse: str, pictures: Path, seconds: float) -> dict[str, Any]:
    """The night as flat keys; None where a stage did not run."""
    metrics, release, trained, log = night.evaluated.metrics, night.release, night.trained, night.log
    return {
        "rows_in": night.loaded.rows_in,
        "rows_stored": night.loaded.rows_stored,
        "rows_rejected": night.loaded.rows_rejected,
        "load_note": night.loaded.note,
        "rmse": metrics["rmse"],
        "utilization": metrics["utilization"],
        "perplexity": metrics["perplexity"],
        "distinct": metrics["distinct"],
        "largest_collision": int(metrics["largest_collision"]),
        "neighbour_recall": metrics["neighbour_recall"],
        "churn": metrics.get("churn"),
        "verdict": _verdict(night.evaluated),
        "reasons": list(night.evaluated.reasons),
        "release": release.release_id if release else None,
        "champion_version": release.codebook_version if release else None,
        "codebook_hash": release.codebook_hash if release else (night.fitted.codebook.hash if night.fitted else None),
        "interactions_in": log.rows_in if log else None,
        "interactions_used": log.rows_used if log else None,
        "interactions_dropped": dict(log.dropped) if log else None,
        "items_of_interactions": trained.items if trained else None,
        "items_without_id": trained.without_id if trained else None,
        "share_without_id": trained.share_without_id if trained else None,
        "auc": trained.auc if trained else None,
        "auc_control": trained.auc_control if trained else None,
        "gauc": trained.gauc if trained else None,
        "gauc_users": trained.gauc_users if trained else None,
        "log_loss": trained.log_loss if trained else None,
        "calibration": trained.calibration if trained else None,
        "auc_cold": trained.auc_cold if trained else None,
        "cold_impressions": trained.cold_impressions if trained else None,
        "cold_clicks": trained.cold_clicks if trained else None,
        "ctr_version": trained.version if trained else None,
        "ctr_verdict": _verdict(trained) if trained and trained.version is not None else None,
        "ctr_reasons": list(trained.reasons) if trained else [],
        "nothing_to_do": night.nothing_to_do,
        "seconds": round(seconds, 1),
        "warehouse": warehouse,
        "pictures": str(pictures),
    }


def _verdict(result: EvaluateResult | TrainResult) -> str:
    return "passed" if result.passed else "failed"


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def print_summary(
    night: Night,
    warehouse: str,
    pictures: Path,
    seconds: float,
    spark_seconds: float,
    *,
    expected: str = "",
) -> None:
    """The last thing a night prints, on standard output."""
    console = page()
    grid = Grid(show_header=False, box=None, padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    loaded, evaluated = night.loaded, night.evaluated
    grid.add_row("rows", f"{loaded.rows_in:,} in = {loaded.rows_stored:,} stored + {loaded.rows_rejected:,} rejected")
    if loaded.note:
        grid.add_row("source", loaded.note)
    if loaded.reasons:
        grid.add_row("rejected", ", ".join(f"{reason} {count}" for reason, count in sorted(loaded.reasons.items())))
    m = evaluated.metrics
    grid.add_row("RMSE", f"{m['rmse']:.5f}")
    grid.add_row(
        "components in use",
        f"{m['utilization']:.1%} at the level that uses fewest; perplexity/K {m['perplexity']:.2f}",
    )
    grid.add_row(
        "semantic IDs",
        f"{m['distinct_ids']:,.0f} distinct codes for {m['items']:,.0f} items ({m['distinct']:.1%}); "
        f"largest group {m['largest_collision']:.0f}; suffixes make every ID unique",
    )
    grid.add_row("neighbours kept", f"{m['neighbour_recall']:.1%} of 10 nearest (sample)")
    grid.add_row(
        "least certain",
        ", ".join(f"{i.item_id} is {i.semantic_id} with {i.confidence:.0%}" for i in evaluated.least_certain[:3]),
    )
    if "churn" in m:
        grid.add_row("churn", f"{m['churn']:.2%} of the champion's items changed codes")
    grid.add_row("verdict", "passed" if evaluated.passed else "FAILED: " + "; ".join(evaluated.reasons))
    if night.release:
        grid.add_row(
            "champion",
            f"codebook version {night.release.codebook_version}, hash {night.release.codebook_hash[:12]}, release "
            f"{night.release.release_id}",
        )
    if night.log:
        grid.add_row("interactions", night.log.account())
    if night.trained:
        t = night.trained
        grid.add_row("CTR model", t.summary())
        if t.version is not None:
            grid.add_row(
                "",
                f"GAUC over {t.gauc_users:,} users; log-loss {t.shown('log_loss')}, "
                f"calibration {t.shown('calibration')}",
            )
            grid.add_row(
                "",
                f"AUC of rarely shown items {t.shown('auc_cold')} ({t.cold_impressions:,} impressions, "
                f"{t.cold_clicks:,} clicks)",
            )
            grid.add_row(
                "",
                f"without semantic ID: {t.without_id:,} of {t.items:,} items, {t.share_without_id:.1%} of the "
                "interactions",
            )
            if t.without_negative:
                grid.add_row("", f"{t.without_negative:,} rows have no negative to sample: behaviour, no examples")
            grid.add_row("", t.note)
        if expected:
            grid.add_row("expected", expected)
    grid.add_row("tables", warehouse)
    grid.add_row("pictures", str(pictures))
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in night.seconds.items())
    grid.add_row("time", f"{seconds:.0f} s: Spark start-up {spark_seconds:.0f} s, {parts}")
    console.print()
    console.print(
        "Nothing to do: this night was done before, the tables are as they were."
        if night.nothing_to_do
        else "The night is done."
    )
    console.print(grid)
