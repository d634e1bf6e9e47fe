"""What a new codebook costs a trained model: loss after a cold restart, after a warm start, and with the old codebook.

sid bench ctr-bridge --generated --seeds 3 --picture docs/ctr-bridge.png

A tenth of the items is new: the old codebook is fitted without them, and the old model trained without impressions of
them, on the first four fifths of each user's training impressions. The new codebook is fitted on all items with another
seed. Then every start trains on the same batches of the whole training split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.ctr.generated import generate
from benchmarks.ctr.impressions import Batches, Impressions, Ints, ItemTokens, read_log
from benchmarks.ctr.sources import Catalogue, read_catalogue
from benchmarks.vectors import WrongVectors
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.metrics import auc, log_loss
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.training import predict, train
from jobs.ctr.warm_start import bridge_tokens, take_over
from tokenizer import RQGMM, fit_rqgmm
from tokenizer.alternates import ALTERNATES
from tokenizer.kernels import one_thread, without_denormals

COLD, TABLES, BRIDGE, OLD = "cold restart", "warm, tokens anew", "warm, through the bridge", "old codebook goes on"
NEW_ITEMS = 0.1  # share of the items that the old codebook and model do not know
OLDER = 0.8  # share of each user's training impressions that the old model has seen
CHECKS = (0, 5, 10, 20, 40, 80, 160)  # steps at which the test split is scored
BATCH, EPOCHS, RATE = 512, 8, 3e-3
TOKEN_ROWS = 2**16


@dataclass(frozen=True)
class Point:
    """One start after some steps of training."""

    start: str
    seed: int
    step: int
    log_loss: float  # test
    auc: float  # test
    validation_auc: float


def tokens(catalogue: Catalogue, rqgmm: RQGMM) -> tuple[TokenScheme, ItemTokens]:
    """Soft tokens of every item under a codebook."""
    scheme = TokenScheme("soft", catalogue.levels, catalogue.components, ALTERNATES, TOKEN_ROWS)
    soft = rqgmm.alternates(catalogue.x, rqgmm.encode(catalogue.x), ALTERNATES)
    own, shares = scheme.rows(soft.codes, soft.weights.int())
    rows = torch.zeros(catalogue.log.items + 1, own.shape[1], dtype=torch.int64).index_copy(0, catalogue.row, own)
    weights = torch.zeros(rows.shape).index_copy(0, catalogue.row, shares)
    return scheme, ItemTokens(rows, weights, scheme.table_rows, scheme.fields)


def new_model(log: Impressions, scheme: TokenScheme, seed: int) -> DMQN:
    torch.manual_seed(seed)
    embed = ItemEmbedding(log.items + 1, scheme.table_rows, 32)
    embed.spread(scheme.level_rows)
    return DMQN(embed, DMQNShape(features=0))


def points(
    start: str, seed: int, model: DMQN, own: ItemTokens, log: Impressions, checks: Sequence[int], history: int
) -> Iterator[Point]:
    """Train on the whole training split and score at each of `checks`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    batches = Batches(log, log.of("train"), own, size=BATCH, history=history, seed=seed)
    following = (batch for _ in range(EPOCHS) for batch in batches)
    torch.manual_seed(seed)
    for step in range(max(checks) + 1):
        if step in checks:
            test, validation = (
                predict(model, Batches(log, log.of(split), own, size=BATCH, history=history))
                for split in ("test", "validation")
            )
            loss = log_loss(test.label, test.score)
            yield Point(start, seed, step, loss, auc(test.label, test.score), auc(validation.label, validation.score))
        batch = next(following)
        model.train()
        optimizer.zero_grad()
        (F.binary_cross_entropy_with_logits(model(batch), batch.label) + model.penalty()).backward()
        optimizer.step()


def old_model(catalogue: Catalogue, scheme: TokenScheme, own: ItemTokens, known: Ints, seed: int, history: int) -> DMQN:
    """Trained on older impressions of the items with rows `known`."""
    log = catalogue.log
    rows = log.of("train")
    user = log.user[rows]
    place = np.arange(len(rows)) - np.searchsorted(user, user)
    rows = rows[(place < OLDER * np.bincount(user)[user]) & np.isin(log.item[rows], known)]
    validation = Batches(log, log.of("validation"), own, size=BATCH, history=history)

    def batches(epoch: int) -> Batches:
        return Batches(log, rows, own, size=BATCH, history=history, seed=1000 * seed + epoch)

    model = new_model(log, scheme, seed)
    train(model, batches, validation, epochs=EPOCHS, learning_rate=RATE, seed=seed)
    return model


def measured(catalogue: Catalogue, seed: int, history: int, checks: Sequence[int]) -> list[Point]:
    """All starts under one seed."""
    log = catalogue.log
    old_item = torch.from_numpy(np.random.default_rng(seed).random(len(catalogue.row)) >= NEW_ITEMS)
    levels, components = catalogue.levels, catalogue.components
    (scheme, old_tokens), (_, new_tokens) = (
        tokens(catalogue, fit_rqgmm(x, levels=levels, components=components, seed=number).rqgmm)
        for number, x in ((seed, catalogue.x[old_item]), (seed + 1000, catalogue.x))
    )
    known = catalogue.row[old_item]
    old = old_model(catalogue, scheme, old_tokens, known.numpy(), seed, history)
    cold, tables, bridged, going_on = (new_model(log, scheme, seed + 1) for _ in range(4))
    for model in (tables, bridged, going_on):
        take_over(model, old, tokens=model is going_on)
    bridge_tokens(bridged.embed, old.embed, scheme.fields, [(old_tokens.of(known), new_tokens.of(known))])
    starts = (
        (COLD, cold, new_tokens),
        (TABLES, tables, new_tokens),
        (BRIDGE, bridged, new_tokens),
        (OLD, going_on, old_tokens),
    )
    found: list[Point] = []
    for name, model, own in starts:
        found += points(name, seed, model, own, log, checks, history)
        typer.echo(f"seed {seed}: {name}: log-loss {found[-1].log_loss:.4f} after {found[-1].step} steps", err=True)
    return found


def mean(found: Sequence[Point], start: str, step: int, field: str) -> float:
    """Over seeds."""
    return float(np.mean([getattr(p, field) for p in found if (p.start, p.step) == (start, step)]))


def lost(found: Sequence[Point], start: str, steps: Sequence[int], field: str) -> float:
    """What a start is worse than the old codebook after the same steps, as a share of what the cold restart is; over
    several `steps` the share of the sums.
    """
    ours, cold, old = (sum(mean(found, name, step, field) for step in steps) for name in (start, COLD, OLD))
    return (ours - old) / (cold - old)


def best(found: Sequence[Point], start: str, field: str) -> float:
    """Of each seed at its step of the best validation AUC, the mean over seeds."""
    own = [point for point in found if point.start == start]
    chosen = [
        max((point for point in own if point.seed == seed), key=lambda point: point.validation_auc)
        for seed in sorted({point.seed for point in own})
    ]
    return float(np.mean([getattr(point, field) for point in chosen]))


def table(found: Sequence[Point], checks: Sequence[int]) -> Table:
    grid = Table(box=None, padding=(0, 1))
    for number, heading in enumerate(["start", "", *(f"{step} steps" for step in checks), "best step"]):
        grid.add_column(heading, justify="left" if number < 2 else "right")
    for start in (COLD, TABLES, BRIDGE, OLD):
        for field, label in (("log_loss", "test log-loss"), ("auc", "test AUC")):
            values = [mean(found, start, step, field) for step in checks] + [best(found, start, field)]
            grid.add_row(start if field == "log_loss" else "", label, *(f"{value:.4f}" for value in values))
            if start in (TABLES, BRIDGE):
                shares = [lost(found, start, [step], field) for step in checks] + [lost(found, start, checks, field)]
                grid.add_row("", "lost of cold", *(f"{share:.0%}" for share in shares))
    return grid


def draw(found: Sequence[Point], checks: Sequence[int], title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = {COLD: "tab:gray", TABLES: "tab:orange", BRIDGE: "tab:blue", OLD: "black"}
    for axes, field, name in zip(figure.subplots(1, 2), ("log_loss", "auc"), ("log-loss", "AUC"), strict=True):
        for start, colour in colours.items():
            values = [mean(found, start, step, field) for step in checks]
            style = "--" if start == OLD else "-"
            axes.plot(checks, values, style, marker="o", markersize=3, color=colour, label=start)
        axes.set_xscale("symlog", linthresh=5)
        axes.set(xlabel="steps of training", ylabel=f"test {name}", xticks=checks, xticklabels=map(str, checks))
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def ctr_bridge(
    data: Annotated[
        Path | None, typer.Option(help="Folder with embeddings.parquet and interactions.parquet, as the README says.")
    ] = None,
    generated: Annotated[
        bool, typer.Option("--generated", help="A generated log of long sequences, as `sid bench ctr` has it.")
    ] = False,
    users: Annotated[int, typer.Option(help="Users of the generated log.")] = 3000,
    length: Annotated[int, typer.Option(help="Longest history of the generated log.")] = 200,
    column: Annotated[str, typer.Option(help="Vector column; by default the first that ends with _embedding.")] = "",
    levels: int = 2,
    components: int = 128,
    history: Annotated[int, typer.Option(help="Behaviours that an impression sees, at most.")] = 200,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each fits both codebooks and trains anew.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every point to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves to this file.")] = None,
) -> None:
    """What a new codebook costs a trained CTR model, with a cold restart and through the bridge of tokens."""
    if (data is None) == (not generated):
        raise WrongVectors("which log? Expected one of --data DIR and --generated")
    if min(levels, seeds, history, users) < 1 or components < 2 or length < 20:
        raise WrongVectors("levels, seeds, history and users are at least 1, components 2, length 20")
    if data is not None:
        log = read_log(data)
        catalogue, title = read_catalogue(data, log, column, levels, components), data.name
    else:
        catalogue, title = generate(users, length, levels, components).catalogue, "generated"
    steps = EPOCHS * len(Batches(catalogue.log, catalogue.log.of("train"), _none(catalogue), size=BATCH).groups())
    checks = [step for step in CHECKS if step < steps]
    with one_thread(), without_denormals():
        found = [point for seed in range(seeds) for point in measured(catalogue, seed, history, checks)]
    title = f"{title}: {levels} x {components}, {seeds} seed{'s' * (seeds > 1)}, {steps // EPOCHS} steps an epoch"
    console = Console(width=200, highlight=False)
    console.print(title)
    console.print(table(found, checks))
    console.print(
        '"lost of cold": what a start is worse than the old codebook after the same steps, as a share of what the cold '
        "restart is worse; last column: over all steps. Best step: by validation AUC."
    )
    if json_file is not None:
        json_file.write_text(json.dumps({"points": [asdict(point) for point in found]}, indent=1) + "\n")
    if picture is not None:
        draw(found, checks, title, picture)


def _none(catalogue: Catalogue) -> ItemTokens:
    items = catalogue.log.items + 1
    return ItemTokens(torch.zeros(items, 0, dtype=torch.int64), torch.zeros(items, 0), 1, ())
