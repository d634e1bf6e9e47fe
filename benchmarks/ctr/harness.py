"""What semantic IDs are worth to a ranker: models of a click over sources of item tokens, on the same impressions.

sid bench ctr --data DIR --models fnn,din --sources item-id,rq-kmeans,rq-gmm-soft,embedding --seeds 3 --json ctr.json
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.ctr.din import DIN
from benchmarks.ctr.embedding import Inputs, ItemVectors
from benchmarks.ctr.fnn import FNN
from benchmarks.ctr.generated import generate
from benchmarks.ctr.hstu import HSTU
from benchmarks.ctr.impressions import Batches, Impressions, Split, read_log
from benchmarks.ctr.intervals import difference
from benchmarks.ctr.ipnn import IPNN
from benchmarks.ctr.linear_attention import LinearAttention
from benchmarks.ctr.pooling import MeanPooling
from benchmarks.ctr.sim import SIM
from benchmarks.ctr.sources import OTHER_TOKENS, SOURCES, Catalogue, read_catalogue
from benchmarks.vectors import WrongVectors
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.metrics import COLD, Scores, auc, measure
from jobs.ctr.training import Trained, predict, train
from tokenizer.kernels import without_denormals

LEARNING_RATES = "3e-3,1e-3"
WEIGHT_DECAY = 1e-5
BATCH = 512
EPOCHS = 20  # passes over the training split, at most
CHECKS = 2  # of the validation split in an epoch
PATIENCE = 8  # checks without a better AUC after which training ends: tastes alone are learned late, see docs/ctr.md

MODELS = ("dmqn", "fnn", "ipnn", "mean-pooling", "din", "sim-code", "sim-category", "hstu", "linear-attention")
CATEGORIES = ("category", "categories", "genres")  # columns of items.parquet, the first that is there
WITHOUT_BEHAVIOURS = ("fnn", "ipnn")
Make = Callable[[Inputs], nn.Module]
TestScores = dict[tuple[str, str, bool], list[Scores]]  # by model, source, with embedding; of each seed


@dataclass(frozen=True)
class Budget:
    """What every model may spend: training with each of the learning rates, for at most so many epochs."""

    rates: Sequence[float]
    epochs: int


@dataclass(frozen=True)
class Row:
    """One trained model on the test split. NaN is undefined."""

    model: str
    source: str
    with_embedding: bool
    seed: int
    auc: float
    gauc: float
    log_loss: float
    auc_cold: float
    parameters: int
    seconds_per_step: float


def makers(catalogue: Catalogue, category: Tensor | None) -> dict[str, Make]:
    """Every model by name. `category` of the items, where the data has one."""
    models: dict[str, Make] = {
        "dmqn": lambda inputs: DMQN(ItemVectors(inputs), DMQNShape(features=inputs.features, width=inputs.width)),
        "fnn": FNN,
        "ipnn": IPNN,
        "mean-pooling": MeanPooling,
        "din": DIN,
        "sim-code": lambda inputs: SIM(inputs, catalogue.level_one(seed=0)),
        "hstu": HSTU,
        "linear-attention": LinearAttention,
    }
    if category is not None:
        models["sim-category"] = lambda inputs: SIM(inputs, category)
    return models


def scored(model: nn.Module, batches: Batches) -> Scores:
    """The impressions of `batches` under a model, in the order of the log whatever the order of the batches."""
    scores = predict(model, batches)
    order = np.concatenate(batches.groups()).argsort()
    return Scores(scores.label[order], scores.score[order], scores.user[order], scores.shown[order])


def trained(
    make: Make,
    name: str,
    inputs: Inputs,
    log: Impressions,
    rate: float,
    seed: int,
    history: int,
    epochs: int = EPOCHS,
) -> Trained:
    """The model at its best check of the validation split. The trainer of the job, whose epoch is a part of ours."""
    torch.manual_seed(seed)
    model = make(inputs)
    own, validation = (batches_of(name, inputs, log, split, history, seed) for split in ("train", "validation"))
    passes = [own.groups() for _ in range(epochs)]
    parts = [groups[part::CHECKS] for groups in passes for part in range(min(CHECKS, len(groups)))]
    with without_denormals():
        return train(
            model,
            lambda part: map(own.batch, parts[part]),
            validation,
            epochs=len(parts),
            learning_rate=rate,
            weight_decay=WEIGHT_DECAY,
            patience=PATIENCE,
            seed=seed,
        )


def batches_of(name: str, inputs: Inputs, log: Impressions, split: Split, history: int, seed: int) -> Batches:
    behaviours = name not in WITHOUT_BEHAVIOURS
    shuffled = seed if split == "train" else None
    return Batches(log, log.of(split), inputs.tokens, size=BATCH, behaviours=behaviours, history=history, seed=shuffled)


def measured(
    name: str,
    make: Make,
    source: str,
    with_embedding: bool,
    seed: int,
    inputs: Inputs,
    log: Impressions,
    history: int,
    budget: Budget,
) -> tuple[Row, Scores]:
    """A model trained with each learning rate; the one with the better validation AUC on the test split."""
    runs = [trained(make, name, inputs, log, rate, seed, history, budget.epochs) for rate in budget.rates]
    best = max(runs, key=lambda run: max(run.validation_auc))
    test = scored(best.model, batches_of(name, inputs, log, "test", history, seed))
    metrics = measure(test)
    return Row(
        model=name,
        source=source,
        with_embedding=with_embedding,
        seed=seed,
        auc=metrics.auc,
        gauc=metrics.gauc,
        log_loss=metrics.log_loss,
        auc_cold=metrics.auc_cold,
        parameters=sum(parameter.numel() for parameter in best.model.parameters()),
        seconds_per_step=BATCH / best.examples_per_second,
    ), test


# ---- the command ----


def compared(
    catalogue: Catalogue,
    models: dict[str, Make],
    sources: Sequence[str],
    embeddings: Sequence[bool],
    seeds: Sequence[int],
    history: int,
    budget: Budget,
) -> tuple[list[Row], TestScores]:
    """Every model with every source, seed by seed: the rows, and the scores of the test split."""
    rows: list[Row] = []
    scores: TestScores = {}
    for seed in seeds:
        for source in sources:
            tokens = catalogue.tokens(source, seed)
            for with_embedding in embeddings:
                if with_embedding and source in ("item-id", "embedding"):
                    continue  # that is the source "embedding"
                inputs = catalogue.inputs(source, tokens, with_embedding=with_embedding)
                for name, make in models.items():
                    row, test = measured(
                        name, make, source, with_embedding, seed, inputs, catalogue.log, history, budget
                    )
                    rows.append(row)
                    scores.setdefault((name, source, with_embedding), []).append(test)
                    typer.echo(
                        f"seed {seed}: {name}, {source}{' w/ Emb' if with_embedding else ''}: AUC {row.auc:.4f}",
                        err=True,
                    )
    return rows, scores


def table(rows: Sequence[Row], scores: TestScores, reference: str) -> Table:
    """Means over seeds; differences are from the same model with the source `reference`, both with the embedding as a
    further input or both without.
    """
    grid = Table(box=None, padding=(0, 1))
    less = f"less {reference}, 95 %"
    headings = ["model", "source", "AUC", less, "cold", less, "GAUC", "log-loss", "parameters", "s/step"]
    for number, heading in enumerate(headings):
        grid.add_column(heading, justify="left" if number < 2 else "right")
    last = ""
    for key in sorted(scores, key=lambda key: [name for name, _, _ in scores].index(key[0])):
        name, source, with_embedding = key
        own = [row for row in rows if (row.model, row.source, row.with_embedding) == key]
        mean = {
            field: float(np.mean([getattr(row, field) for row in own]))
            for field in ("auc", "auc_cold", "gauc", "log_loss", "parameters", "seconds_per_step")
        }
        base = scores.get((name, reference, with_embedding))
        gains = ["", ""]
        if base is not None and source != reference:
            gains = [_interval(*difference(scores[key], base, cold=cold)) for cold in (False, True)]
        if last and last != name:
            grid.add_section()
        grid.add_row(
            name if name != last else "",
            source + (" w/ Emb" if with_embedding else ""),
            f"{mean['auc']:.4f}",
            gains[0],
            f"{mean['auc_cold']:.4f}",
            gains[1],
            f"{mean['gauc']:.4f}",
            f"{mean['log_loss']:.4f}",
            f"{mean['parameters']:,.0f}",
            f"{mean['seconds_per_step']:.4f}",
        )
        last = name
    return grid


def models_table(scores: TestScores, reference: str) -> Table:
    """Differences of the models from the model `reference` with the same source."""
    grid = Table(box=None, padding=(0, 1))
    for number, heading in enumerate(("source", "model", f"AUC less {reference}, 95 %", "cold, the same")):
        grid.add_column(heading, justify="left" if number < 2 else "right")
    for name, source, with_embedding in scores:
        base = scores.get((reference, source, with_embedding))
        if base is not None and name != reference:
            own = scores[name, source, with_embedding]
            gains = [_interval(*difference(own, base, cold=cold)) for cold in (False, True)]
            grid.add_row(source + (" w/ Emb" if with_embedding else ""), name, *gains)
    return grid


def _interval(mean: float, low: float, high: float) -> str:
    return "undefined" if math.isnan(mean) else f"{mean:+.4f} ({low:+.4f} {high:+.4f})"


def category_of(folder: Path, log: Impressions) -> Tensor | None:
    """(items + 1,): the category of `items.parquet` (the first of CATEGORIES), -1 where there is none."""
    file = folder / "items.parquet"
    names = pq.read_schema(file).names if file.exists() else []
    column = next((name for name in CATEGORIES if name in names), None)
    if column is None:
        return None
    items = pd.read_parquet(file, columns=["item_id", column])
    row = log.item_ids.get_indexer(items["item_id"]) + 1
    number, _ = pd.factorize(items[column].astype("string"))
    found = torch.full((log.items + 1,), -1)
    found[torch.from_numpy(row[row > 0])] = torch.from_numpy(number[row > 0])
    return found


def ctr(
    data: Annotated[
        Path | None, typer.Option(help="Folder with embeddings.parquet and interactions.parquet, as the README says.")
    ] = None,
    generated: Annotated[
        bool,
        typer.Option("--generated", help="A generated log of long sequences, whose best possible AUC is printed."),
    ] = False,
    users: Annotated[int, typer.Option(help="Users of the generated log.")] = 2000,
    length: Annotated[int, typer.Option(help="Longest history of the generated log.")] = 500,
    chosen_models: Annotated[
        str, typer.Option("--models", help=f"Some of {', '.join(MODELS)}; all that the data allows by default.")
    ] = "",
    chosen_sources: Annotated[
        str, typer.Option("--sources", help=f"Any of {', '.join(SOURCES + OTHER_TOKENS)}.")
    ] = ",".join(SOURCES),
    with_embedding: Annotated[
        bool,
        typer.Option("--with-embedding", help="Each source also with the embedding as a further input (w/ Emb)."),
    ] = False,
    reference: Annotated[str, typer.Option(help="The source that the others are compared with.")] = "rq-kmeans",
    reference_model: Annotated[
        str, typer.Option(help="A model that the others are compared with, on the same source; by default none.")
    ] = "",
    column: Annotated[str, typer.Option(help="Vector column; by default the first that ends with _embedding.")] = "",
    levels: int = 2,
    components: int = 128,
    history: Annotated[int, typer.Option(help="Behaviours that an impression sees, at most.")] = 10_000,
    rates: Annotated[
        str, typer.Option(help="Learning rates; each row trains with all, the best one on the validation split counts.")
    ] = LEARNING_RATES,
    epochs: Annotated[int, typer.Option(help="Passes over the training split, at most.")] = EPOCHS,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each fits the quantizer and trains anew.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every row to this file.")] = None,
) -> None:
    """What semantic IDs are worth to a ranker: models of a click over sources of item tokens."""
    if (data is None) == (not generated):
        raise WrongVectors("which log? Expected one of --data DIR and --generated")
    if min(levels, seeds, epochs, history, users) < 1 or components < 2 or length < 20:
        raise WrongVectors("levels, seeds, epochs, history and users are at least 1, components 2, length 20")
    console = Console(width=200, highlight=False)
    if data is not None:
        log = read_log(data)
        catalogue = read_catalogue(data, log, column, levels, components)
        category, title = category_of(data, log), data.name
    else:
        made = generate(users, length, levels, components)
        catalogue, category, log = made.catalogue, made.category, made.catalogue.log
        test = log.of("test")
        best = auc(log.label[test].astype(np.float32), made.probability[test])
        title = f"generated, histories to {length:,}, best possible AUC {best:.4f}"
    models = makers(catalogue, category)
    names = _some("--models", chosen_models or ",".join(models), list(models))
    sources = _some("--sources", chosen_sources, SOURCES + OTHER_TOKENS)
    if reference_model:
        _some("--reference-model", reference_model, names)
    chosen = {name: models[name] for name in names}
    embeddings = (False, True) if with_embedding else (False,)
    rows, scores = compared(
        catalogue, chosen, sources, embeddings, range(seeds), history, Budget(_rates(rates), epochs)
    )
    test = log.of("test")
    cold = float((log.shown[test] < COLD).mean())
    console.print(
        f"{title}: {log.users:,} users, {log.items:,} items ({len(catalogue.row):,} with an embedding), "
        f"{len(log.user):,} impressions, {log.label.mean():.3f} of them clicks; {levels} x {components}, {seeds} seeds"
    )
    console.print(
        f"Test split: the last tenth, {len(test):,} impressions, {cold:.0%} of them of items shown under {COLD} times "
        "in training (cold)."
    )
    console.print(table(rows, scores, reference))
    if reference_model:
        console.print(models_table(scores, reference_model))
    console.print(
        "Intervals: bootstrap over users and seeds, paired. Learning rate and epoch of each row are chosen on the "
        "validation split."
    )
    if json_file is not None:
        values = [
            {
                name: None if isinstance(value, float) and math.isnan(value) else value
                for name, value in asdict(row).items()
            }
            for row in rows
        ]
        json_file.write_text(json.dumps({"rows": values}, indent=1) + "\n")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(rate) for rate in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise WrongVectors(
            f"--rates is {text!r}; expected numbers above 0 and below 1 with commas between, as 3e-3,1e-3"
        )
    return rates


def _some(flag: str, text: str, known: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise WrongVectors(f"{flag} has {unknown or 'nothing'}; expected some of {', '.join(known)}")
    return names
