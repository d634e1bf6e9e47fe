"""Pictures of what DMQN keeps and loses.

sid bench ctr-figures --data DIR --out docs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ctr.din import DIN, history
from benchmarks.ctr.embedding import Inputs, ItemVectors
from benchmarks.ctr.generated import Generated, expected_auc, generate
from benchmarks.ctr.harness import CATEGORIES, batches_of, scored, trained
from benchmarks.ctr.impressions import Impressions, read_log
from benchmarks.ctr.sim import SIM
from benchmarks.ctr.sources import Catalogue, read_catalogue
from jobs.ctr.batch import UserBatch
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.metrics import auc
from jobs.ctr.training import auc_of, predict, train
from tokenizer.kernels import without_denormals

SOURCE = "rq-gmm-soft"
RATE = 3e-3
LEVELS, COMPONENTS = 2, 128
USERS, LENGTH = 1000, 200  # of the generated log
EPOCHS = 6  # of the noise picture
CODEBOOKS, CODEWORDS = (1, 2, 4, 8), (12, 25, 50, 100)
MOST_CLUSTERS = 100  # N x W of the picture of these, as in the paper
EXPLAINED = 400  # impressions whose attention is looked at
LATE = (0, 1, 3, 10, 30, 100, 300)  # behaviours by which a cache is behind
GENRES = 8  # in colour
POINTS = 1500  # items drawn
HISTORY = 10_000

Floats = npt.NDArray[np.float64]


def dmqn(**shape: Any) -> Callable[[Inputs], DMQN]:
    return lambda inputs: DMQN(ItemVectors(inputs), DMQNShape(features=0, width=inputs.width, **shape))


def inputs_of(catalogue: Catalogue, seed: int) -> Inputs:
    return catalogue.inputs(SOURCE, catalogue.tokens(SOURCE, seed), with_embedding=False)


def fitted(make: Callable[[Inputs], torch.nn.Module], inputs: Inputs, log: Impressions, seed: int) -> Any:
    """A trained model, as the harness trains it at one learning rate."""
    return trained(make, "dmqn", inputs, log, RATE, seed, HISTORY).model


# ---- generated log ----


def noise_curves(made: Generated, seeds: int) -> dict[bool, tuple[Floats, Floats]]:
    """With and without Gumbel noise: AUC of training impressions (as many as are held out) and of held-out ones, by
    epoch and averaged over seeds."""
    log, found = made.catalogue.log, {}
    for noise in (True, False):
        curves: list[list[tuple[float, float]]] = []
        for seed in range(seeds):
            inputs = inputs_of(made.catalogue, seed)
            torch.manual_seed(seed)
            model = dmqn(noise=noise)(inputs)
            own, validation = (
                batches_of("dmqn", inputs, log, split, HISTORY, seed) for split in ("train", "validation")
            )
            sample = [own.batch(rows) for rows in own.groups()[:: max(1, len(log.of("train")) // len(log.of("test")))]]
            curve: list[tuple[float, float]] = []

            def progress(at: Any, model: DMQN = model, sample: list[UserBatch] = sample, curve: Any = curve) -> None:
                if at.validation_auc is not None:
                    curve.append((auc_of(predict(model, sample)), at.validation_auc))

            with without_denormals():
                train(
                    model,
                    lambda _, own=own: iter(own),  # type: ignore[misc]
                    validation,
                    epochs=EPOCHS,
                    patience=EPOCHS,
                    learning_rate=RATE,
                    seed=seed,
                    progress=progress,
                )
            curves.append(curve)
        mean = np.mean(curves, axis=0)  # (epochs, 2)
        found[noise] = mean[:, 0], mean[:, 1]
    return found


def cluster_aucs(made: Generated, seeds: int) -> dict[int, dict[int, float]]:
    """By N and W: held-out AUC, of the planted probabilities, averaged over seeds."""
    log = made.catalogue.log
    inputs = [inputs_of(made.catalogue, seed) for seed in range(seeds)]

    def one(n: int, w: int, seed: int) -> float:
        model = fitted(dmqn(interest_codebooks=n, codewords=w), inputs[seed], log, seed)
        test = scored(model, batches_of("dmqn", inputs[seed], log, "test", HISTORY, seed))
        return expected_auc(made.probability[log.of("test")], test.score)

    return {
        n: {w: float(np.mean([one(n, w, seed) for seed in range(seeds)])) for w in CODEWORDS if n * w <= MOST_CLUSTERS}
        for n in CODEBOOKS
    }


def kept(made: Generated, share: Floats) -> dict[str, dict[str, Floats]]:
    """By relevance and model: of the behaviours that are of the candidate's category or style, the part that is among
    the `share` (.,) of its history which weighs most with the model. What a model does not retrieve, it never finds.
    """
    log, inputs = made.catalogue.log, inputs_of(made.catalogue, 0)
    models = {
        "DIN, every behaviour": fitted(DIN, inputs, log, 0),
        "DMQN, clusters": fitted(dmqn(), inputs, log, 0),
        "SIM, retrieved by level-1 code": fitted(
            lambda inputs: SIM(inputs, made.catalogue.level_one(seed=0)), inputs, log, 0
        ),
    }
    test = batches_of("dmqn", inputs, log, "test", HISTORY, 0)
    rows = np.random.default_rng(0).choice(log.of("test"), min(EXPLAINED, len(log.of("test"))), replace=False)
    found: dict[str, dict[str, list[Floats]]] = {"same category": {}, "same style": {}}
    for row in rows:
        batch = test.batch(np.array([row]))
        items, candidate = batch.behaviours.item[0], batch.candidates.item
        for relevance, kind in (("category", made.category), ("style", made.style)):
            relevant = (kind[items] == kind[candidate]).numpy()
            for name, model in models.items():
                if relevant.any():
                    weight = behaviour_weights(model, batch).numpy()
                    found[f"same {relevance}"].setdefault(name, []).append(_found(weight, relevant, share))
    return {
        relevance: {name: np.mean(curves, axis=0) for name, curves in own.items()} for relevance, own in found.items()
    }


def _found(weight: Floats, relevant: npt.NDArray[np.bool_], share: Floats) -> Floats:
    order = np.argsort(-weight, kind="stable")
    hits = np.concatenate([[0], np.cumsum(relevant[order] & (weight[order] > 0))]) / relevant.sum()
    return np.asarray(np.interp(share * len(weight), np.arange(len(hits)), hits))


@torch.no_grad()
def behaviour_weights(model: Any, batch: UserBatch) -> Tensor:
    """(S,): what each behaviour weighs in the attention of the only impression of a batch; they sum to 1."""
    if isinstance(model, DMQN):
        interests, _ = model.interests(batch)
        query = model.embed(batch.candidates) @ model.quantize.project
        score, _ = model.attend.scores(query[:, None], interests.clusters, interests.count)
        attention = score[:, 0].softmax(dim=-1)  # (N, 1, W)
        assignment = model.quantize.assign(
            model.quantize.similarity(model.embed(batch.behaviours)[0] @ model.quantize.project)
        )  # (N, S, W)
        weight: Tensor = (attention * assignment / assignment.sum(1, keepdim=True).clamp(min=1e-6)).sum(-1).mean(0)
        return weight
    mask = history(batch)
    if isinstance(model, SIM):
        latest = model.latest(batch)
        mask = torch.zeros_like(mask).index_fill(1, latest[latest > 0] - 1, True)
    own = model.item(batch.behaviours)[batch.user]
    weights: Tensor = model.attention.weights(model.item(batch.candidates), own, mask)
    return weights[0]


# ---- a real log ----


def stale_aucs(model: DMQN, inputs: Inputs, log: Impressions) -> dict[str, list[float]]:
    """By thirds of users by their behaviours: AUC of validation and test where histories end LATE behaviours early."""
    rows = [log.of("validation"), log.of("test")]
    known = log.known[np.concatenate(rows)]
    bounds = np.quantile(known, [1 / 3, 2 / 3])
    third = np.searchsorted(bounds, known, side="right")
    found: dict[str, list[float]] = {}
    for late in LATE:
        stale = replace(log, known=np.maximum(log.known - late, 0))
        parts = [
            scored(model, batches_of("dmqn", inputs, stale, split, HISTORY, 0)) for split in ("validation", "test")
        ]
        label, score = (np.concatenate([getattr(part, name) for part in parts]) for name in ("label", "score"))
        for number in range(3):
            own = third == number
            name = f"{known[own].min():,} to {known[own].max():,} behaviours"
            found.setdefault(name, []).append(auc(label[own], score[own]))
    return found


def placed(model: DMQN, log: Impressions, inputs: Inputs, genre: pd.Series) -> tuple[Floats, Floats, list[str]]:
    """Items and the codewords of the first interest codebook in the plane, and the genre of each item.

    t-SNE of their directions, as the assignment is by cosine.
    """
    from sklearn.manifold import TSNE

    named = log.item_ids.isin(genre.index[genre.isin(genre.value_counts().index[:GENRES])])
    rows = np.flatnonzero(named) + 1
    rows = np.sort(np.random.default_rng(0).choice(rows, min(POINTS, len(rows)), replace=False))
    with torch.no_grad():
        vectors = model.embed(inputs.tokens.of(torch.from_numpy(rows))) @ model.quantize.project[0]
        points = F.normalize(torch.cat([vectors, model.quantize.codewords[0]]), dim=1).numpy()
    plane = TSNE(init="pca", perplexity=30, random_state=0).fit_transform(points)
    return plane[: len(rows)], plane[len(rows) :], genre[log.item_ids[rows - 1]].tolist()


def genres_of(folder: Path) -> pd.Series | None:
    """The first genre of each item, by item_id; None where the data has none."""
    file = folder / "items.parquet"
    names = pq.read_schema(file).names if file.exists() else []
    column = next((name for name in CATEGORIES if name in names), None)
    if column is None:
        return None
    items = pd.read_parquet(file, columns=["item_id", column]).set_index("item_id")[column]
    return items.astype("string").str.split("|").str[0].dropna()


def _at(found: dict[str, dict[str, Floats]]) -> dict[str, list[float]]:
    return {
        f"{relevance}, {name}": [float(curve[place]) for place in (10, 25, 50)]
        for relevance, curves in found.items()
        for name, curve in curves.items()
    }


# ---- drawing ----


def draw(file: Path, panels: int, paint: Callable[[Any], None], *, width: float = 6.0) -> None:
    """Let `paint` draw on the axes of a new picture, as many as there are panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
    paint(axes if panels > 1 else axes[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    typer.echo(f"picture: {file}", err=True)


def paint_noise(curves: dict[bool, tuple[Floats, Floats]], axes: Any) -> None:
    for noise, colour in ((True, "tab:blue"), (False, "tab:orange")):
        name = "with Gumbel noise" if noise else "without"
        for curve, line, part in zip(curves[noise], ("--", "-"), ("training", "held out"), strict=True):
            axes.plot(range(1, len(curve) + 1), curve, line, color=colour, label=f"{part}, {name}")
    axes.set(xlabel="epoch", ylabel="AUC", title="Gumbel noise in training")
    axes.legend()


def paint_clusters(aucs: dict[int, dict[int, float]], axes: Any) -> None:
    for n, values in aucs.items():
        axes.plot(list(values), list(values.values()), "o-", label=f"N = {n}")
    axes.set(xlabel="W, codewords of each interest codebook", ylabel="held-out AUC", title="N interest codebooks of W")
    axes.set_xscale("log")
    axes.set_xticks(CODEWORDS, [str(w) for w in CODEWORDS])
    axes.minorticks_off()
    axes.legend()


def paint_kept(found: dict[str, dict[str, Floats]], share: Floats, panels: Sequence[Any]) -> None:
    for axes, (relevance, curves) in zip(panels, found.items(), strict=True):
        for name, curve in curves.items():
            axes.plot(share, curve, label=name)
        axes.plot(share, share, ":", color="grey", label="chance")
        axes.set(xlabel="share of the history, what weighs most first", ylabel="share found", title=relevance)
    panels[0].legend()


def paint_codewords(items: Floats, codewords: Floats, genre: Sequence[str], axes: Any) -> None:
    for number, name in enumerate(sorted(set(genre))):
        own = items[np.array(genre) == name]
        axes.scatter(*own.T, s=6, color=f"C{number}", label=name)
    axes.scatter(*codewords.T, s=90, marker="*", color="black", label="codewords")
    axes.set(title="Items and codewords of one interest codebook (t-SNE)", xticks=[], yticks=[])
    axes.figure.legend(loc="outside right center", fontsize=7, markerscale=1.5)  # points are everywhere in the axes


def paint_stale(aucs: dict[str, list[float]], axes: Any) -> None:
    for name, values in aucs.items():
        axes.plot(range(len(LATE)), values, "o-", label=name)
    axes.set_xticks(range(len(LATE)), [str(late) for late in LATE])
    axes.set(
        xlabel="latest behaviours that the cache lacks", ylabel="held-out AUC", title="Stale interests, by activity"
    )
    axes.legend()


def ctr_figures(
    data: Annotated[
        Path, typer.Option(help="Folder with embeddings.parquet, interactions.parquet and items.parquet with genres.")
    ],
    out: Annotated[Path, typer.Option(help="Folder that the pictures are drawn to.")],
    column: Annotated[str, typer.Option(help="Vector column; by default the first that ends with _embedding.")] = "",
    users: Annotated[int, typer.Option(min=10, help="Users of the generated log.")] = USERS,
    length: Annotated[int, typer.Option(min=20, help="Longest history of the generated log.")] = LENGTH,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds that AUCs of the generated log are averaged over.")] = 2,
) -> None:
    """Draw what DMQN keeps and loses: Gumbel noise, N and W, and relevant behaviours on a generated log; codewords by
    genre and staleness of cached interests on the log of --data.
    """
    made = generate(users, length, LEVELS, COMPONENTS)
    share = np.linspace(0, 1, 101)
    found = kept(made, share)
    draw(out / "ctr-kept.png", len(found), lambda panels: paint_kept(found, share, panels), width=5)
    curves = noise_curves(made, seeds)
    draw(out / "ctr-noise.png", 1, lambda axes: paint_noise(curves, axes))

    log = read_log(data)
    inputs = inputs_of(read_catalogue(data, log, column, LEVELS, COMPONENTS), 0)
    model = fitted(dmqn(), inputs, log, 0)
    stale = stale_aucs(model, inputs, log)
    draw(out / "ctr-stale.png", 1, lambda axes: paint_stale(stale, axes))
    genre = genres_of(data)
    if genre is None:
        typer.echo(f"{data} has no genres; the picture of codewords is left out", err=True)
    else:
        plane = placed(model, log, inputs, genre)
        draw(out / "ctr-codewords.png", 1, lambda axes: paint_codewords(*plane, axes), width=7)

    aucs = cluster_aucs(made, seeds)
    draw(out / "ctr-clusters.png", 1, lambda axes: paint_clusters(aucs, axes))
    figures: tuple[tuple[str, dict[str, Any]], ...] = (
        ("share found among the tenth, the quarter, the half that weighs most", _at(found)),
        ("AUC by epoch of training impressions and of held-out ones", {f"noise {on}": c for on, c in curves.items()}),
        (f"held-out AUC without the latest {LATE} behaviours", stale),
        ("held-out AUC by N and W", {f"N = {n}, W = {list(row)}": list(row.values()) for n, row in aucs.items()}),
    )
    for title, lines in figures:
        typer.echo(title)
        for name, values in lines.items():
            typer.echo(f"  {name}: {' '.join(f'{value:.4f}' for value in np.ravel(values))}")
