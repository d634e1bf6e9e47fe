"""Quality of semantic IDs: RQ-GMM against other quantizers on the same rows, on training items and on held-out ones.

sid bench quantizers --embeddings vectors.parquet --column text_embedding --levels 2 --components 128 --seeds 3
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.opponents import QUANTIZERS, Fitted
from benchmarks.vectors import WrongVectors, read_vectors, split
from tokenizer import level_usage

OPPONENTS = ("rq-kmeans", "rq-kmeans++")  # stand in every table
ALL_QUANTIZERS = ",".join(QUANTIZERS)


@dataclass(frozen=True)
class Row:
    """One quantizer, seed and split. Shares are of the split's rows; `seconds` is the fit's."""

    quantizer: str
    seed: int
    split: str
    rmse: float
    utilization: list[float]
    perplexity: list[float]
    distinct: float
    largest_collision: int
    seconds: float


def measured(name: str, seed: int, part: str, x: Tensor, fitted: Fitted, components: int, seconds: float) -> Row:
    codes = fitted.encode(x)
    usage = level_usage(torch.stack([torch.bincount(column.long(), minlength=components) for column in codes.T]))
    groups = torch.unique(codes, dim=0, return_counts=True)[1]
    return Row(
        quantizer=name,
        seed=seed,
        split=part,
        rmse=float((x - fitted.decode(codes, x)).double().square().mean().sqrt()),
        utilization=[level.utilization for level in usage],
        perplexity=[level.perplexity for level in usage],
        distinct=len(groups) / len(x),
        largest_collision=int(groups.max()),
        seconds=seconds,
    )


def compare(x: Tensor, names: Sequence[str], levels: int, components: int, seeds: Sequence[int]) -> list[Row]:
    rows = []
    for seed in seeds:
        parts = split(x, seed)
        for name in names:
            typer.echo(f"seed {seed}: {name}", err=True)
            began = time.perf_counter()
            fitted = QUANTIZERS[name](parts.train, levels, components, seed)
            seconds = time.perf_counter() - began
            rows += [
                measured(name, seed, part, data, fitted, components, seconds)
                for part, data in (("train", parts.train), ("held-out", parts.held_out))
            ]
    return rows


def mean(rows: Sequence[Row], name: str, part: str) -> Row | None:
    """The mean over seeds."""
    own = [row for row in rows if row.quantizer == name and row.split == part]
    if not own:
        return None
    n = len(own)
    return Row(
        name,
        -1,
        part,
        sum(row.rmse for row in own) / n,
        [sum(level) / n for level in zip(*(row.utilization for row in own), strict=True)],
        [sum(level) / n for level in zip(*(row.perplexity for row in own), strict=True)],
        sum(row.distinct for row in own) / n,
        max(row.largest_collision for row in own),
        sum(row.seconds for row in own) / n,
    )


def table(rows: Sequence[Row], names: Sequence[str]) -> Table:
    grid = Table(box=None, padding=(0, 1))
    ratios_to = [f"{part}\n/ {opponent}" for part in ("train", "held out") for opponent in OPPONENTS]
    headings = [
        "quantizer",
        "RMSE\ntrain",
        "RMSE\nheld out",
        *ratios_to,
        "utilization",
        "perplexity/K",
        "distinct",
        "largest\ngroup",
        "fit s",
    ]
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "quantizer" else "right")
    for name in names:
        train, held = mean(rows, name, "train"), mean(rows, name, "held-out")
        assert train is not None
        assert held is not None
        ratios = [
            "" if theirs is None else f"{own.rmse / theirs.rmse:.4f}"
            for part, own in (("train", train), ("held-out", held))
            for theirs in (mean(rows, opponent, part) for opponent in OPPONENTS)
        ]
        grid.add_row(
            name,
            f"{train.rmse:.5g}",
            f"{held.rmse:.5g}",
            *ratios,
            _levels(train.utilization),
            _levels(train.perplexity),
            f"{train.distinct:.3f}",
            str(train.largest_collision),
            f"{train.seconds:.2f}",
        )
    return grid


def _levels(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def draw(rows: Sequence[Row], names: Sequence[str], title: str, file: Path) -> None:
    """RMSE on training and held-out items, and perplexity / K by level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.5 * len(names) + 2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row, name in enumerate(reversed(names)):
        for part, colour, marker in (("train", "tab:blue", "o"), ("held-out", "tab:orange", "s")):
            values = [measured.rmse for measured in rows if measured.quantizer == name and measured.split == part]
            left.plot(values, [row] * len(values), marker, color=colour, alpha=0.7, label=part if row == 0 else None)
        train = mean(rows, name, "train")
        assert train is not None
        right.plot(train.perplexity, [row] * len(train.perplexity), "-", color="lightgrey", zorder=0)
        for level, value in enumerate(train.perplexity):
            right.plot(value, row, marker=f"${level + 1}$", color="tab:blue", markersize=8)
    left.set_yticks(range(len(names)), list(reversed(names)))
    left.set_xlabel("RMSE per element, one mark per seed")
    left.legend()
    right.set_xlim(0, 1.02)
    right.set_xlabel("perplexity / K on training items; the digit is the level")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def quantizers(
    embeddings: Annotated[
        Path, typer.Option(help="Parquet file or folder with a column of vectors (list or packed binary), or a .npy.")
    ],
    column: Annotated[
        list[str] | None, typer.Option(help="Vector column; again for more modalities, fused with weight 1 each.")
    ] = None,
    levels: int = 2,
    components: int = 128,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each splits and fits anew.")] = 3,
    chosen: Annotated[str, typer.Option("--quantizers", help=f"Any of {', '.join(QUANTIZERS)}.")] = ALL_QUANTIZERS,
    pca: Annotated[int, typer.Option(help="Keep only the first principal components.")] = 0,
    normalize: Annotated[bool, typer.Option(help="Scale rows to unit length.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every row to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the comparison to this file.")] = None,
) -> None:
    """RQ-GMM against RQ-KMeans, RQ-KMeans++, faiss RQ, PRQ-KMeans, RQ-VAE and VQ-VAE on your vectors."""
    names = list(dict.fromkeys(name.strip() for name in chosen.split(",") if name.strip()))
    unknown = [name for name in names if name not in QUANTIZERS]
    if unknown or not names:
        raise WrongVectors(f"--quantizers has {unknown or 'nothing'}; expected some of {', '.join(QUANTIZERS)}")
    if min(levels, seeds) < 1 or components < 2:
        raise WrongVectors(f"levels {levels}, seeds {seeds}, components {components}; expected at least 1, 1 and 2")
    x, left_out = read_vectors(embeddings, column or [], normalize=normalize, pca=pca)
    if len(x) < components / 0.9 + 1:
        raise WrongVectors(f"{len(x)} vectors are too few for {components} components; lower --components")
    title = (
        f"{embeddings.parent.name}/{embeddings.name} {' + '.join(column or [])}: {len(x):,} x {x.shape[1]}, "
        f"{levels} x {components}, {seeds} seeds"
    )
    rows = compare(x, names, levels, components, range(seeds))
    console = Console(width=180, highlight=False)
    console.print(title + (f"; {left_out} rows without a usable vector left out" if left_out else ""))
    console.print("Mean over seeds; a tenth of the items held out; the last five columns on training items.")
    console.print(table(rows, names))
    if "prq-kmeans" in names:
        console.print("prq-kmeans keeps a scalar per level beside the codes; its RMSE is not of codes alone.")
    if json_file is not None:
        json_file.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if picture is not None:
        draw(rows, names, title, picture)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(quantizers)
