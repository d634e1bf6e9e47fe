"""Fast CPU versions of a few operations.

Each must agree with its plain version in tests/tokenizer/test_kernels.py. On a GPU the plain operations are used.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

Indices = npt.NDArray[np.int64]
Block = TypeVar("Block")
Result = TypeVar("Result")

CACHED_ROWS = 2048  # most rows of a piece whose intermediate results stay in a core's cache
CACHED_CELLS = 2**18  # most scores (rows times components) of such a piece
GPU_ROWS = 16_384  # rows of a piece on a GPU, which smaller ones leave idle
SPARSE_SHARE = 1 / 16  # share of the responsibilities up to which gathering costs less than a dense product
DENSE_CELLS = 2**14  # components times dimensions up to which a dense product always costs less

# torch multiplies float32 matrices by MKL, which does not use the 512-bit registers of other makers' processors.
# oneDNN, which every torch for the CPU contains, does: twice as fast there, in the same precision.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias: (N, D), (K, D), (K,) -> (N, K), float32.

    With oneDNN a row of the result depends neither on the other rows nor on the number of threads.
    """
    if x.device.type != "cpu" or _onednn_linear is None or not x.numel():
        return F.linear(x, weight, bias)
    if len(x) == 1:  # oneDNN has another routine for a single row, which rounds differently
        return linear(torch.cat([x, x]), weight, bias)[:1]
    result: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
    return result


def squared_norms(x: Tensor) -> Tensor:
    """(N,): sum_d x_nd^2."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.square_()


def weighted_squares(x: Tensor, weight: Tensor) -> Tensor:
    """(N, K): sum_d x_nd^2 weight_kd. The squares are not kept."""
    return linear(torch.square(x, out=_workspace("squares", x.shape, x)), weight)


def squared_distances(x: Tensor, means: Tensor, code: Tensor) -> Tensor:
    """(N,): |x_n - mu_code(n)|^2. The residuals are not kept."""
    mean = torch.index_select(means, 0, code, out=_workspace("means", x.shape, x))
    return squared_norms(torch.sub(x, mean, out=mean))


def add_rows(scores: Tensor, table: Tensor, code: Tensor) -> None:
    """scores_n += table_code(n), in place: (N, K), (J, K), (N,)."""
    scores += torch.index_select(table, 0, code, out=_workspace("rows", scores.shape, scores))


def argmax(scores: Tensor) -> Tensor:
    """(N,): the index of the largest score of each row (N, K); the lowest of several."""
    if scores.is_cuda:
        return scores.argmax(dim=1)
    return torch.from_numpy(scores.numpy().argmax(axis=1))  # NumPy's uses vector registers, torch's does not


def top_k(scores: Tensor, count: int) -> Tensor:
    """(N, count): the indices of the `count` largest scores of each row (N, K), descending; the lowest index wins a
    tie.

    torch.topk leaves the order of ties open. `count` is small, so that many passes cost less than a sort.
    """
    scores = scores.clone()
    columns = []
    for _ in range(count):
        index = argmax(scores)
        columns.append(index)
        scores.scatter_(1, index[:, None], -math.inf)
    return torch.stack(columns, dim=1)


def values_at(scores: Tensor, index: Tensor) -> Tensor:
    """(N,): the score of each row (N, K) at `index` (N,)."""
    return scores.gather(1, index[:, None])[:, 0]


def exp_minus(scores: Tensor, shift: Tensor) -> Tensor:
    """(N, K): exp(scores_nk - shift_n), written over the scores."""
    scores -= shift[:, None]
    if scores.is_cuda:
        return scores.exp_()
    values = scores.numpy()
    np.exp(values, out=values)  # torch's is MKL's: half as fast on processors of other makers
    return scores


@dataclass(frozen=True, eq=False)
class Responsibilities:
    """gamma_nk = exp(log_joint_nk) / sum_j exp(log_joint_nj), dense or sparse.

    Sparse if few would stay: then those below `truncation` times their row's largest are set to zero and the others are
    scaled to sum to 1. With truncation 1e-4 a row (0.9, 0.1, 0.00001) becomes (0.9, 0.1) of the components 0 and 1.
    """

    log_evidence: Tensor  # (N,)  log sum_k exp(log_joint_nk)
    max_posterior: Tensor  # (N,)  max_k gamma_nk
    components: int
    dense: Tensor | None  # (N, K)
    sparse: tuple[Indices, Indices, Tensor] | None  # row, component and gamma of those that are not zero

    @cached_property
    def count(self) -> Tensor:
        """(K,): sum_n gamma_nk, float64."""
        if self.dense is not None:
            return self.dense.sum(0).double()
        assert self.sparse is not None
        _, component, gamma = self.sparse
        return torch.from_numpy(np.bincount(component, gamma.numpy(), minlength=self.components)).double()

    @cached_property
    def _by_component(self) -> GroupedRows:
        assert self.sparse is not None
        row, component, gamma = self.sparse
        return GroupedRows.of(component, row, gamma, self.components)

    def weighted_squares(self, x: Tensor) -> Tensor:
        """(K, D): sum_n gamma_nk x_n^2, of x (N, D). The squares are not kept."""
        return self.weighted_sums(torch.square(x, out=_workspace("squares", x.shape, x)))

    def weighted_sums(self, rows: Tensor) -> Tensor:
        """(K, F): sum_n gamma_nk rows_n, of rows (N, F)."""
        if self.dense is None:
            return self._by_component.sums(rows)
        if self.components <= rows.shape[1]:  # oneDNN is faster with the smaller matrix first
            return linear(self.dense.T, rows.T)
        return linear(rows.T, self.dense.T).T


def responsibilities(log_joint: Tensor, truncation: float, dim: int) -> Responsibilities:
    """The responsibilities of rows of `dim` dimensions under their log-joint (N, K), which is written over."""
    n, k = log_joint.shape
    best = log_joint.amax(dim=1)
    if not log_joint.is_cuda and k * dim > DENSE_CELLS:
        relevant = _workspace("relevant", log_joint.shape, log_joint, torch.bool).numpy()
        np.greater_equal(log_joint.numpy(), (best + math.log(truncation)).numpy()[:, None], out=relevant)
        if np.count_nonzero(relevant) <= SPARSE_SHARE * n * k:
            position = np.flatnonzero(relevant)
            row, component = np.divmod(position, k)
            share = np.exp(log_joint.view(-1).numpy()[position] - best.numpy()[row])
            total = torch.from_numpy(np.bincount(row, share, minlength=n)).float()
            gamma = torch.from_numpy(share / total.numpy()[row])
            return Responsibilities(best + total.log(), total.reciprocal(), k, None, (row, component, gamma))
    gamma = exp_minus(log_joint, best)
    total = gamma.sum(dim=1)
    max_posterior = total.reciprocal()
    gamma *= max_posterior[:, None]
    return Responsibilities(best + total.log(), max_posterior, k, gamma, None)


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """Rows by group: those of group g are `row[start[g] : start[g + 1]]`, each with a weight, or 1."""

    row: Tensor  # (M,)
    start: Tensor  # (G,)
    weight: Tensor | None  # (M,)

    @staticmethod
    def of(group: Indices, row: Indices, weight: Tensor | None, groups: int) -> GroupedRows:
        order = np.argsort(group.astype(np.min_scalar_type(groups - 1)), kind="stable")
        size = np.bincount(group, minlength=groups)
        start = torch.from_numpy(np.cumsum(size) - size)
        return GroupedRows(
            torch.from_numpy(row[order]), start, None if weight is None else weight[torch.from_numpy(order)]
        )

    def sums(self, rows: Tensor) -> Tensor:
        """(G, F): the weighted sum of the rows (N, F) of each group, added in their order."""
        return F.embedding_bag(self.row, rows, self.start, mode="sum", per_sample_weights=self.weight)


def sums_by_code(code: Tensor, rows: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Number (K,), float64, and sum (K, F) of the rows (N, F) of each code (N,)."""
    count = torch.bincount(code, minlength=components).double()
    if code.is_cuda:  # sums by index would depend on the order of threads
        return count, F.one_hot(code, components).float().T @ rows
    return count, GroupedRows.of(code.numpy(), np.arange(len(code)), None, components).sums(rows)


def pieces(x: Tensor, components: int) -> tuple[Tensor, ...]:
    """Consecutive parts of x (N, ...) of nearly equal length, for work on `components` scores a row."""
    most = GPU_ROWS if x.is_cuda else min(CACHED_ROWS, max(512, CACHED_CELLS // components))
    count = max(1, round(len(x) / most))
    return torch.split(x, max(1, math.ceil(len(x) / count)))


@contextmanager
def without_denormals() -> Iterator[None]:
    """Numbers too small for a normal float32 are zero: exponentials underflow, and arithmetic on denormals is slow."""
    already = float(torch.tensor(1e-39) * 1) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)


def parallel_map(
    function: Callable[[Block], Result], blocks: Iterable[Block], device: torch.device
) -> Iterator[Result]:
    """`map(function, blocks)` without denormals; each block by one thread, where there are blocks enough for all
    threads.

    torch by itself lets all threads share each operation. They then wait for each other after every one, and for NumPy,
    which has one thread: a tenth of the time on a quiet machine, and most of it where another program takes a core.
    """
    threads, blocks = torch.get_num_threads(), iter(blocks)
    with without_denormals():
        first = list(islice(blocks, 2 * threads))
        if device.type != "cpu" or threads == 1 or len(first) < 2 * threads:
            yield from map(function, chain(first, blocks))
            return
        pending: deque[Future[Result]] = deque()
        with one_thread(), ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for block in chain(first, blocks):
                pending.append(pool.submit(function, block))
                if len(pending) > threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations by one thread, where the rounding of the result depends on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}


_buffers = _Buffers()


def _workspace(name: str, shape: torch.Size, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of this thread for a result that does not outlive the function that asks for it.

    The pages of a new tensor of megabytes cost as much as the arithmetic on it.
    """
    size = shape.numel()
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.numel() < size or buffer.device != like.device:
        buffer = _buffers.by_name[name] = torch.empty(size, dtype=dtype, device=like.device)
    return buffer[:size].view(shape)
