"""Speed and memory of the fit, as ratios to faiss k-means and scikit-learn in the same run.

sid bench fit --json fit.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import faiss
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from sklearn.mixture import GaussianMixture

from benchmarks.opponents import rq_gmm, rq_kmeans
from tokenizer import DiagonalGMM, e_step, m_step
from tokenizer.gmm import annealing_step, isotropic, map_means

ITERATIONS = 12
REPEATS = 3


def clustered(rows: int, dim: int, groups: int = 1000, seed: int = 0) -> torch.Tensor:
    """Rows of unit length around a thousand centres, as noisy as real text vectors are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(groups, dim, generator=generator)
    x = centres[torch.randint(groups, (rows,), generator=generator)] + 1.2 * torch.randn(rows, dim, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: what is left when the machine's noise is taken off."""
    return side_by_side({"work": work}, REPEATS)["work"]


def side_by_side(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """`fastest` of several, run in turn: a machine that slows down for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in times.items()}


def kmeans_iteration(x: torch.Tensor, components: int) -> float:
    """Seconds of one of faiss: of a longer run less a shorter one, so that its set-up does not count."""
    rows = x.numpy()

    def run(iterations: int) -> float:
        def train() -> None:
            faiss.Kmeans(
                x.shape[1], components, niter=iterations, seed=1, min_points_per_centroid=1, max_points_per_centroid=len(x)
            ).train(rows)  # fmt: skip

        return fastest(train)

    return (run(1 + ITERATIONS) - run(1)) / ITERATIONS


def annealing_iteration(x: torch.Tensor, components: int) -> float:
    """Seconds of one, the mean over a whole annealing: hot steps are dense, cold ones are not."""
    from tokenizer import fit_rqgmm

    trace = fit_rqgmm(x, levels=1, components=components, seed=0).trace
    temperatures = [step.temperature for step in trace if step.temperature > 0]
    torch.set_flush_denormal(True)
    start = x[:components].clone()
    first = e_step(isotropic(start, 1.0), x, temperature=0.0, second_moments=False)
    variance = float(first.squared_error) / x.numel()
    centre = x.mean(0)
    times = []
    for _ in range(REPEATS):
        gmm = isotropic(centre + 0.25 * (start - centre), variance)
        began = time.perf_counter()
        for temperature in temperatures:
            parts = [annealing_step(gmm, block, temperature) for block in x.split(8192)]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            gmm = isotropic(map_means(total, gmm.means, prior=1.0).float(), variance)
        times.append((time.perf_counter() - began) / len(temperatures))
    torch.set_flush_denormal(False)
    return min(times)


def diagonal_iteration(x: torch.Tensor, components: int) -> float:
    gmm = DiagonalGMM(
        torch.full((components,), 1 / components), x[:components].clone(), x.var(0).expand(components, -1) * torch.rand(components, 1).add(0.5)
    )  # fmt: skip

    def step() -> None:
        parts = [e_step(gmm, block) for block in x.split(8192)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        m_step(total, gmm, shrinkage=0.0, fitted_weights=True, floor=1e-9)

    return fastest(step)


def sklearn_iteration(x: torch.Tensor, components: int) -> float:
    import warnings

    rows = x.numpy()

    def run(iterations: int) -> float:
        mixture = GaussianMixture(
            components, covariance_type="diag", means_init=rows[:components], init_params="random_from_data", max_iter=iterations, tol=0.0,
        )  # fmt: skip
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged is the point
            mixture.fit(rows)
        return time.perf_counter() - began

    return (run(3) - run(1)) / 2


MEMORY = """
import sys
from tokenizer import fit_rqgmm
from benchmarks.fit import peak_mib
from jobs.fit import EmbeddingFiles
before = peak_mib()
fit_rqgmm(EmbeddingFiles((sys.argv[1],), 128, 8192), levels=2, components=128, seed=0, iterations=2)
print(before, peak_mib())
"""


def peak_mib() -> float:
    """Peak resident memory of this process; what getrusage says starts from that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory(rows: int, folder: Path) -> tuple[float, float]:
    """Peak MiB of a process before and after it fits `rows` x 128 from a file."""
    path = folder / f"{rows}.parquet"
    schema = pa.schema([("embedding", pa.binary())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 50_000):
            part = clustered(min(50_000, rows - start), 128, seed=start).numpy()
            writer.write_table(pa.table({"embedding": [row.tobytes() for row in part]}, schema), row_group_size=16_384)
    told = subprocess.run(
        [sys.executable, "-c", MEMORY, path.resolve().as_uri()], capture_output=True, text=True, check=True
    )
    before, after = map(float, told.stdout.split())
    path.unlink()
    return before, after


def draw(peaks: dict[int, tuple[float, float]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sizes = [rows / 1e6 for rows in peaks]
    axes.plot(sizes, [after for _, after in peaks.values()], "o-", label="peak while fitting from Parquet")
    axes.plot(sizes, [before for before, _ in peaks.values()], "s--", color="grey", label="imports alone")
    axes.plot(
        sizes, [size * 1e6 * 512 / 2**20 for size in sizes], ":", color="tab:red", label="the rows themselves, float32"
    )
    axes.set(xlabel="million rows of 128", ylabel="MiB", title="Memory of a streaming fit", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


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
    kmeans = kmeans_iteration(x, components)
    diagonal = diagonal_iteration(x, components)
    figures: dict[str, object] = {
        "annealing_over_faiss_kmeans": annealing_iteration(x, components) / kmeans,
        "diagonal_over_faiss_kmeans": diagonal / kmeans,
        "sklearn_over_diagonal": sklearn_iteration(x, components) / diagonal,
        "fit_over_rq_kmeans": fastest(lambda: rq_gmm(x, 2, components, 0))
        / fastest(lambda: rq_kmeans(x, 2, components, 0)),
        "rows": rows,
        "dim": dim,
        "components": components,
        "threads": torch.get_num_threads(),
    }
    if rss:
        with tempfile.TemporaryDirectory() as scratch:
            peaks = {}
            for size in (100_000, 300_000, 1_000_000, 3_000_000):
                typer.echo(f"memory at {size:,} rows", err=True)
                peaks[size] = memory(size, Path(scratch))
        figures["rss_mib"] = {str(size): round(after - before, 1) for size, (before, after) in peaks.items()}
        if picture is not None:
            draw(peaks, picture)
    for name, value in figures.items():
        typer.echo(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(fit)
