"""The promotion gate: a pure function from a report, limits and the champion's figures to a verdict with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """Limits of the gate; the fields say which metric and which side."""

    min_utilization: float
    min_perplexity: float
    min_distinct: float
    max_collision_share: float
    max_rmse_ratio: float
    max_churn: float


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reasons: tuple[str, ...]


def check_gate(
    report: Mapping[str, float], thresholds: Thresholds, baseline: Mapping[str, float] | None = None
) -> Verdict:
    """Judge a report; against `baseline` (the champion on the same items) where there is one.

    Monotone: a report that is better in one metric and equal in the others never fails where the worse one passed.
    """
    limits = [
        ("utilization", report["utilization"], ">=", thresholds.min_utilization),
        ("perplexity", report["perplexity"], ">=", thresholds.min_perplexity),
        ("distinct", report["distinct"], ">=", thresholds.min_distinct),
        ("largest_collision_share", report["largest_collision_share"], "<=", thresholds.max_collision_share),
    ]
    if "churn" in report:
        limits.append(("churn", report["churn"], "<=", thresholds.max_churn))
    if baseline is not None:
        limits.append(("rmse", report["rmse"], "<=", thresholds.max_rmse_ratio * baseline["rmse"]))
    reasons = tuple(
        f"{name} is {value:.4g}, the limit is {side} {limit:.4g}"
        for name, value, side, limit in limits
        if not (value >= limit if side == ">=" else value <= limit)
    )
    return Verdict(not reasons, reasons)
