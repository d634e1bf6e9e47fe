"""RQ-GMM (arXiv 2602.12593): one Gaussian mixture per level, each on the residuals that the levels before leave.

The fit is annealed from a contracted start (README): clusters form by splitting while a temperature falls, as
responsibilities would otherwise be one-hot from the first iteration in hundreds of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from operator import add
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.errors import DataError, LostWorker
from tokenizer.gmm import (
    DiagonalGMM,
    GMMStatistics,
    Result,
    Scratch,
    annealing_step,
    by_threads,
    cached_rows,
    certainty,
    e_step,
    isotropic,
    m_step,
    map_means,
    most_probable,
    one_thread,
    product,
    sums_by_code,
    value_at,
    with_squares,
)
from tokenizer.joint import joint_means

FIT_BLOCK = 8192  # rows of one block of the fit: statistics of blocks add, so chunks of any size give the same blocks
CUDA_BLOCK = 16_384  # rows of a block on a GPU, which small blocks leave idle
CONTRACTION = 1 / 4  # means start this far from the level's mean towards the k-means centres
CRITICAL_SHARE = 1 / 2  # first temperature, as a share of the critical one at which the first split happens
COOLING = 0.97  # factor of the temperature from one annealing step to the next
QUICK_COOLING = 0.7  # the same where the last step moved nothing: between two splits there is nothing to wait for
STILL = 1e-4  # relative change of the error that counts as none
EM_GAIN = 1e-3  # nats a row that an EM step must gain for another one (scikit-learn's default)
OVERRELAXATION = 1.5  # means move this far along each step: near a split EM itself is slow
ANNEALED = 0.99  # mean posterior of the most probable component at which annealing has done its work
PRIOR_ROWS = 1.0  # rows that each component is thought to have besides its own, where its mean is thought to be
HARD_STEPS = 10  # classification EM at the end of a level, at most
JOINT_STEPS = 20  # of all levels at the end of the fit, at most
JOINT_GAIN = 1e-3  # share of the squared error that one must take away: less is not worth the codes that it moves
JOINT_SWEEPS = 3  # over the levels in one of them; with 20 the fit ends at the same error
WARM_STEPS = 3  # Lloyd or EM steps of a refit that starts from the champion (stable IDs)
WARM_JOINT_STEPS = 1  # joint ones: of three, the first brings most of what there is to gain, for half the codes moved
SPECTRUM_ROWS = 20_000  # rows of the power iteration for the critical temperature
VARIANCE_FLOOR = 1e-12  # share of the data's mean square

NOT_FINITE = (
    "embeddings hold NaN, Inf or numbers too large for float32; expected finite ones. Reject such rows when loading"
)

Method = Literal["annealed", "em", "kmeans"]
Data = Tensor | Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class Assignment:
    """codes (N, L) int32; confidence (N,), posterior of the codes; log_likelihood (N,), nats, summed over levels."""

    codes: Tensor
    confidence: Tensor
    log_likelihood: Tensor


@dataclass(frozen=True)
class Iteration:
    """One step of a fit. Temperature 0 is a hard step; perplexity is over K; no likelihood while annealing.

    Level 0 stands for all levels together, its iteration 0 for where the levels one by one have led: RMSE is of what the last
    leaves, perplexity and use are the last's.

    `certainty` is the mean posterior, at the step's temperature, of each row's most probable component.
    """

    level: int
    iteration: int
    temperature: float
    rmse: float
    certainty: float
    log_likelihood: float | None
    perplexity: float
    used: int


@dataclass(frozen=True, eq=False)
class RQGMM:
    """Levels of mixtures over one dimension with the same number of components.

    Encode keeps the `beam` most probable tuples of codes from level to level; 1 is one greedy pass.
    """

    levels: tuple[DiagonalGMM, ...]
    beam: int = 1

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise DataError(f"beam is {self.beam}; expected at least 1, the greedy pass")
        shapes = {tuple(gmm.means.shape) for gmm in self.levels}
        if len(shapes) != 1:
            raise DataError(f"levels have shapes {sorted(shapes)}; expected one (K, D), and at least one level")

    @property
    def n_levels(self) -> int:
        return len(self.levels)

    @property
    def components(self) -> int:
        return self.levels[0].components

    @property
    def dim(self) -> int:
        return self.levels[0].dim

    def to(self, device: str | torch.device) -> RQGMM:
        """On another device; rows are encoded where they and the codebook are."""
        return RQGMM(tuple(gmm.to(torch.device(device)) for gmm in self.levels), self.beam)

    def encode(self, x: Tensor) -> Tensor:
        """codes (N, L) int32: per level the most probable component of the residual; the lowest index wins a tie.

        With a beam, the most probable of the tuples that were kept to the end: by log p(residual of the last level |
        its component) and the log weights of all.
        """
        x = self._checked(x)
        if self.beam > 1:
            return torch.cat(_by_blocks(lambda place: self._searched(x[place]), x, self.components))
        scratch = Scratch()
        codes, scores = _joined(_by_blocks(lambda place: self._codes(x[place], scratch), x, self.components))
        _check_finite(scores)
        return codes.T.int().contiguous()

    def assign(self, x: Tensor, codes: Tensor | None = None) -> Assignment:
        """Codes with their posterior and likelihood in one pass; with `codes`, those of the given ones instead.

        The posterior of a tuple of codes is the product over levels of p(code | residual).
        """
        x = self._checked(x)
        if codes is None and self.beam > 1:
            codes = self.encode(x)
        scratch = Scratch()

        def found(place: slice) -> tuple[Tensor, Tensor]:
            return self._found(x[place], None if codes is None else codes[place], scratch)

        chosen, numbers = _joined(_by_blocks(found, x, self.components))
        best, sure, score, energy = numbers
        _check_finite(best)
        log_evidence = best - sure.log()  # log p(residual), but for the term of the row
        log_posterior = (score - log_evidence).sum(0)
        log_likelihood = (log_evidence + self._row_terms(energy, score)).sum(0)
        return Assignment(chosen.T.int().contiguous(), log_posterior.exp().clamp(0, 1), log_likelihood)

    def decode(self, codes: Tensor) -> Tensor:
        """(N, D) float32: the sum of the means of each row's components."""
        chosen = codes.long()
        return torch.stack([gmm.means[chosen[:, level]] for level, gmm in enumerate(self.levels)]).sum(0)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(N,): sum over levels of log p(residual), nats."""
        return self.assign(x).log_likelihood

    def posteriors(self, x: Tensor, top: int) -> list[tuple[Tensor, Tensor]]:
        """Per level the `top` most probable components (N, top) and their probabilities, along the greedy path."""
        x = self._checked(x)
        found, residual = [], x
        for gmm in self.levels:
            probability, component = gmm.responsibilities(residual).topk(min(top, gmm.components), dim=1)
            found.append((component.int(), probability))
            residual = residual - gmm.means[component[:, 0]]
        return found

    def _codes(self, x: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """codes and their affinities, (L, n) each."""
        block = _padded(x, encode_block(x, self.components))
        descent = self._descent(block, scratch)
        scores, codes = [], []
        for _ in self.levels:
            affinity = descent.affinity()
            code = most_probable(affinity)
            scores.append(value_at(affinity, code))
            codes.append(code)
            descent.take(code)
        return torch.stack(codes)[:, : len(x)], torch.stack(scores)[:, : len(x)]

    def _searched(self, x: Tensor) -> Tensor:
        residual = _padded(x, encode_block(x, self.components))[:, None, :]  # (n, paths, D)
        codes = residual.new_zeros(len(residual), 1, 0, dtype=torch.int32)  # (n, paths, levels so far)
        for level, gmm in enumerate(self.levels, start=1):
            last = level == self.n_levels
            residual, codes = extended(self.levels[: level - 1], gmm, residual, codes, 1 if last else self.beam)
        return codes[: len(x), 0]

    def _found(self, x: Tensor, given: Tensor | None, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """codes (L, n), and (4, L, n): the largest affinity, its responsibility, the affinity of the code, what `_row_terms` needs."""
        n, block = len(x), _padded(x, encode_block(x, self.components))
        descent = self._descent(block, scratch)
        codes, numbers = [], []
        for level in range(self.n_levels):
            energy = descent.energy()
            affinity = descent.affinity()
            code = most_probable(affinity)
            score = best = value_at(affinity, code)
            if given is not None:
                code[:n] = given[:, level].long()
                score = value_at(affinity, code)
            codes.append(code)
            numbers.append((best, certainty(affinity, best), score, energy))
            descent.take(code)
        columns = [column for kind in zip(*numbers, strict=True) for column in kind]
        return torch.stack(codes)[:, :n], torch.stack(columns).view(4, self.n_levels, -1)[..., :n]

    def _row_terms(self, energy: Tensor, score: Tensor) -> Tensor:
        """(L, N): what affinities leave out of the log-joint.

        Of products -|r|^2 / (2 variance), with |r - mu|^2 = |r|^2 - 2 variance (affinity of mu - its constant).
        """
        if self._products is None:
            return energy
        square, terms = energy[0], []
        for gmm, chosen in zip(self.levels, score, strict=True):
            assert gmm.variance is not None
            terms.append(square.clamp_min(0) / (-2 * gmm.variance))
            square = square - 2 * gmm.variance * (chosen - gmm.log_normaliser)
        return torch.stack(terms)

    def _descent(self, block: Tensor, scratch: Scratch) -> _ByProducts | _ByResiduals:
        products = self._products
        return _ByResiduals(self, block, scratch) if products is None else _ByProducts(self, products, block, scratch)

    @cached_property
    def _products(self) -> _Products | None:
        """What makes a residual unnecessary where every level is isotropic: its scores are those of x, less what the means
        of the levels before contribute to them, mu_k . mu_j / variance."""
        for gmm in self.levels:
            # Far smaller residuals than means would lose their digits in the difference.
            if gmm.variance is None or gmm.variance < 1e-3 * float(self.levels[0].means.square().mean()):
                return None
            if gmm.shift is not None:
                return None
        taken = [
            [-(before.means.double() @ gmm._linear[0].double().T).float() for before in self.levels[:level]]
            for level, gmm in enumerate(self.levels)
        ]
        return _Products([gmm._factor for gmm in self.levels], [gmm._linear[2] for gmm in self.levels], taken)

    def _checked(self, x: Tensor) -> Tensor:
        """As float32, as fit takes it."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise DataError(
                f"embeddings have shape {tuple(x.shape)}; expected (N, {self.dim}), the dimension of this codebook"
            )
        return x.detach().float()


@dataclass(frozen=True, eq=False)
class _Products:
    """By level: slope (K, D) as a `factor`, intercept (K,), and what the means of each level before take from its scores, (K, K) each."""

    slopes: list[Tensor]
    intercepts: list[Tensor]
    taken: list[list[Tensor]]


class _ByProducts:
    """The way of a block down the levels without residuals: `affinity` of a level, then `take` the component chosen."""

    def __init__(self, rqgmm: RQGMM, products: _Products, x: Tensor, scratch: Scratch) -> None:
        self.rqgmm, self.products, self.x, self.scratch = rqgmm, products, x, scratch
        self.codes: list[Tensor] = []  # of the levels before

    @cached_property
    def _square(self) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(self.x, dim=1)
        return length.square_()

    def energy(self) -> Tensor:
        """(n,): |x|^2, at every level. Asked first: what it reads the product then finds in the cache."""
        return self._square

    def affinity(self) -> Tensor:
        level, shape = len(self.codes), (len(self.x), self.rqgmm.components)
        affinity = product(self.x, self.products.slopes[level], self.products.intercepts[level])
        for code, taken in zip(self.codes, self.products.taken[level], strict=True):
            affinity += torch.index_select(taken, 0, code, out=self.scratch.matrix("taken", shape, self.x))
        return affinity

    def take(self, code: Tensor) -> None:
        self.codes.append(code)


class _ByResiduals:
    """The same for any mixtures."""

    def __init__(self, rqgmm: RQGMM, x: Tensor, scratch: Scratch) -> None:
        self.levels, self.residual, self.scratch = list(rqgmm.levels), x, scratch

    def energy(self) -> Tensor:
        """(n,): the level's row term itself."""
        return self.levels[0].row_term(self.residual)

    def _moments(self) -> Tensor:
        """(n, 2 D): what `with_squares` makes of a level's residual, which `take` has put in its place already."""
        n, d = self.residual.shape
        return self.scratch.matrix("moments", (n, 2 * d), self.residual)

    def affinity(self) -> Tensor:
        gmm, x = self.levels[0], self.residual
        return gmm.affinity(x, None if gmm.tied else with_squares(x, self._moments()))

    def take(self, code: Tensor) -> None:
        gmm, x = self.levels.pop(0), self.residual
        if not self.levels:  # nobody asks for what the last level leaves
            return
        mean = torch.index_select(gmm.means, 0, code, out=self.scratch.matrix("rows", x.shape, x))
        left = self.scratch.matrix("residual", x.shape, x) if self.levels[0].tied else self._moments()[:, : gmm.dim]
        self.residual = torch.sub(x, mean, out=left)


def _check_finite(score: Tensor) -> None:
    if not math.isfinite(float(score.double().sum())):
        raise DataError(NOT_FINITE)


def extended(
    before: Sequence[DiagonalGMM], gmm: DiagonalGMM, residual: Tensor, codes: Tensor, beam: int
) -> tuple[Tensor, Tensor]:
    """The `beam` most probable ways to go on from the paths of each row by a component of `gmm`.

    residual (n, paths, D) and codes (n, paths, levels before) in and out, the best path first. The probability of a path
    is that of its last residual under its last component, times the weights of all its components.
    """
    n, paths, d = residual.shape
    if paths == 1:
        joint = gmm.affinity(residual[:, 0])  # (n, K); what is left out is the same for all
    else:
        flat = residual.reshape(-1, d)
        weight = torch.stack([g.weights.log()[codes[:, :, level].long()] for level, g in enumerate(before)]).sum(
            0
        )  # (n, paths)
        joint = (gmm.affinity(flat) + (gmm.row_term(flat) + weight.flatten())[:, None]).view(n, -1)
    if beam == 1:
        place = most_probable(joint)[:, None]
        best = joint.gather(1, place)
    else:
        best, place = joint.topk(min(beam, joint.shape[1]), dim=1)
    _check_finite(best[:, 0])
    path, code = place // gmm.components, place % gmm.components  # (n, kept)
    taken = codes.gather(1, path[:, :, None].expand(-1, -1, codes.shape[2]))
    left = residual.gather(1, path[:, :, None].expand(-1, -1, d)) if paths > 1 else residual
    return left - gmm.means[code], torch.cat([taken, code[:, :, None].int()], dim=2)


def encode_block(x: Tensor, components: int) -> int:
    """Rows of one block of encode."""
    return CUDA_BLOCK if x.is_cuda else cached_rows(components)


def _by_blocks(work: Callable[[slice], Result], x: Tensor, components: int) -> list[Result]:
    """`work(place)` of the blocks of encode in x, in their order, by all threads."""
    size = encode_block(x, components)
    places = [slice(start, min(start + size, len(x))) for start in range(0, max(1, len(x)), size)]
    return list(by_threads(work, places, len(places), x.device))


def _joined(blocks: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Both results of all blocks, whose last dimension is of rows."""
    first, second = (torch.cat(parts, dim=-1) for parts in zip(*blocks, strict=True))
    return first, second


def _padded(x: Tensor, rows: int) -> Tensor:
    """Blocks of one size, so that a row's codes do not depend on how many others come with it."""
    missing = rows - len(x)
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


@dataclass(frozen=True, eq=False)
class RQGMMFit:
    """A codebook and how it came about; of a fit that is not done yet, the levels that are."""

    rqgmm: RQGMM
    trace: tuple[Iteration, ...]


def fit_rqgmm(
    data: Data, *, levels: int, components: int, seed: int, init: RQGMM | None = None, iterations: int = 300,
    method: Method = "annealed", shrinkage: float = 1.0, beam: int = 1, device: str | torch.device = "cpu",
    resume: RQGMMFit | None = None,
    on_iteration: Callable[[Iteration], None] | None = None, on_level: Callable[[RQGMMFit], None] | None = None,
) -> RQGMMFit:  # fmt: skip
    """Fit RQ-GMM level by level (arXiv 2602.12593, section 3).

    Args:
        data: float tensor (N, D), or a re-iterable of float batches that may be larger than memory. Where
            torch.distributed is initialised each rank passes its own rows: with ranks in order, and each one's rows
            starting at a multiple of FIT_BLOCK, any number of ranks gives the codebook of one.
        init: start from this codebook with a joint step (or a few Lloyd or EM steps), so that codes move only where the data moved.
        iterations: annealing steps (or EM, or Lloyd steps) per level, at most. Annealing ends when rows are certain of
            their component (ANNEALED), EM when the likelihood stands still (EM_GAIN), hard and Lloyd steps when the error does.
        method: "annealed" is ours; "em" the paper's own (diagonal EM from k-means, fitted weights, no annealing);
            "kmeans" the limit of one hard variance, that is RQ-KMeans.
        shrinkage: how far variances are pulled to the level's mean variance, 0 to 1.
        beam: tuples of codes that encode will keep from level to level; each level is then fitted on the residuals of all
            of them, and the trace's errors are theirs. 1 is greedy, and costs that many times less.
        device: where rows and their statistics are computed; the codebook comes back on the CPU.
        resume: what `on_level` was last given by a fit of the same arguments that did not end; its levels are kept, and
            the result is that of a fit that was never interrupted.

    Raises:
        DataError: no rows, fewer than components, NaN or Inf, or batches of different width.
        LostWorker: another rank is gone.
    """
    if init is not None and (init.n_levels, init.components) != (levels, components):
        raise DataError(
            f"init has {init.n_levels} levels of {init.components} components, asked for are {levels} of {components}; "
            "expected the same. Fit without init to change the shape"
        )
    if method == "em":
        shrinkage = 0.0
    together = method == "annealed" and shrinkage == 1 and levels > 1
    source = _Blocks(data, components, beam, torch.device(device))
    if init is not None and init.dim != source.dim:
        raise DataError(f"init has dimension {init.dim}, the data {source.dim}; expected the same. Fit without init")
    trace = list(resume.trace) if resume is not None else []
    done = list(resume.rqgmm.levels) if resume is not None else []
    if resume is not None and (resume.rqgmm.components, resume.rqgmm.dim) != (components, source.dim):
        raise DataError(
            f"the fit to resume has {resume.rqgmm.components} components of dimension {resume.rqgmm.dim}, this one {components} of "
            f"{source.dim}; expected the same fit. Start anew without resume"
        )
    for gmm in done[: levels - 1]:
        source.descend(gmm)
    for level in range(len(done) + 1, levels + 1):
        fit = _Level(source, level, components, seed, shrinkage, method, trace, on_iteration)
        warm_steps = 0 if together else WARM_STEPS
        gmm = fit.cold(iterations) if init is None else fit.warm(init.levels[level - 1], warm_steps)
        done.append(gmm)
        if on_level is not None:
            on_level(RQGMMFit(RQGMM(tuple(done), beam), tuple(trace)))
        if level < levels:
            source.descend(gmm)
    if together:
        done = _together(source, done, JOINT_STEPS if init is None else WARM_JOINT_STEPS, trace, on_iteration)
    return RQGMMFit(RQGMM(tuple(done), beam), tuple(trace))


class _Blocks:
    """The data as blocks of FIT_BLOCK rows, whatever chunks it comes in, less what the fitted levels explain.

    With a beam each item has as many rows as it has paths. For a tensor the residuals are kept; for batches only the
    codes, and each pass reads the batches again.
    """

    def __init__(self, data: Data, components: int, beam: int, device: torch.device) -> None:
        self.device = device
        if isinstance(data, Tensor) and data.ndim != 2:
            raise DataError(f"embeddings have shape {tuple(data.shape)}; expected (N, D)")
        self._data = data
        # (N, paths, D)
        self._tensor = data.to(device, torch.float32, copy=True)[:, None] if isinstance(data, Tensor) else None
        self._beam = beam
        self._levels: list[DiagonalGMM] = []
        rows, square, largest, self.dim = 0, 0.0, 0.0, 0
        for block in self:
            if block.ndim != 2 or (self.dim and block.shape[1] != self.dim):
                raise DataError(
                    f"a batch has shape {tuple(block.shape)}; expected (n, {self.dim or 'D'}) in every batch"
                )
            if not torch.isfinite(block).all():
                raise DataError("embeddings hold NaN or Inf; expected finite numbers. Reject such rows before fitting")
            self.dim = block.shape[1]
            rows += len(block)
            square += float(torch.linalg.vector_norm(block, dim=1).double().square().sum())
            largest = max(largest, float(block.abs().amax()))
        # (N, paths, levels). In one piece: small pieces kept from each block would cut up the memory that blocks come from.
        self._codes = torch.zeros(rows, 1, 0, dtype=torch.int32, device=device)
        counted = torch.tensor([float(rows), square], dtype=torch.float64)
        if _distributed():  # in rank order, so that every rank has the same bits
            counted = torch.stack(_gathered(counted[None])).sum(0)[0]
            largest = float(torch.cat(_gathered(torch.tensor([largest]))).max())
        self.largest = largest
        self.items = self.rows = int(counted[0])
        if _distributed():  # a rank may have no rows, and takes part all the same
            self.dim = int(torch.cat(_gathered(torch.tensor([self.dim]))).max())
        if self.rows == 0:
            raise DataError("there are no embeddings to fit on; expected at least as many as components")
        if self.rows < components:
            raise DataError(
                f"{self.rows} embeddings are fewer than {components} components; expected at least as many. "
                "Lower components or fit on more items"
            )
        self.elements = self.rows * self.dim
        self.floor = max(VARIANCE_FLOOR * float(counted[1]) / self.elements, 1e-30)  # of a variance

    def __iter__(self) -> Iterator[Tensor]:
        """Residuals (n, D), of every path; FIT_BLOCK rows at most."""
        for place, items in _placed(self._items()):
            yield from torch.split(self._residual(place, items).flatten(0, 1), FIT_BLOCK)

    def by_threads(self, work: Callable[[slice, Tensor], Result]) -> Iterator[Result]:
        """`work(place, residuals (n, paths, D))` of FIT_BLOCK items after FIT_BLOCK items; `place` is theirs in the data."""
        return self._by_threads(lambda place, items: work(place, self._residual(place, items)), self._items())

    def _by_threads(self, work: Callable[[slice, Tensor], Result], blocks: Iterable[Tensor]) -> Iterator[Result]:
        count = math.ceil(self.own_items / FIT_BLOCK)
        return by_threads(lambda part: work(*part), _placed(blocks), count, self.device)

    @property
    def own_rows(self) -> int:
        """Of this rank; `rows` is of all."""
        return self.own_items * self._codes.shape[1]

    @property
    def own_items(self) -> int:
        return self._codes.shape[0]

    def _items(self) -> Iterable[Tensor]:
        """FIT_BLOCK items after FIT_BLOCK items, as `_residual` takes them."""
        return self._rows() if self._tensor is None else torch.split(self._tensor, FIT_BLOCK)

    def _rows(self) -> Iterator[Tensor]:
        """The rows themselves (n, D), FIT_BLOCK after FIT_BLOCK."""
        if isinstance(self._data, Tensor):
            for part in torch.split(self._data, FIT_BLOCK):
                yield part.to(self.device, torch.float32)
            return
        waiting: list[Tensor] = []
        held = width = 0
        for batch in self._data:
            width = width or batch.shape[-1]
            if batch.ndim != 2 or batch.shape[1] != width:
                raise DataError(f"a batch has shape {tuple(batch.shape)}; expected (n, {width}) in every batch")
            waiting.append(batch.float())
            held += len(batch)
            while held >= FIT_BLOCK:
                joined = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
                yield self._moved(joined[:FIT_BLOCK])
                waiting, held = [joined[FIT_BLOCK:]], held - FIT_BLOCK
        if held:
            yield self._moved(torch.cat(waiting))

    def _moved(self, block: Tensor) -> Tensor:
        return block.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else block

    def _residual(self, place: slice, items: Tensor) -> Tensor:
        """(n, paths, D)"""
        if self._tensor is not None:
            return items
        residual = items[:, None]
        for level, gmm in enumerate(self._levels):
            residual = residual - gmm.means[self._codes[place, :, level].long()]
        return residual

    def descend(self, gmm: DiagonalGMM) -> None:
        """Take from every row the mean of its most probable component, as encode will."""
        gmm = gmm.to(self.device)
        n, paths, levels = self._codes.shape
        kept = min(self._beam, paths * gmm.components)
        codes = self._codes.new_empty(n, kept, levels + 1)
        left = self._tensor
        if left is not None and kept != paths:
            left = left.new_empty(n, kept, self.dim)

        def go_on(place: slice, residual: Tensor) -> None:
            items = max(1, FIT_BLOCK // paths)  # every thread holds this many rows with their affinities
            for part in range(0, len(residual), items):
                own = slice(place.start + part, min(place.start + part + items, place.stop))
                found, codes[own] = extended(
                    self._levels, gmm, residual[part : part + items], self._codes[own], self._beam
                )
                if left is not None:
                    left[own] = found

        for _ in self.by_threads(go_on):
            pass
        self._codes, self._tensor = codes, left
        self._levels.append(gmm)
        # A residual is at most the element and the mean it lost: the bound that exact sums need.
        self.largest += float(gmm.means.abs().amax())
        self.rows = self.items * kept
        self.elements = self.rows * self.dim

    def explained(self, levels: Sequence[DiagonalGMM]) -> tuple[list[GMMStatistics], Tensor]:
        """Codes (N, L) that encode gives the rows of all ranks, and by level the statistics under hard responsibilities:
        sum_x is of what the last level leaves, squared_error of what this one does."""
        rqgmm = RQGMM(tuple(levels), self._beam).to(self.device)
        reach = self.largest + sum(float(gmm.means.abs().amax()) for gmm in levels)
        totals = [GMMStatistics.of_no_rows(rqgmm.components, self.dim, self.device) for _ in levels]
        if self._codes.shape[1:] != (1, len(levels)):
            self._codes = self._codes.new_empty(self.own_items, 1, len(levels))
        codes = self._codes[:, 0]
        _ = rqgmm._products  # once, by all threads

        def leave(place: slice, rows: Tensor) -> list[GMMStatistics]:
            codes[place] = code = rqgmm.encode(rows)
            errors, residual = [], rows
            for level, gmm in enumerate(rqgmm.levels):
                residual = residual - gmm.means[code[:, level].long()]
                errors.append(torch.linalg.vector_norm(residual, dim=1).double().square().sum())
            unknown = torch.full_like(errors[0], math.nan)
            found = []
            for level, error in enumerate(errors):
                count, left = (
                    sums.double() for sums in sums_by_code(code[:, level].long(), residual, rqgmm.components)
                )
                found.append(GMMStatistics(count, left, None, unknown, error, count.sum()).on_grid(self.items, reach))
            return found

        for found in self._by_threads(leave, self._rows()):
            totals = [total + more for total, more in zip(totals, found, strict=True)]
        totals = [total.cpu() for total in totals]
        codes = codes.cpu()
        if _distributed():
            return [_all_ranks(total) for total in totals], torch.cat(_gathered(codes))
        return totals, codes


def _placed(blocks: Iterable[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Blocks with the place of each in their sequence of rows."""
    start = 0
    for block in blocks:
        yield slice(start, start + len(block)), block
        start += len(block)


class _Level:
    """The fit of one level: start, annealing, hard steps, dead components."""

    def __init__(
        self, source: _Blocks, level: int, components: int, seed: int, shrinkage: float, method: Method,
        trace: list[Iteration], told: Callable[[Iteration], None] | None,
    ) -> None:  # fmt: skip
        self.source, self.level, self.components, self.method = source, level, components, method
        self.shrinkage, self.trace, self.told = shrinkage, trace, told
        self.generator = torch.Generator().manual_seed(seed * 1000 + level)
        self.prior = PRIOR_ROWS if method == "annealed" else 0.0
        self.count, self.scratch = 0, Scratch()

    def cold(self, iterations: int) -> DiagonalGMM:
        rows = self._sample(max(SPECTRUM_ROWS, 4 * self.components))
        start = isotropic(self._seeded(rows), 1.0)
        first = self._sums(start, partial(e_step, hard=True, second_moments=False))
        # One k-means iteration.
        gmm = m_step(first, start, shrinkage=1.0, fitted_weights=False, floor=self.source.floor)
        if self.method == "em":
            return self._em(gmm, iterations)
        if self.method == "kmeans":
            return self._hard(gmm, iterations)
        mean = first.sum_x.sum(0) / first.count.sum()
        return self._hard(self._annealed(gmm, mean, largest_eigenvalue(rows - mean.float()), iterations), HARD_STEPS)

    def _em(self, gmm: DiagonalGMM, steps: int) -> DiagonalGMM:
        """EM until the likelihood stands still."""
        last = -math.inf
        for _ in range(steps):
            gmm = self._em_step(gmm, 1.0)
            likelihood = self.trace[-1].log_likelihood
            assert likelihood is not None
            if likelihood - last <= EM_GAIN:
                break
            last = likelihood
        return gmm

    def _annealed(self, gmm: DiagonalGMM, mean: Tensor, spread: float, steps: int) -> DiagonalGMM:
        """Means after annealing from half the critical temperature, `spread` / variance, until rows are certain."""
        variance = float(gmm.variances[0, 0])
        if variance <= self.source.floor:  # the start explains its rows exactly: there is nothing to split
            return gmm
        means = (mean + CONTRACTION * (gmm.means.double() - mean)).float()
        temperature, last = CRITICAL_SHARE * spread / variance, math.inf
        for _ in range(steps):
            if temperature * variance <= self.source.floor:  # rows that differ by less cannot be told apart
                break
            sums = self._sums(isotropic(means, temperature * variance), annealing_step)
            self._tell(sums, temperature)
            target = map_means(sums, means, prior=self.prior)
            means = (means.double() + OVERRELAXATION * (target - means.double())).float()
            if float(sums.certainty) >= ANNEALED * self.source.rows:
                break
            error = float(sums.squared_error)
            temperature *= QUICK_COOLING if abs(last - error) <= STILL * error else COOLING
            last = error
        return isotropic(means, variance)

    def warm(self, champion: DiagonalGMM, steps: int) -> DiagonalGMM:
        """`steps` from the champion's level; a component that has no rows moves in any case, as no ID is lost by it."""
        if self.method == "em":
            return self._em(champion, steps)
        start = isotropic(champion.means, 1.0)
        first = self._sums(start, partial(e_step, hard=True, second_moments=False))
        return self._hard(
            isotropic(champion.means, max(float(first.squared_error) / self.source.elements, self.source.floor)), steps
        )

    def _hard(self, gmm: DiagonalGMM, steps: int) -> DiagonalGMM:
        """Classification EM until the error stands still, then every component without rows to a row of its own."""
        last = math.inf
        for _ in range(steps):
            gmm = self._em_step(gmm, 0.0)
            error, dead = self.trace[-1].rmse, self.counted == 0
            if bool(dead.any()):
                gmm = self._revived(gmm, dead)
            elif last - error <= (STILL if self.method == "annealed" else 0.0) * error:
                break
            last = error
        # The last step may have emptied some, and a row taken may have been the only one of another. Each round lowers
        # the error, until rows differ by less than a float32 can tell.
        last = math.inf
        while True:
            sums = self._sums(gmm, partial(e_step, hard=True, second_moments=False))
            revived = self._revived(gmm, sums.count == 0)
            if revived is gmm or float(sums.squared_error) >= last:
                return gmm
            gmm, last = revived, float(sums.squared_error)

    def _em_step(self, gmm: DiagonalGMM, temperature: float) -> DiagonalGMM:
        moments = self.shrinkage < 1
        sums = self._sums(gmm, partial(e_step, hard=temperature == 0, second_moments=moments), moments=moments)
        self._tell(sums, temperature)
        self.counted = sums.count
        return m_step(
            sums,
            gmm,
            shrinkage=self.shrinkage,
            fitted_weights=self.method == "em",
            floor=self.source.floor,
            prior=self.prior,
        )

    def _revived(self, gmm: DiagonalGMM, dead: Tensor) -> DiagonalGMM:
        """Each component without rows moves to the row, among distinct ones, that its own component serves worst."""
        places = dead.nonzero()[:, 0]
        if not len(places):
            return gmm
        worst, error = self._worst_rows(gmm, len(places))
        wrong = error > self.source.floor
        if not bool(wrong.any()):  # fewer distinct rows than components
            return gmm
        means = gmm.means.clone()
        means[places[: int(wrong.sum())]] = worst[wrong]
        return DiagonalGMM(gmm.weights, means, gmm.variances)

    def _worst_rows(self, gmm: DiagonalGMM, wanted: int) -> tuple[Tensor, Tensor]:
        gmm = gmm.to(self.source.device)
        rows, errors = gmm.means.new_empty(0, gmm.dim), gmm.means.new_empty(0)
        for block in self.source:
            code = most_probable(gmm.affinity(block))
            error = (block - gmm.means[code]).square().sum(1)
            rows, errors = _distinct_top(torch.cat([rows, block]), torch.cat([errors, error]), wanted)
        rows, errors = rows.cpu(), errors.cpu()
        if _distributed():
            rows, errors = _distinct_top(torch.cat(_gathered(rows)), torch.cat(_gathered(errors)), wanted)
        return rows, errors

    def _sums(self, gmm: DiagonalGMM, step: Callable[..., GMMStatistics], *, moments: bool = False) -> GMMStatistics:
        """`step(gmm, block)` of all blocks of all ranks; the same bits whoever adds them in whatever order."""
        gmm = gmm.to(self.source.device)
        total = GMMStatistics.of_no_rows(self.components, self.source.dim, self.source.device, second_moments=moments)

        def sums(_: slice, residual: Tensor) -> GMMStatistics:
            parts = torch.split(residual.flatten(0, 1), FIT_BLOCK)
            found = (
                step(gmm, part, scratch=self.scratch).on_grid(self.source.rows, self.source.largest) for part in parts
            )
            return reduce(add, found)

        total = reduce(add, self.source.by_threads(sums), total).cpu()
        return _all_ranks(total) if _distributed() else total

    def _sample(self, wanted: int) -> Tensor:
        """About `wanted` rows, evenly spread over the data; the same on every rank."""
        step = max(1, self.source.rows // wanted)
        own = self.source.own_rows
        rows = torch.empty(own // step + own // FIT_BLOCK + 2, self.source.dim)  # each block begins anew to count
        filled = 0
        for block in self.source:
            part = block[::step]
            rows[filled : filled + len(part)] = part
            filled += len(part)
        rows = rows[:filled]
        return torch.cat(_gathered(rows)) if _distributed() else rows

    def _seeded(self, rows: Tensor) -> Tensor:
        """K distinct sampled rows where there are as many; repeats else (they stay unused)."""
        order = torch.randperm(len(rows), generator=self.generator)
        shuffled = rows[order]
        start = shuffled[: self.components]
        if len(torch.unique(start, dim=0)) < self.components:
            distinct = torch.unique(shuffled, dim=0)
            distinct = distinct[torch.randperm(len(distinct), generator=self.generator)]
            start = distinct[torch.arange(self.components) % len(distinct)]
        return start.clone()

    def _tell(self, sums: GMMStatistics, temperature: float) -> None:
        self.count += 1
        step = _iteration(sums, self.level, self.count, temperature, self.source.rows)
        self.trace.append(step)
        if self.told is not None:
            self.told(step)


def _iteration(sums: GMMStatistics, level: int, number: int, temperature: float, rows: int) -> Iteration:
    k, d = sums.sum_x.shape
    share = sums.count / sums.count.sum()
    entropy = -float((share * share.clamp_min(1e-300).log()).sum())
    likelihood = float(sums.log_likelihood) / rows
    return Iteration(
        level=level,
        iteration=number,
        temperature=temperature,
        rmse=math.sqrt(float(sums.squared_error) / (rows * d)),
        certainty=float(sums.certainty) / rows,
        log_likelihood=likelihood if math.isfinite(likelihood) else None,
        perplexity=math.exp(entropy) / k,
        used=int((sums.count > 0.5).sum()),
    )


def _together(
    source: _Blocks, levels: list[DiagonalGMM], steps: int, trace: list[Iteration], told: Callable[[Iteration], None] | None
) -> list[DiagonalGMM]:  # fmt: skip
    """All levels after joint M-steps, each with a new encode, until one gains little or a component loses its rows.

    The priors' rows are at the means as they were fitted, of the last level, which nothing comes after, at its mean.
    """
    elements = source.items * source.dim

    def level(means: Tensor, sums: GMMStatistics) -> DiagonalGMM:
        return isotropic(means.float(), max(float(sums.squared_error) / elements, source.floor))

    def tell(number: int) -> None:
        trace.append(_iteration(sums[-1], 0, number, 0.0, source.items))
        if told is not None:
            told(trace[-1])

    anchors = [gmm.means.double() for gmm in levels[:-1]]
    sums, codes = source.explained(levels)
    tell(0)
    for number in range(1, steps + 1):
        means = [gmm.means.double() for gmm in levels]
        centre = (sums[-1].sum_x.sum(0) + sums[-1].count @ means[-1]) / source.items
        moved = joint_means(
            [own.sum_x for own in sums], codes, means, [*anchors, centre[None]], PRIOR_ROWS, JOINT_SWEEPS
        )
        tried = [level(mean, own) for mean, own in zip(moved, sums, strict=True)]
        found, codes = source.explained(tried)
        dead, died = (sum(int((own.count == 0).sum()) for own in either) for either in (sums, found))
        error = float(sums[-1].squared_error)
        gain = error - float(found[-1].squared_error)
        if gain <= JOINT_GAIN * error or died > dead:
            break
        levels, sums = tried, found
        tell(number)
    return [level(gmm.means, own) for gmm, own in zip(levels, sums, strict=True)]


def largest_eigenvalue(centred: Tensor, steps: int = 30) -> float:
    """Of the covariance of centred rows (N, D), by power iteration; with the variance it gives the critical temperature."""
    with one_thread():
        vector = torch.linalg.vector_norm(centred, dim=0).double() + 1e-12  # (D,)
        value = 0.0
        for _ in range(steps):
            vector = vector / vector.norm()
            image = (centred.T @ (centred @ vector.float())).double() / max(1, len(centred))  # (D,)
            last, value = value, float(image @ vector)
            if value - last <= STILL * value:  # it only grows
                break
            vector = image
        return value


def _distinct_top(rows: Tensor, errors: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    order = errors.sort(descending=True, stable=True).indices[: 4 * wanted]
    rows, errors = rows[order], errors[order]
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    groups = int(inverse.max()) + 1 if len(inverse) else 0
    first = inverse.new_full((groups,), len(rows))
    first.scatter_reduce_(0, inverse, torch.arange(len(rows), device=rows.device), reduce="amin")
    kept = first.sort().values[:wanted]
    return rows[kept], errors[kept]


# ---- several processes: every rank adds the same numbers in the same order, so all take the same step ----


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def _others_needed() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that torch.distributed says when a peer has closed its connection
        raise LostWorker(
            f"another worker of the fit is gone ({error}); expected all of them. Resume the fit"
        ) from error


def _gathered(value: Tensor) -> list[Tensor]:
    """`value` of every rank, in rank order; first dimensions may differ."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    with _others_needed():
        dist.all_gather(lengths, torch.tensor([len(value)]))
    longest = max(int(n) for n in lengths)
    padded = torch.cat([value, value.new_zeros(longest - len(value), *value.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    with _others_needed():
        dist.all_gather(parts, padded)
    return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]


def _all_ranks(own: GMMStatistics) -> GMMStatistics:
    values = [own.count, own.sum_x, own.sum_xx, own.log_likelihood, own.squared_error, own.certainty]
    # Ranks may come to theirs by different products: memory order must be the same, as memory is what is added.
    values = [None if value is None else value.contiguous() for value in values]
    for value in values:
        if value is not None:
            with _others_needed():
                dist.all_reduce(value)
    return GMMStatistics(*values)  # type: ignore[arg-type]
