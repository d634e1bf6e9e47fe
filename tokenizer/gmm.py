"""One mixture of Gaussians with diagonal covariance: density, E-step, statistics, M-step.

RQ-GMM (arXiv 2602.12593, section 3) fits one per level; equation numbers are of Bishop, PRML, section 9.2.
Notation is in tokenizer/README.md: N rows, D dimensions, K components.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear, one_hot

from tokenizer.errors import DataError

Indices = npt.NDArray[np.int64]
Block = TypeVar("Block")
Result = TypeVar("Result")
LOG_2PI = math.log(2 * math.pi)
NEGLIGIBLE = 1e-5  # responsibilities below this share of their row's largest count as none
NEGLIGIBLE_ANNEALING = 1e-3  # the same while annealing, whose steps need not be exact
CACHED_ROWS = 2048  # at most, and CACHED_CELLS affinities, does a processor's cache hold with what they come from
CACHED_CELLS = 2**18
SPARSE = 1 / 16  # share of the responsibilities up to which sums by gathering cost less than a product
CHEAP = 2**14  # components times dimensions up to which a product costs less than to look for what counts


# torch sends float32 products to MKL, which leaves the 512-bit registers of other makers' processors unused. oneDNN, in
# every torch for the CPU, uses them: 2.2 times as fast on AMD's, in the same precision.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None in a torch without oneDNN


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, D) times the transpose of weight (K, D), plus bias (K,): (N, K), float32.

    By oneDNN a row of the result depends neither on which neighbours it has (as long as there is one) nor on the threads.
    """
    if x.device.type == "cpu" and _onednn is not None:
        result: Tensor = _onednn(x, weight, bias, "none", [], "")
        return result
    return linear(x, weight, bias)


def factor(weight: Tensor) -> Tensor:
    """weight (K, D) for many products: in the order that oneDNN puts it in each time, unless so small that once costs more.

    No other operation can read the result.
    """
    if weight.device.type != "cpu" or _onednn is None or weight.numel() < CHEAP:
        return weight
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), CACHED_ROWS)
    return result


def cached_rows(components: int) -> int:
    """Rows of a block that a CPU works off at once."""
    return min(CACHED_ROWS, max(512, CACHED_CELLS // components))


@contextmanager
def without_denormals() -> Iterator[None]:
    """Numbers too small for a normal float32 are zero: exponentials of cold responsibilities underflow, and arithmetic on
    denormals is many times slower. A state of the thread, and of those that it begins."""
    zero_already = float(torch.tensor(1e-39) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(zero_already)


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations by one thread: sums that several share depend on how many they are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself holds for threads yet to come as well


def by_threads(
    work: Callable[[Block], Result], blocks: Iterable[Block], count: int, device: torch.device
) -> Iterator[Result]:
    """`work(block)` of `count` blocks in their order, each by one thread; as many are taken ahead as keep all threads busy.

    Against every operation by all threads: a core finds in its own cache what it wrote there for the operation before,
    and what takes one thread anyway (NumPy, small tensors, Python) waits for nobody. Few blocks are worked that way.
    Either way without denormals.
    """
    threads = torch.get_num_threads()
    with without_denormals():
        if device.type != "cpu" or threads == 1 or count < 2 * threads:
            yield from map(work, blocks)
            return
        begun: deque[Future[Result]] = deque()
        with one_thread(), ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            for block in blocks:
                if len(begun) > threads:
                    yield begun.popleft().result()
                begun.append(pool.submit(work, block))
            while begun:
                yield begun.popleft().result()


class Scratch(threading.local):
    """Tensors that one block after the other writes over; every thread has its own.

    A fresh tensor of megabytes costs a page fault every 4 KiB, and the faults of one step as much as its products.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of this shape (rows, columns), on the device of `like`; it holds what was last written under `name`."""
        rows, columns = shape
        held = self._held.get(name)
        if held is None or len(held) < rows or held.shape[1] != columns or held.device != like.device:
            held = self._held[name] = torch.empty(rows, columns, dtype=dtype, device=like.device)
        return held if len(held) == rows else held[:rows]


def with_squares(x: Tensor, out: Tensor | None = None) -> Tensor:
    """(N, 2 D): x (N, D) beside its squares, the sufficient statistics of a Gaussian with diagonal covariance.

    x may lie in its place in `out` already.
    """
    n, d = x.shape
    out = x.new_empty(n, 2 * d) if out is None else out
    if x.data_ptr() != out.data_ptr():
        out[:, :d] = x
    torch.square(x, out=out[:, d:])
    return out


@dataclass(frozen=True, eq=False)
class DiagonalGMM:
    """weights (K,), means (K, D), variances (K, D); float32. An unfitted or degenerate one cannot be built."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        k, d = self.means.shape
        if self.weights.shape != (k,) or self.variances.shape != (k, d):
            raise DataError(
                f"weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, variances {tuple(self.variances.shape)} "
                "do not fit together; expected (K,), (K, D), (K, D)"
            )
        lowest, highest = self.means.aminmax()  # NaN where there is one
        least, largest = self.variances.aminmax()
        if not (lowest.isfinite() and highest.isfinite() and least > 0 and largest.isfinite()):
            raise DataError(
                "means and variances must be finite and variances above 0; was the mixture fitted on NaN, Inf or huge values?"
            )

    @property
    def components(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def to(self, device: torch.device) -> DiagonalGMM:
        """On another device; itself where it is there already."""
        means = self.means.to(device)
        return self if means is self.means else DiagonalGMM(self.weights.to(device), means, self.variances.to(device))

    @cached_property
    def tied(self) -> bool:
        """All components share one variance per dimension; then the log-joint costs one matrix product, not two."""
        return bool((self.variances == self.variances[:1]).all())

    @cached_property
    def shift(self) -> Tensor | None:
        """Where the means lie far from zero compared with their spread, products with them lose digits: work around their centre."""
        centre = self.means.double().mean(0)
        return centre.float() if centre.square().sum() > 100 * self.variances.double().mean(0).sum() else None

    @cached_property
    def _linear(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of the log-joint, `x @ slope.T + x^2 @ curvature.T + intercept`: (K, D), (K, D), (K,).

        The curvature of a tied mixture is (1, D).
        """
        means = (self.means - self.shift if self.shift is not None else self.means).double()
        variances = (self.variances[:1] if self.tied else self.variances).double()
        precision = 1 / variances
        log_norm = -0.5 * (variances.log().sum(1) + self.dim * LOG_2PI)
        intercept = self.weights.double().log() + log_norm - 0.5 * (means.square() * precision).sum(1)
        return (means * precision).float(), (-0.5 * precision).float(), intercept.float()

    @cached_property
    def variance(self) -> float | None:
        """The one variance of a mixture that is isotropic with flat weights, else None."""
        one = (self.variances == self.variances[0, 0]).all() and (self.weights == self.weights[0]).all()
        return float(self.variances[0, 0]) if one else None

    @cached_property
    def log_normaliser(self) -> float:
        """Of an isotropic mixture with flat weights: log weight and the constant of the density, the same for all."""
        return math.log(float(self.weights[0])) - 0.5 * self.dim * (math.log(float(self.variances[0, 0])) + LOG_2PI)

    @cached_property
    def _factor(self) -> Tensor:
        """What `affinity` multiplies x with, slope (K, D); or x and its squares, slope beside curvature (K, 2 D)."""
        slope, curvature, _ = self._linear
        return factor(slope if self.tied else torch.cat([slope, curvature], dim=1))

    def affinity(self, x: Tensor, moments: Tensor | None = None) -> Tensor:
        """(N, K): the log-joint up to a term of each row, which changes neither argmax nor posterior.

        `moments`, x with its squares (N, 2 D), saves computing them again.
        """
        intercept = self._linear[2]
        if self.shift is not None:
            x, moments = x - self.shift, None
        if self.tied:
            return product(x, self._factor, intercept)
        return product(with_squares(x) if moments is None else moments, self._factor, intercept)

    def row_term(self, x: Tensor) -> Tensor:
        """(N,): what `affinity` leaves out of the log-joint."""
        if not self.tied:
            return x.new_zeros(len(x))
        if self.shift is not None:
            x = x - self.shift
        return product(x.square(), self._linear[1])[:, 0]

    def log_joint(self, x: Tensor) -> Tensor:
        """(N, K): log pi_k + log N(x_n | mu_k, diag var_k)."""
        return self.affinity(x) + self.row_term(x)[:, None]

    def responsibilities(self, x: Tensor) -> Tensor:
        """(N, K): p(k | x_n), rows sum to 1 (PRML eq. 9.23)."""
        return self.affinity(x).softmax(dim=1)


def most_probable(affinity: Tensor) -> Tensor:
    """(N,): index of the largest of each row (N, K); the lowest where several are."""
    if affinity.is_cuda:
        return affinity.argmax(dim=1)
    return torch.from_numpy(affinity.numpy().argmax(axis=1))  # vectorised, as torch's is not: 8 times as fast


def value_at(affinity: Tensor, code: Tensor) -> Tensor:
    """(N,): of each row (N, K) the one at the index `code` (N,)."""
    return affinity.gather(1, code[:, None])[:, 0]


def shares(affinity: Tensor, best: Tensor) -> Tensor:
    """(N, K): exp(affinity_k - best), responsibilities but for their sum. Overwrites the affinities (N, K)."""
    affinity.sub_(best[:, None])
    if affinity.is_cuda:
        return affinity.exp_()
    exponentials = affinity.numpy()
    np.exp(exponentials, out=exponentials)  # torch's is MKL's, and takes twice as long on processors of other makers
    return affinity


def certainty(affinity: Tensor, best: Tensor) -> Tensor:
    """(N,): posterior of the most probable component. Overwrites the affinities (N, K).

    A softmax would also divide what nobody reads.
    """
    return shares(affinity, best).sum(dim=1).reciprocal_()


@dataclass(frozen=True, eq=False)
class GMMStatistics:
    """What an M-step needs of the data; float64. Statistics of disjoint rows add."""

    count: Tensor  # (K,)    sum_n gamma_nk
    sum_x: Tensor  # (K, D)  sum_n gamma_nk x_n
    sum_xx: Tensor | None  # (K, D)  sum_n gamma_nk x_n^2, where asked for
    log_likelihood: Tensor  # ()  sum_n log p(x_n); NaN where not asked for
    squared_error: Tensor  # ()  sum_n |x_n - mu_code(n)|^2; with second moments its expectation under gamma
    certainty: Tensor  # ()  sum_n max_k gamma_nk

    @staticmethod
    def of_no_rows(components: int, dim: int, device: torch.device, *, second_moments: bool = False) -> GMMStatistics:
        shapes: tuple[tuple[int, ...], ...] = ((components,), (components, dim), (components, dim), (), (), ())
        count, sum_x, sum_xx, *scalars = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
        return GMMStatistics(count, sum_x, sum_xx if second_moments else None, *scalars)

    def __add__(self, other: GMMStatistics) -> GMMStatistics:
        both = None if self.sum_xx is None or other.sum_xx is None else self.sum_xx + other.sum_xx
        return GMMStatistics(
            self.count + other.count,
            self.sum_x + other.sum_x,
            both,
            self.log_likelihood + other.log_likelihood,
            self.squared_error + other.squared_error,
            self.certainty + other.certainty,
        )

    def cpu(self) -> GMMStatistics:
        both = None if self.sum_xx is None else self.sum_xx.cpu()
        return GMMStatistics(
            self.count.cpu(), self.sum_x.cpu(), both, self.log_likelihood.cpu(), self.squared_error.cpu(), self.certainty.cpu()
        )  # fmt: skip

    def on_grid(self, rows: int, largest: float) -> GMMStatistics:
        """Rounded so that adding the statistics of all `rows`, of elements up to `largest` and log-likelihoods up to ten
        thousand nats an element, is exact in any order.

        Every number becomes a multiple of a power of two below 2^-52 of what the sum can reach; doubles add such
        numbers without rounding, so the number of processes and their order change no bit.
        """

        def rounded(value: Tensor, reach: float) -> Tensor:
            grid = 2.0 ** (math.frexp(max(reach, 1e-290))[1] - 52)
            return (value / grid).round() * grid

        dim = self.sum_x.shape[1]
        return GMMStatistics(
            rounded(self.count, 2 * rows),
            rounded(self.sum_x, 2 * rows * largest),
            None if self.sum_xx is None else rounded(self.sum_xx, 2 * rows * largest**2),
            rounded(self.log_likelihood, 1e4 * rows * dim),
            rounded(self.squared_error, 8 * rows * dim * largest**2),
            rounded(self.certainty, 2 * rows),
        )


def e_step(
    gmm: DiagonalGMM, x: Tensor, *, hard: bool = False, second_moments: bool = True, scratch: Scratch | None = None
) -> GMMStatistics:
    """Expected counts and moments of `x` (N, D) under `gmm` (PRML eq. 9.23, 9.28).

    `hard` responsibilities are one-hot (classification EM). Sums of a block are float32, their sums over blocks float64.
    """
    scratch = scratch or Scratch()

    def sums(x: Tensor) -> list[Tensor]:
        n, d = x.shape
        rows = with_squares(x, scratch.matrix("moments", (n, 2 * d), x)) if second_moments else x
        affinity = gmm.affinity(x, rows if second_moments else None)  # (N, K)
        if hard or not second_moments:
            code = most_probable(affinity)
        best, sure, *totals = _soft_sums(affinity, None if hard else rows, NEGLIGIBLE, scratch)
        log_likelihood = (best - sure.log() + gmm.row_term(x)).double().sum()  # sum of the joint = largest / its share
        if hard:
            sure, totals = torch.ones_like(sure), sums_by_code(code, rows, gmm.components)
        if not second_moments:
            mean = torch.index_select(gmm.means, 0, code, out=scratch.matrix("rows", x.shape, x))
            totals.append(torch.linalg.vector_norm(torch.sub(x, mean, out=mean), dim=1).double().square().sum())
        return [log_likelihood, sure.double().sum(), *totals]

    log_likelihood, certainty, count, weighted, *error = (total.double() for total in _added(sums, x, gmm.components))
    if not second_moments:
        return GMMStatistics(count, weighted, None, log_likelihood, error[0], certainty)
    means = gmm.means.double()
    sum_x, sum_xx = weighted[:, : gmm.dim], weighted[:, gmm.dim :]
    # sum_nk gamma_nk |x_n - mu_k|^2
    squared_error = sum_xx.sum() + count @ means.square().sum(1) - 2 * (means * sum_x).sum()
    return GMMStatistics(count, sum_x, sum_xx, log_likelihood, squared_error.clamp_min(0), certainty)


def annealing_step(gmm: DiagonalGMM, x: Tensor, scratch: Scratch | None = None) -> GMMStatistics:
    """`e_step` of an `isotropic` mixture without the likelihood, for the many passes of annealing.

    Responsibilities are softmax(log-joint / T) (deterministic annealing, Rose 1998); of an isotropic mixture they are those
    of T times its variance, which is the variance of `gmm`.
    The error comes from the best score, |x - mu|^2 = |x|^2 - 2 variance score, so no mean is gathered.
    """
    scratch = scratch or Scratch()
    variance = float(gmm.variances[0, 0])

    def sums(x: Tensor) -> list[Tensor]:
        score = gmm.affinity(x)  # (N, K)
        best, sure, *totals = _soft_sums(score, x, NEGLIGIBLE_ANNEALING, scratch)
        squared = torch.linalg.vector_norm(x if gmm.shift is None else x - gmm.shift, dim=1).double().square().sum()
        error = squared - 2 * variance * (best.double() - gmm.log_normaliser).sum()
        return [error, sure.double().sum(), *totals]

    error, certainty, count, sum_x = (total.double() for total in _added(sums, x, gmm.components))
    unknown = torch.tensor(math.nan, dtype=torch.float64, device=x.device)
    return GMMStatistics(count, sum_x, None, unknown, error.clamp_min(0), certainty)


def _added(sums: Callable[[Tensor], list[Tensor]], x: Tensor, components: int) -> list[Tensor]:
    """`sums` of pieces of `x` that a cache holds, added; of all of `x` on a GPU."""
    pieces = max(1, round(len(x) / cached_rows(components))) if x.device.type == "cpu" else 1
    first, *others = torch.split(x, max(1, math.ceil(len(x) / pieces)))
    totals = sums(first)
    for piece in others:
        totals = [total.add_(more) for total, more in zip(totals, sums(piece), strict=True)]
    return totals


def _soft_sums(affinity: Tensor, rows: Tensor | None, negligible: float, scratch: Scratch) -> list[Tensor]:
    """[largest affinity (N,), its responsibility (N,), sum_n gamma_nk (K,), and sum_n gamma_nk row_n (K, F) if given rows (N, F)].

    Responsibilities below the share `negligible` of their row's largest may count as none. Once rows are certain of a few
    components each, only those are normalised and gathered: no exponential of the others, and no product. May overwrite the
    affinities (N, K).
    """
    n, k = affinity.shape
    best = affinity.amax(dim=1)

    def products() -> list[Tensor]:
        share = shares(affinity, best)
        sure = share.sum(dim=1).reciprocal_()
        resp = share.mul_(sure[:, None])
        return [best, sure, resp.sum(0).double(), *([] if rows is None else [_weighted_sums(resp, rows)])]

    # On a GPU products are cheap, and sums by index would depend on the order of threads.
    if rows is None or affinity.is_cuda or k * rows.shape[1] < CHEAP:
        return products()
    kept = scratch.matrix("kept", (n, k), affinity, torch.bool).numpy()
    # By NumPy, twice as fast as torch.
    np.greater_equal(affinity.numpy(), (best + math.log(negligible)).numpy()[:, None], out=kept)
    if np.count_nonzero(kept) > SPARSE * n * k:
        return products()
    place = np.flatnonzero(kept)
    row, component = np.divmod(place, k)
    share = np.exp(affinity.view(-1).numpy()[place] - best.numpy()[row])
    sure = (1 / torch.from_numpy(np.bincount(row, share, minlength=n))).float()
    weight = torch.from_numpy(share * sure.numpy()[row])
    return [best, sure, *gathered_sums(component, row, weight, rows, k)]


def _weighted_sums(resp: Tensor, rows: Tensor) -> Tensor:
    """(K, D): sum_n resp_nk rows_n. oneDNN wants the factor with fewer rows first."""
    return product(resp.T, rows.T) if resp.shape[1] <= rows.shape[1] else product(rows.T, resp.T).T


def sums_by_code(code: Tensor, rows: Tensor, components: int) -> list[Tensor]:
    """The sums of `_soft_sums` where responsibilities are one-hot."""
    if code.is_cuda:
        resp = one_hot(code, components).float()
        return [resp.sum(0).double(), resp.T @ rows]
    return gathered_sums(code.numpy(), np.arange(len(code)), None, rows, components)


def gathered_sums(
    component: Indices, row: Indices, weight: Tensor | None, rows: Tensor, components: int
) -> list[Tensor]:
    """[sum_m weight_m (K,), sum_m weight_m rows[row_m] (K, F)] over the m of each component, in the order given."""
    order = np.argsort(component.astype(np.min_scalar_type(components - 1)), kind="stable")
    members = np.bincount(component, minlength=components)
    begin = torch.from_numpy(np.cumsum(members) - members)
    member = torch.from_numpy(row[order])
    if weight is None:
        return [torch.from_numpy(members), embedding_bag(member, rows, begin, mode="sum")]
    count = torch.from_numpy(np.bincount(component, weight.numpy(), minlength=components))
    weight = weight[torch.from_numpy(order)]
    return [count, embedding_bag(member, rows, begin, mode="sum", per_sample_weights=weight)]


def map_means(stats: GMMStatistics, previous: Tensor, *, prior: float = 0.0) -> Tensor:
    """(K, D) float64: means under a prior of `prior` rows at the mean of all rows; without rows or prior, as before.

    The posterior mode of a Gaussian prior (PRML eq. 2.141). One row is the unit information prior of Kass and
    Wasserman (1995); it matters where components have few rows, and there keeps their noise out of the codebook.
    """
    weight = stats.count[:, None] + prior
    centre = stats.sum_x.sum(0) / stats.count.sum()
    means = (stats.sum_x + prior * centre) / weight.clamp_min(1e-6)
    return torch.where(stats.count[:, None] > 1e-6, means, previous.double())


def m_step(
    stats: GMMStatistics, previous: DiagonalGMM, *, shrinkage: float, fitted_weights: bool, floor: float, prior: float = 0.0
) -> DiagonalGMM:  # fmt: skip
    """Weights, means and variances from the statistics (PRML eq. 9.24-9.26); means as in `map_means`.

    `shrinkage` s pulls each variance to the mean variance of the level: (1 - s) var_k + s mean; 1 gives one variance for
    all, 0 the paper's model. Weights are flat unless fitted. With shrinkage 1 second moments are not needed if the
    statistics are hard: the error under the old means gives that under the new ones.
    """
    used = stats.count > 0
    means = map_means(stats, previous.means, prior=prior)  # (K, D)
    elements = stats.count.sum() * means.shape[1]
    if stats.sum_xx is None:
        if shrinkage < 1:
            raise ValueError("the M-step of variances needs second moments; call e_step(second_moments=True)")
        old = previous.means.double()
        saved = (stats.sum_x * (means - old)).sum() * 2 - (stats.count[:, None] * (means.square() - old.square())).sum()
        within = ((stats.squared_error - saved) / elements).clamp_min(floor)
        variances = within.expand_as(means)
    else:
        count = stats.count.clamp_min(torch.finfo(torch.float64).tiny)[:, None]  # (K, 1)
        variances = (stats.sum_xx / count - 2 * means * stats.sum_x / count + means.square()).clamp_min(0)  # (K, D)
        within = ((stats.count[:, None] * variances)[used].sum() / elements).clamp_min(floor)
        variances = torch.where(used[:, None], variances, within)
        variances = ((1 - shrinkage) * variances + shrinkage * within).clamp_min(floor)
    k = len(stats.count)
    weights = (stats.count + 1e-3) / (stats.count + 1e-3).sum() if fitted_weights else torch.full((k,), 1 / k)
    return DiagonalGMM(weights.float(), means.float(), variances.float().contiguous())


def isotropic(means: Tensor, variance: float) -> DiagonalGMM:
    """Flat weights and one variance for every component and dimension."""
    k = len(means)
    return DiagonalGMM(torch.full((k,), 1 / k), means, torch.full_like(means, variance))
