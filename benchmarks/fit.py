"""Speed and memory of the fit, as ratios to faiss k-means and scikit-learn in the same run.

sid bench fit --json fit.json
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from benchmarks.memory import draw, printed_numbers
from benchmarks.opponents import faiss_kernels, rq_gmm, rq_kmeans
from tokenizer import DiagonalGMM, e_step, fit_rqgmm, m_step
from tokenizer.annealing import ANNEALING_TRUNCATION
from tokenizer.data import Residuals, Rows
from tokenizer.gmm import hard_e_step, spherical_gmm, update_means

ITERATIONS = 10
REPEATS = 3


def clustered(rows: int, dim: int, groups: int = 1000, seed: int = 0) -> torch.Tensor:
    """Rows of unit length around a thousand centres, as noisy as real text vectors are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=generator)
    x = centres[torch.randint(groups, (rows,), generator=generator)] + 1.2 * torch.randn(rows, dim, generator=generator)
    return x.div(x.norm(dim=1, keepdim=True))


def side_by_side(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest of a few runs of each; the works alternate, so that a slow minute of the machine hits
    all.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}


def iterations(x: torch.Tensor, components: int) -> dict[str, float]:
    """Seconds of one iteration of each method, all timed in turn.

    Of faiss and scikit-learn a longer run less one iteration, so that their set-up does not count; of ours the mean
    over a whole annealing, whose hot steps cost more than the cold ones, and over the EM iterations that scikit-learn
    does.
    """
    works: dict[str, Callable[[], object]] = {
        "annealing": (annealing := Annealing(x, components)).run,
        "em": EM(x, components).run,
    }
    for n in (1, 1 + ITERATIONS):
        works[f"k-means {n}"] = partial(faiss_kmeans, x, components, n)
        works[f"float32 {n}"] = partial(sklearn_em, x.numpy(), components, n)
        works[f"float64 {n}"] = partial(sklearn_em, x.double().numpy(), components, n)
    seconds = side_by_side(works, REPEATS)
    return {
        "annealing": seconds["annealing"] / len(annealing.temperatures),
        "em": seconds["em"] / ITERATIONS,
        **{
            name: (seconds[f"{name} {1 + ITERATIONS}"] - seconds[f"{name} 1"]) / ITERATIONS
            for name in ("k-means", "float32", "float64")
        },
    }


def faiss_kmeans(x: torch.Tensor, components: int, iterations: int) -> None:
    faiss.Kmeans(
        x.shape[1], components, niter=iterations, seed=1, min_points_per_centroid=1, max_points_per_centroid=len(x)
    ).train(x.numpy())


def sklearn_em(rows: np.ndarray, components: int, iterations: int) -> GaussianMixture:
    mixture = GaussianMixture(
        components,
        covariance_type="diag",
        means_init=rows[:components],
        init_params="random_from_data",
        max_iter=iterations,
        tol=0.0,
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # that it has not converged is the point
        return mixture.fit(rows)


class Annealing:
    """The annealing of the first level, at the temperatures of a fit."""

    def __init__(self, x: torch.Tensor, components: int) -> None:
        trace = fit_rqgmm(x, levels=1, components=components, seed=0).trace
        self.temperatures = [step.temperature for step in trace if step.temperature > 0]
        self.rows, self.components = rows_of(x, components), components
        first = hard_e_step(spherical_gmm(x[:components].clone(), 1.0), x)
        centre = x.mean(0)
        self.variance = float(first.squared_error) / x.numel()
        self.start = centre + 0.25 * (x[:components] - centre)

    def run(self) -> None:
        means = self.start
        for temperature in self.temperatures:
            gmm = spherical_gmm(means, temperature * self.variance)
            step = partial(e_step, gmm, second_moments=False, truncation=ANNEALING_TRUNCATION)
            means = update_means(self.rows.sum(step, self.components), means, prior_rows=1.0).float()


class EM:
    """The EM of diagonal mixtures that scikit-learn does, from its first iteration on."""

    def __init__(self, x: torch.Tensor, components: int) -> None:
        first = sklearn_em(x.numpy(), components, 1)
        self.rows = rows_of(x, components)
        self.start = DiagonalGMM(
            *(torch.from_numpy(values).float() for values in (first.weights_, first.means_, first.covariances_))
        )

    def run(self) -> None:
        gmm = self.start
        for _ in range(ITERATIONS):
            stats = self.rows.sum(partial(e_step, gmm), gmm.components)
            gmm = m_step(stats, gmm, diagonal=True, floor=1e-9)


def rows_of(x: torch.Tensor, components: int) -> Residuals:
    """As a fit passes over them."""
    return Residuals(Rows(x, components, x.device), beam=1)


MEMORY = """
import sys
from tokenizer import fit_rqgmm
from benchmarks.memory import peak_mib
from jobs.embeddings.batches import EmbeddingFiles
before = peak_mib()
fit_rqgmm(EmbeddingFiles((sys.argv[1],), 128, 8192), levels=2, components=128, seed=0, iterations=2)
print(before, peak_mib())
"""


def memory(rows: int, folder: Path) -> tuple[float, float]:
    """Peak MiB of a process before and after it fits `rows` x 128 from a file."""
    path = folder / f"{rows}.parquet"
    schema = pa.schema([("embedding", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            part = clustered(min(50_000, rows - start), 128, seed=start).numpy()
            writer.write_table(pa.table({"embedding": [row.tobytes() for row in part]}, schema), row_group_size=16_384)
    before, after = printed_numbers(MEMORY, path.resolve().as_uri())
    path.unlink()
    return before, after


def fit(
    rows: int = 65_536,
    dim: int = 384,
    components: int = 128,
    rss: Annotated[bool, typer.Option(help="Also measure memory at 0.1, 0.3, 1 and 3 million rows (minutes).")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory against rows to this file.")] = None,
) -> None:
    """An iteration against faiss k-means and scikit-learn, the whole fit against RQ-KMeans, memory against rows."""
    x = clustered(rows, dim)
    one = iterations(x, components)
    fits = {"rq-gmm": partial(rq_gmm, x, 2, components, 0), "rq-kmeans": partial(rq_kmeans, x, 2, components, 0)}
    whole = side_by_side(fits, REPEATS)
    figures: dict[str, object] = {
        "annealing_over_faiss_kmeans": one["annealing"] / one["k-means"],
        "diagonal_over_faiss_kmeans": one["em"] / one["k-means"],
        "sklearn_over_diagonal": one["float32"] / one["em"],
        "sklearn_float64_over_diagonal": one["float64"] / one["em"],
        "fit_over_rq_kmeans": whole["rq-gmm"] / whole["rq-kmeans"],
        "rows": rows,
        "dim": dim,
        "components": components,
        "threads": torch.get_num_threads(),
        "faiss_kernels": faiss_kernels(),
    }
    if rss:
        with tempfile.TemporaryDirectory() as scratch:
            peaks = {}
            for size in (100_000, 300_000, 1_000_000, 3_000_000):
                typer.echo(f"memory at {size:,} rows", err=True)
                peaks[size] = memory(size, Path(scratch))
        figures["rss_mib"] = {str(size): round(after - before, 1) for size, (before, after) in peaks.items()}
        if picture is not None:
            before, after = zip(*peaks.values(), strict=True)
            lines = {
                "peak while fitting from Parquet": after,
                "imports alone": before,
                "the rows themselves, float32": [size * 512 / 2**20 for size in peaks],
            }
            millions = [size / 1e6 for size in peaks]
            draw(picture, millions, lines, title="Memory of a streaming fit", size_label="million rows of 128")
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(fit)
