"""Learned pieces of semantic IDs (arXiv 2306.08121): which runs of codes are tokens of their own.

A piece is a run of codes of neighbouring levels, such as 87-3 at the levels 2 and 3; the same codes at other levels are
another piece. Each piece has a probability, and a segmentation of the codes of an item into pieces the product of
theirs. The tokens of an item are the pieces of its most probable segmentation. As in SentencePiece, pieces and
probabilities are those of a unigram language model of the codes of items, each counted as often as the item is seen: EM
over all 2^(L-1) segmentations of each tuple of codes, in turn with dropping the pieces that are missed least. Each
single code is always a piece, so every tuple has a segmentation. That pieces know their level is ours, and the prior
that keeps single codes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

import torch
from torch import Tensor

from jobs.ctr.hashing import codes_hash

MOST_LEVELS = 8  # of the paper; all 128 segmentations of a tuple are compared
EM_STEPS = 2  # after each time that pieces are dropped
KEPT = 0.75  # of the pieces of several codes, each time
PRIOR = 1.0  # times that each single code counts as seen, so that none has probability 0
NO_PIECE = -1e6  # as a log-probability
TUPLES_AT_ONCE = 2**14  # whose segmentations are in memory


@dataclass(frozen=True, eq=False)
class Pieces:
    """A vocabulary. Its pieces are numbered: first the single codes, level by level, then those of several codes.

    Attributes:
        components: K, number of different codes at a level.
        several: (P, L) int32, the pieces of several codes, -1 at levels outside of the run; in order of their hash.
        log_prob: (L * K + P,) float64, the log-probability of each piece.

    Raises:
        ValueError: these are no such pieces.
    """

    components: int
    several: Tensor
    log_prob: Tensor

    def __post_init__(self) -> None:
        if problem := levels_problem(self.levels):
            raise ValueError(problem)
        if self.log_prob.shape != (self.single + len(self.several),) or not self.log_prob.isfinite().all():
            raise ValueError(
                f"log_prob has shape {tuple(self.log_prob.shape)}; expected a finite number for each of "
                f"{self.single:,} single codes and {len(self.several):,} pieces of several codes"
            )
        inside = self.several >= 0
        starts = inside[:, :1].long().sum(1) + (inside[:, 1:] & ~inside[:, :-1]).sum(1)
        if not ((starts == 1) & (inside.sum(1) > 1) & (self.several < self.components).all(1)).all():
            raise ValueError(f"a piece is no run of at least two codes below {self.components}")
        if (self._keys[1:] <= self._keys[:-1]).any():
            raise ValueError("pieces are not in order of their hash, or one occurs twice")

    def __len__(self) -> int:
        return len(self.log_prob)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pieces) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def levels(self) -> int:
        """L"""
        return self.several.shape[1]

    @property
    def single(self) -> int:
        """Number of the pieces of a single code, L * K."""
        return self.levels * self.components

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content."""
        shape = f"{self.components} {tuple(self.several.shape)}"
        parts = (shape.encode(), self.several.numpy().tobytes(), self.log_prob.numpy().tobytes())
        return hashlib.sha256(b"\0".join(parts)).hexdigest()

    @cached_property
    def parts(self) -> Tensor:
        """(P, L) int64: of each piece of several codes the numbers of its single codes, -1 outside of the run."""
        single = self.several.long() + torch.arange(self.levels) * self.components
        return torch.where(self.several >= 0, single, -1)

    def segment(self, codes: Tensor) -> Tensor:
        """Codes (N, L) -> (N, L) int64: the number of the piece that begins at each level in the most probable
        segmentation, -1 where none begins. Fewer pieces win a tie.
        """
        runs, segmentations = self.runs(codes), _segmentations(self.levels)
        chosen = segmentations[(self._log_prob_of(runs) @ segmentations.T).argmax(1)] > 0  # (N, R)
        begins = torch.full(codes.shape, -1, dtype=torch.int64)
        for number, (first, _) in enumerate(_runs(self.levels)):
            begins[:, first] = torch.where(chosen[:, number], runs[:, number], begins[:, first])
        return begins

    def runs(self, codes: Tensor) -> Tensor:
        """Codes (N, L) -> (N, R) int64: of each of the R = L (L + 1) / 2 runs the number of its piece, -1 if it is
        none. A run with a code of -1 is none.
        """
        codes = codes.long()
        found = torch.full((len(codes), len(_runs(self.levels))), -1)
        for number, (first, last) in enumerate(_runs(self.levels)):
            if last - first == 1:
                own = codes[:, first] + first * self.components
            else:
                own = self._several(_outside_removed(codes, first, last))
            found[:, number] = torch.where((codes[:, first:last] >= 0).all(1), own, -1)
        return found

    def _log_prob_of(self, runs: Tensor) -> Tensor:
        """Runs (N, R) -> (N, R) float64"""
        return torch.where(runs >= 0, self.log_prob[runs.clamp_min(0)], NO_PIECE)

    def _several(self, run: Tensor) -> Tensor:
        """The numbers (N,) of pieces of several codes (N, L)."""
        if not len(self.several):
            return torch.full((len(run),), -1)
        place = torch.searchsorted(self._keys, codes_hash(run)).clamp_max(len(self.several) - 1)
        return torch.where((self.several[place] == run).all(1), self.single + place, -1)

    @cached_property
    def _keys(self) -> Tensor:
        return codes_hash(self.several)


def levels_problem(levels: int) -> str:
    """Why there are no pieces of codes of so many levels; empty where there are."""
    if 1 <= levels <= MOST_LEVELS:
        return ""
    return f"{levels} levels; learned pieces need 1 to {MOST_LEVELS}, as all segmentations are compared"


@cache
def _runs(levels: int) -> tuple[tuple[int, int], ...]:
    """The runs [first, last) of neighbouring levels, the single levels first."""
    return tuple((first, first + length) for length in range(1, levels + 1) for first in range(levels - length + 1))


@cache
def _segmentations(levels: int) -> Tensor:
    """(2^(L-1), R) float64: 1 for each run of a segmentation; those of fewer pieces first."""
    number = {run: index for index, run in enumerate(_runs(levels))}
    segmentations = torch.zeros(2 ** (levels - 1), len(number), dtype=torch.float64)
    for index in range(len(segmentations)):
        bounds = [0, *(level for level in range(1, levels) if index >> (level - 1) & 1), levels]
        for run in pairwise(bounds):
            segmentations[index, number[run]] = 1
    return segmentations[segmentations.sum(1).argsort(stable=True)]


def _outside_removed(codes: Tensor, first: int, last: int) -> Tensor:
    """Codes (N, L) with -1 outside of the levels [first, last)."""
    run = torch.full_like(codes, -1)
    run[:, first:last] = codes[:, first:last]
    return run


# ---- learning ----


def learn(codes: Tensor, counts: Tensor, components: int, size: int) -> Pieces:
    """The pieces of tuples of codes.

    The result depends on how often each tuple is seen only, not on the order of the rows or on their division.

    Args:
        codes: (N, L) integers below K.
        counts: (N,) integers, how often the items with these codes are seen.
        components: K.
        size: Pieces at most, single codes included.

    Raises:
        ValueError: the size has no room for the single codes, or a code or count is out of range.
    """
    levels = codes.shape[1]
    room = size - levels * components
    if room < 0:
        raise ValueError(f"{size:,} pieces; expected at least one for each of {levels} x {components} single codes")
    if ((codes < 0) | (codes >= components)).any() or (counts < 0).any():
        raise ValueError(f"codes or counts are out of range; expected codes of 0 to {components - 1}, counts from 0")
    codes, counts = _distinct(codes[counts > 0].int(), counts[counts > 0])
    several = _several_of(codes)
    log_prob = torch.zeros(levels * components + len(several), dtype=torch.float64)  # all are equally probable
    pieces = Pieces(components, several, log_prob)
    while True:
        runs = pieces.runs(codes)
        for _ in range(EM_STEPS):
            pieces, expected, _ = em_step(pieces, runs, counts)
        if len(pieces.several) <= room:
            return pieces
        pieces = _without_least_missed(pieces, expected, max(room, int(KEPT * len(pieces.several))))


def em_step(pieces: Pieces, runs: Tensor, counts: Tensor) -> tuple[Pieces, Tensor, float]:
    """One step of EM.

    Args:
        runs: (N, R) as `Pieces.runs` gives them for distinct tuples.
        counts: (N,), how often each is seen.

    Returns:
        The pieces with new probabilities; how often each was expected under the earlier ones; and the log-likelihood of
        these with the logarithm of their prior, which never falls from step to step.
    """
    segmentations = _segmentations(pieces.levels)
    expected = torch.zeros(len(pieces), dtype=torch.float64)
    objective = PRIOR * float(pieces.log_prob[: pieces.single].sum())
    for run, count in zip(runs.split(TUPLES_AT_ONCE), counts.double().split(TUPLES_AT_ONCE), strict=True):
        scores = pieces._log_prob_of(run) @ segmentations.T  # (n, 2^(L-1))
        evidence = scores.logsumexp(1)
        share = (scores - evidence[:, None]).exp() @ segmentations  # (n, R), the probability of each run
        known = run >= 0
        expected += torch.bincount(run[known], weights=(count[:, None] * share)[known], minlength=len(pieces))
        objective += float((count * evidence).sum())
    return _with_probabilities(pieces.components, pieces.several, expected), expected, objective


def _with_probabilities(components: int, several: Tensor, seen: Tensor) -> Pieces:
    """Pieces that were seen so often, (L * K + P,), and each single code PRIOR times more."""
    weight = seen.clone()
    weight[: len(seen) - len(several)] += PRIOR
    return Pieces(components, several, (weight / weight.sum()).log().clamp_min(NO_PIECE))


def _without_least_missed(pieces: Pieces, expected: Tensor, kept: int) -> Pieces:
    """The pieces without those of several codes whose absence costs least: all but `kept`.

    Absence costs the log-probability of a piece less that of its best segmentation into others, as often as it is
    expected. So a run that is hardly seen but inside longer pieces goes before these, as in SentencePiece.
    """
    runs, own = pieces.runs(pieces.several), torch.arange(pieces.single, len(pieces))
    log_prob = pieces._log_prob_of(torch.where(runs == own[:, None], -1, runs))
    log_prob[:, : pieces.levels][pieces.several < 0] = 0.0  # outside of the run there is nothing to segment
    instead = (log_prob @ _segmentations(pieces.levels).T).amax(1)
    cost = expected[own] * (pieces.log_prob[own] - instead)
    order = cost.argsort(descending=True, stable=True)[:kept].sort().values
    log_prob = torch.cat([pieces.log_prob[: pieces.single], pieces.log_prob[own][order]])
    return Pieces(pieces.components, pieces.several[order], log_prob)


def _distinct(codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each tuple once, in order, with the sum of its counts."""
    distinct, row = torch.unique(codes, dim=0, return_inverse=True)
    return distinct, torch.zeros(len(distinct), dtype=torch.int64).index_add(0, row, counts.long())


def _several_of(codes: Tensor) -> Tensor:
    """(P, L) int32: the runs of at least two codes of the tuples (N, L), each once, in order of their hash."""
    runs = [_outside_removed(codes, *run) for run in _runs(codes.shape[1]) if run[1] - run[0] > 1]
    several = torch.cat([torch.empty(0, codes.shape[1], dtype=codes.dtype), *runs])
    keys, order = codes_hash(several).sort(stable=True)
    first = torch.ones(len(keys), dtype=torch.bool)
    first[1:] = keys[1:] > keys[:-1]  # of two runs with one hash, of which there are hardly any, one is left out
    return several[order[first]].int()
