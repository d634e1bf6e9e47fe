"""Speed of encode, as ratios to faiss's residual quantizer and to the matrix products that it cannot do without.

sid bench encode --json encode.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import torch
import typer

from benchmarks.fit import clustered, side_by_side
from benchmarks.opponents import faiss_kernels
from tokenizer import RQGMM, DiagonalGMM, fit_rqgmm
from tokenizer.kernels import linear, pieces

REPEATS = 24


def encode(
    rows: int = 65_536,
    dim: int = 384,
    levels: int = 2,
    components: int = 128,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Rows per second of encode and assign against faiss ResidualQuantizer (beam 1) and the GEMM roofline: `torch.mm`
    of the same shapes, and the faster products by oneDNN that encode itself uses.
    """
    if components & (components - 1):
        raise typer.BadParameter(f"--components is {components}; expected a power of 2, as faiss counts codes in bits")
    x = clustered(rows, dim)
    rqgmm = fit_rqgmm(x[:20_000], levels=levels, components=components, seed=0).rqgmm
    generator = torch.Generator().manual_seed(0)
    diagonal = RQGMM(
        tuple(
            DiagonalGMM(
                gmm.weights, gmm.means, gmm.variances * (0.5 + torch.rand(components, dim, generator=generator))
            )
            for gmm in rqgmm.levels
        )
    )  # a precision of its own for every component and dimension: two products a level
    quantizer = faiss.ResidualQuantizer(dim, levels, components.bit_length() - 1)
    quantizer.max_beam_size = 1
    quantizer.train(x[:20_000].numpy())
    matrix = np.ascontiguousarray(x.numpy())

    blocks, means = pieces(x, components), rqgmm.levels[0].means
    slopes, out = means.T.contiguous(), torch.empty(len(blocks[0]), components)

    def products(one: Callable[[torch.Tensor], object], count: int) -> None:
        for block in blocks:
            for _ in range(levels * count):
                one(block)

    def onednn(block: torch.Tensor) -> torch.Tensor:
        return linear(block, means)

    def blas(block: torch.Tensor) -> torch.Tensor:
        return torch.mm(block, slopes, out=out[: len(block)])

    works = {
        "encode": lambda: rqgmm.encode(x),
        "encode_diagonal": lambda: diagonal.encode(x),
        "assign": lambda: rqgmm.assign(x),
        "assign_diagonal": lambda: diagonal.assign(x),
        "faiss_beam1": lambda: quantizer.compute_codes(matrix),
        "onednn": lambda: products(onednn, 1),
        "onednn_diagonal": lambda: products(onednn, 2),
        "blas": lambda: products(blas, 1),
        "blas_diagonal": lambda: products(blas, 2),
    }
    seconds = side_by_side(works, REPEATS)
    figures: dict[str, object] = {
        "over_faiss_beam1": seconds["faiss_beam1"] / seconds["encode_diagonal"],
        "shared_variance_over_faiss_beam1": seconds["faiss_beam1"] / seconds["encode"],
        "roofline_fraction": seconds["blas_diagonal"] / seconds["encode_diagonal"],
        "shared_variance_roofline_fraction": seconds["blas"] / seconds["encode"],
        "onednn_roofline_fraction": seconds["onednn_diagonal"] / seconds["encode_diagonal"],
        "shared_variance_onednn_roofline_fraction": seconds["onednn"] / seconds["encode"],
        "uncertainty_cost": seconds["assign"] / seconds["encode"] - 1,
        "diagonal_uncertainty_cost": seconds["assign_diagonal"] / seconds["encode_diagonal"] - 1,
        "rows_per_second": rows / seconds["encode"],
        "rows": rows,
        "dim": dim,
        "levels": levels,
        "components": components,
        "threads": torch.get_num_threads(),
        "faiss_kernels": faiss_kernels(),
    }
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(encode)
