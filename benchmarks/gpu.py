"""How much of a GPU's matrix products an annealing iteration and encode reach.

sid bench gpu --json gpu.json          sid bench gpu --device cpu --rows 65536 --components 128
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.fit import side_by_side
from jobs.config import ConfigError
from tokenizer import FIT_BLOCK, RQGMM
from tokenizer.annealing import ANNEALING_TRUNCATION
from tokenizer.gmm import DiagonalGMM, GMMStatistics, e_step, spherical_gmm
from tokenizer.kernels import linear, pieces

REPEATS = 5


def gpu(
    rows: int = 1_000_000,
    dim: int = 768,
    levels: int = 2,
    components: Annotated[list[int] | None, typer.Option(help="Again for more; 128, 1024 and 8192 by default.")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Roofline fractions of the annealing iteration and of encode: products of the same shapes are 1."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            "--device is cuda and this machine has no usable GPU; expected one. Try --device cpu --rows 65536"
        )
    where = torch.device(device)
    x = torch.cat([_unit(min(65_536, rows - start), dim, where, start) for start in range(0, rows, 65_536)])
    figures_by_components = []
    for k in components or [128, 1024, 8192]:
        measures = measured(x, levels, k)
        figures_by_components.append(measures)
        typer.echo("  ".join(f"{name} {value:.4g}" for name, value in measures.items()))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"
    figures = {"device": name, "rows": rows, "dim": dim, "levels": levels, "figures": figures_by_components}
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def measured(x: Tensor, levels: int, k: int) -> dict[str, float]:
    variance = float(x.square().mean())
    gmm = spherical_gmm(x[:k].clone(), variance)
    rqgmm = RQGMM(tuple(spherical_gmm(x[n * k : (n + 1) * k] / 2**n, variance) for n in range(levels)))
    slopes = torch.cat([level.means for level in rqgmm.levels])  # (levels K, D)
    resp = torch.rand(FIT_BLOCK, k, device=x.device)
    works: dict[str, Callable[[], object]] = {
        "annealing": lambda: [annealing_step(gmm, block) for block in x.split(FIT_BLOCK)],
        "annealing_products": lambda: [
            (linear(b, gmm.means), linear(resp[: len(b)].T, b.T)) for b in x.split(FIT_BLOCK)
        ],
        "encode": lambda: rqgmm.encode(x),
        "encode_products": lambda: [linear(block, slopes) for block in pieces(x, k)],
    }
    seconds = side_by_side({name: _finished(x.device, work) for name, work in works.items()}, REPEATS)
    return {
        "components": k,
        "annealing_roofline_fraction": seconds["annealing_products"] / seconds["annealing"],
        "encode_roofline_fraction": seconds["encode_products"] / seconds["encode"],
        "annealing_seconds": seconds["annealing"],
        "encode_rows_per_second": len(x) / seconds["encode"],
    }


def annealing_step(gmm: DiagonalGMM, x: Tensor) -> GMMStatistics:
    return e_step(gmm, x, second_moments=False, truncation=ANNEALING_TRUNCATION)


def _unit(rows: int, dim: int, device: torch.device, seed: int) -> Tensor:
    x = torch.randn(rows, dim, device=device, generator=torch.Generator(device).manual_seed(seed))
    return x.div(x.norm(dim=1, keepdim=True))


def _finished(device: torch.device, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, waited for: a GPU goes on after the call returns."""

    def wait() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return wait


if __name__ == "__main__":
    typer.run(gpu)
