"""Pictures of the stages: saved as PNG, and logged to MLflow by the stage that draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tokenizer import Iteration


def draw_convergence(trace: Sequence[Iteration], path: Path) -> None:
    """RMSE and temperature by iteration, one panel per level and one for the steps of all levels together."""
    levels = sorted({step.level for step in trace}, key=lambda level: level or math.inf)
    figure = _figure(4.2 * len(levels), 3.4)
    axes = figure.subplots(1, len(levels), squeeze=False)[0]
    for axis, level in zip(axes, levels, strict=True):
        steps = [step for step in trace if step.level == level]
        iterations = [step.iteration for step in steps]
        errors = [step.rmse for step in steps]
        if level == 0:  # a few steps, of hardly a percent
            axis.plot(iterations, errors, color="tab:blue", marker="o")
            axis.set(title="all levels", xlabel="joint step", ylabel="RMSE of the residual", xticks=iterations)
            continue
        axis.plot(iterations, errors, color="tab:blue", label="RMSE")
        axis.set(title=f"level {level}", xlabel="iteration", ylabel="RMSE of the residual")
        right = axis.twinx()
        temperatures = [step.temperature if step.temperature > 0 else np.nan for step in steps]
        right.plot(iterations, temperatures, color="tab:red", linestyle="--", label="temperature")
        right.set(yscale="log", ylabel="temperature (dashed)")
        hard = [step.iteration for step in steps if step.temperature <= 0]
        if hard:
            axis.axvspan(hard[0], hard[-1], color="0.92", label="hard steps")
        axis.legend(loc="upper right", frameon=False)
    _save(figure, path)


def draw_usage(counts: npt.NDArray[np.int64], path: Path) -> None:
    """Items per component, sorted, one panel per level; `counts` is (L, K)."""
    figure = _figure(4.2 * len(counts), 3.4)
    for level, (axis, used) in enumerate(
        zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True), start=1
    ):
        axis.bar(np.arange(len(used)), np.sort(used)[::-1], width=1.0, color="tab:blue")
        axis.axhline(used.sum() / len(used), color="tab:orange", linewidth=1, label="even use")
        dead = int((used == 0).sum())
        axis.set(
            title=f"level {level}: {len(used) - dead} of {len(used)} components in use",
            xlabel="component, by use",
            ylabel="items",
        )
        axis.legend(frameon=False)
    _save(figure, path)


def draw_likelihood(known: npt.NDArray[np.float32], new: npt.NDArray[np.float32], path: Path) -> None:
    """Log-likelihood per item: items known before against items first seen in this run."""
    figure = _figure(5.2, 3.4)
    axis = figure.subplots()
    both = np.concatenate([known, new])
    edges = np.histogram_bin_edges(both, bins=60)
    for values, label, colour in ((known, "known before", "tab:blue"), (new, "first seen in this run", "tab:orange")):
        if len(values):
            axis.hist(
                values, bins=list(edges), density=True, alpha=0.6, color=colour, label=f"{label} ({len(values):,})"
            )
    axis.set(
        title="how well the codebook explains the items", xlabel="log-likelihood of an item (nats)", ylabel="density"
    )
    axis.legend(frameon=False)
    _save(figure, path)


def draw_ctr(
    curves: Mapping[str, Sequence[float]],
    rarity: Sequence[str],
    aucs: Mapping[str, Sequence[float]],
    path: Path,
    first_epoch: int = 1,
) -> None:
    """Validation AUC from `first_epoch` on, and test AUC by how often an item was shown in training, of each model."""
    figure = _figure(8.6, 3.4)
    left, right = figure.subplots(1, 2)
    colours = dict(zip(curves, ("tab:blue", "tab:gray"), strict=False))
    for name, values in curves.items():
        left.plot(range(first_epoch, first_epoch + len(values)), values, marker="o", color=colours[name], label=name)
    epochs = range(first_epoch, first_epoch + max(map(len, curves.values())))
    left.set(title="validation", xlabel="epoch", ylabel="AUC", xticks=epochs)
    left.legend(frameon=False)
    position, width = np.arange(len(rarity)), 0.8 / len(aucs)
    for number, (name, values) in enumerate(aucs.items()):
        offset = (number - (len(aucs) - 1) / 2) * width
        right.bar(position + offset, values, width, color=colours[name], label=name)
    lowest = min((value for values in aucs.values() for value in values), default=0.5)
    right.set(
        title="test, by rarity of the item",
        xlabel="times shown in training",
        ylabel="AUC",
        xticks=position,
        xticklabels=rarity,
        ylim=(max(0.0, min(0.5, lowest) - 0.02), None),
    )
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
