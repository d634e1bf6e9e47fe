"""Speed of training against the length of the history: DMQN, the same model with every impression by itself, and
models that attend to the full history.

sid bench train --json train.json --picture train.png

Batches are generated: users have as many impressions as behaviours, in turn, so that the history grows by one behaviour
from impression to impression up to the longest, as in a log; every batch has about the same number of impressions.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.ctr.din import DIN
from benchmarks.ctr.embedding import Inputs, ItemVectors
from benchmarks.ctr.figures import draw
from benchmarks.ctr.hstu import HSTU
from benchmarks.ctr.impressions import ItemTokens
from benchmarks.ctr.linear_attention import LinearAttention
from jobs.ctr.batch import Items, UserBatch
from jobs.ctr.dmqn import DMQN, DMQNShape, Interests

LENGTHS = (50, 200, 1000, 5000)
ITEMS, TOKENS, TOKENS_PER_ITEM = 10_000, 20_000, 9
WIDTH = 32
FEATURES = 4
PAIRS = 2_000_000  # of impression and behaviour that a step of the models that look at each pair may hold
SUMS = "dmqn", "linear-attention"  # models that read running sums, so look at no pair


def catalogue(items: int) -> ItemTokens:
    """Items with random tokens: `TOKENS_PER_ITEM` of `TOKENS` each."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(1, TOKENS, (items, TOKENS_PER_ITEM), generator=g)
    weights = torch.rand(items, TOKENS_PER_ITEM, generator=g)
    rows[0], weights[0] = 0, 0.0
    return ItemTokens(rows, weights, TOKENS, (TOKENS_PER_ITEM,))


def generated(users: int, length: int, impressions: int, *, items: int = ITEMS, seed: int = 0) -> UserBatch:
    """Users with `impressions` each, in order of time: the history of the last is `length` behaviours, that of each one
    before it begins and ends one earlier."""
    g, tokens = torch.Generator().manual_seed(seed), catalogue(items)

    def some(*shape: int) -> Items:
        return tokens.of(torch.randint(1, items, shape, generator=g))

    total = length + impressions - 1
    last = length + torch.arange(impressions).repeat(users)
    return UserBatch(
        behaviours=some(users, total),
        behaviour_time=torch.arange(total).repeat(users, 1),
        length=torch.full((users,), total),
        candidates=some(users * impressions),
        user=torch.arange(users).repeat_interleave(impressions),
        first=last - length,
        last=last,
        time=last,
        features=torch.randn(users * impressions, FEATURES, generator=g),
        label=(torch.rand(users * impressions, generator=g) < 0.3).float(),
        shown=torch.full((users * impressions,), 10),
        user_number=torch.arange(users).repeat_interleave(impressions),
    )


class DirectDMQN(DMQN):
    """DMQN that projects and assigns the whole history anew for each impression, padded to the longest."""

    def forward(self, batch: UserBatch) -> Tensor:
        n, longest = len(batch), int((batch.last - batch.first).max())
        position = batch.first[:, None] + torch.arange(longest)
        used = position < batch.last[:, None]
        x = self.embed(batch.behaviours[batch.user[:, None], position.where(used, 0)])  # (n, S, D)
        quantize = self.quantize
        projected = torch.einsum("qsd,nde->nqse", x, quantize.project)
        assignment = (
            quantize.assign(quantize.similarity(projected.flatten(1, 2))).view(*projected.shape[:3], -1)
            * used[None, :, :, None]
        )  # (N, n, S, W)
        total = assignment.sum(2)  # (N, n, W)
        mean = (assignment.mT @ projected) / total.clamp(min=1e-6)[..., None]
        length = (batch.last - batch.first).clamp(min=1)[:, None]
        youth = (position - batch.first[:, None]) / length  # (n, S), of behaviours: 1 - age
        age = 1 - (assignment * youth[..., None]).sum(2) / total.clamp(min=1e-6)  # of clusters
        interests = Interests(self.interact(mean, age), total * (-quantize.decay * age).exp())
        return self.score(interests, torch.arange(n), batch.candidates, batch.features)


def models() -> dict[str, Callable[[], nn.Module]]:
    shape = DMQNShape(features=FEATURES, width=WIDTH)
    inputs = Inputs(
        users=0, items=ITEMS - 1, tokens=catalogue(ITEMS), item_ids=True, vectors=None, features=FEATURES, width=WIDTH
    )
    return {
        "dmqn": lambda: DMQN(ItemVectors(inputs), shape),
        "direct": lambda: DirectDMQN(ItemVectors(inputs), shape),
        "din": lambda: DIN(inputs),
        "hstu": lambda: HSTU(inputs),
        "linear-attention": lambda: LinearAttention(inputs),
    }


def seconds_per_example(make: Callable[[], nn.Module], batches: list[UserBatch]) -> tuple[float, float]:
    """Of training steps, forward, backward and Adam, the first one left out: seconds an example, seconds a step."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    times = []
    for batch in batches:
        began = time.perf_counter()
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
    step = min(times[1:])
    return step / len(batches[0]), step


def train(
    impressions: Annotated[int, typer.Option(min=1, help="Impressions of a step.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time, of which the fastest counts.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw milliseconds against the length to this file.")] = None,
) -> None:
    """Examples a second of DMQN, of DMQN with each impression by itself, of full-length DIN and HSTU and of linear
    attention, at four history lengths.
    """
    rows: list[dict[str, float | str | int]] = []
    typer.echo(f"{'history':>8} {'model':>16} {'examples/s':>12} {'ms/step':>9} {'examples/step':>14}")
    for length in LENGTHS:
        for name, make in models().items():
            many = impressions if name in SUMS else max(1, min(impressions, PAIRS // (4 * length)))
            each = min(many, max(1, length))
            batches = [generated(max(1, many // each), length, each, seed=seed) for seed in range(1 + steps)]
            example, step = seconds_per_example(make, batches)
            shown = len(batches[0])
            rows.append(
                {
                    "model": name,
                    "history": length,
                    "examples_per_second": 1 / example,
                    "seconds_per_step": step,
                    "examples": shown,
                }
            )
            typer.echo(f"{length:>8} {name:>16} {1 / example:>12,.0f} {1000 * step:>9,.0f} {shown:>14,}")
    rate = {(str(row["model"]), int(row["history"])): float(row["examples_per_second"]) for row in rows}
    ratios = {
        "dmqn_over_direct_at_200": rate["dmqn", 200] / rate["direct", 200],
        "dmqn_at_50_over_5000": rate["dmqn", 50] / rate["dmqn", 5000],
        "dmqn_time_over_din_at_1000": rate["din", 1000] / rate["dmqn", 1000],
    }
    for name, value in ratios.items():
        typer.echo(f"{name}: {value:.2f}")
    if json_file is not None:
        machine = {"threads": torch.get_num_threads(), "cpus": os.cpu_count(), "processor": platform.processor()}
        json_file.write_text(json.dumps({"rows": rows, **ratios, **machine}, indent=1) + "\n")
    if picture is not None:
        draw(picture, 1, lambda axes: paint_lengths(rate, axes), width=7)


def paint_lengths(rate: Mapping[tuple[str, int], float], axes: Any) -> None:
    """Milliseconds for 1,000 impressions against the history, of examples a second by (model, history)."""
    for name in dict.fromkeys(name for name, _ in rate):
        axes.plot(LENGTHS, [1e6 / rate[name, length] for length in LENGTHS], "o-", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="behaviours in the history",
        ylabel="ms of training for 1,000 impressions",
        title="What the length of the history costs",
    )
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.minorticks_off()
    axes.legend()


if __name__ == "__main__":
    typer.run(train)
