"""RQ-GMM (arXiv 2602.12593): one Gaussian mixture per level, each on the residuals that the levels above leave.

The frozen model: encode, decode, posteriors and likelihood. How one is fitted is in fitting.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tokenizer.alternates import Alternates, level_alternates, temperature_problem
from tokenizer.beam import beam_search, check_finite, path_log_weights
from tokenizer.errors import DataError
from tokenizer.gmm import DiagonalGMM
from tokenizer.greedy import ResidualPath, SphericalPath, SphericalTables
from tokenizer.kernels import argmax, exp_minus, parallel_map, pieces, top_k, values_at


@dataclass(frozen=True, eq=False)
class Assignment:
    """The codes of N rows and how certain they are.

    Attributes:
        codes: (N, L) int32.
        confidence: (N,), p(c | x) = prod_l p(c_l | x, c_1 .. c_l-1), each factor the responsibility of the component in
            its level's mixture of the residuals.
        log_likelihood: (N,), nats; log of the sum of p(x, c) over the codes of the last level, with the model of a row
            p(x, c) = prod_l pi_c_l * N(x | sum_l mu_c_l, var_c_L). That is the log-likelihood of the last residual
            under its level's mixture plus the log weights along the path, with one level the mixture's own, and never
            more than log p(x).
        alternates: the soft semantic IDs, where they were asked for.
    """

    codes: Tensor
    confidence: Tensor
    log_likelihood: Tensor
    alternates: Alternates | None = None


@dataclass(frozen=True, eq=False)
class RQGMM:
    """Levels of mixtures over one dimension with the same number of components.

    Encode keeps the `beam` most probable tuples of codes from level to level; 1 is one greedy pass. `temperatures`, one
    a level, soften the posteriors of soft semantic IDs; models of older codebooks have none, and their soft IDs are
    hard.
    """

    levels: tuple[DiagonalGMM, ...]
    beam: int = 1
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise DataError(f"beam is {self.beam}; expected at least 1, the greedy pass")
        shapes = {tuple(gmm.means.shape) for gmm in self.levels}
        if len(shapes) != 1:
            raise DataError(f"levels have shapes {sorted(shapes)}; expected one (K, D), and at least one level")
        if problem := temperature_problem(self.temperatures, self.n_levels):
            raise DataError(problem)

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
        return replace(self, levels=tuple(gmm.to(torch.device(device)) for gmm in self.levels))

    def encode(self, x: Tensor) -> Tensor:
        """codes (N, L) int32: at each level the most probable component of the residual; the lowest index wins a tie.

        With a beam, the most probable tuple among those kept to the end.
        """
        x = self._checked(x)
        return torch.cat(list(parallel_map(self._encode, pieces(x, self.components), x.device)))

    def assign(self, x: Tensor, codes: Tensor | None = None, *, alternates: int = 0) -> Assignment:
        """Codes with their confidence and likelihood; with `codes`, those of the given ones instead.

        With `alternates` also the soft semantic IDs of so many codes a level, along the path of the codes.
        """
        x = self._checked(x)
        if alternates < 0:
            raise DataError(f"alternates is {alternates}; expected 0 or more")
        if codes is None and self.beam > 1:
            codes = self.encode(x)
        rows = pieces(x, self.components)
        given = [None] * len(rows) if codes is None else torch.split(codes, max(1, len(rows[0])))
        work = zip(rows, given, [alternates] * len(rows), strict=True)
        columns = zip(*parallel_map(self._assign, work, x.device), strict=True)
        codes, confidence, log_likelihood, *soft = (torch.cat(column) for column in columns)
        return Assignment(codes, confidence, log_likelihood, Alternates(*soft) if alternates else None)

    def alternates(self, x: Tensor, codes: Tensor, top: int) -> Alternates:
        """The soft semantic IDs of rows x (N, D) along the path of `codes` (N, L), `top` codes a level."""
        found = self.assign(x, codes, alternates=top).alternates
        if found is None:
            raise DataError(f"top is {top}; expected at least 1")
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """(N, D) float32: the sum of the means of each row's components."""
        means = [gmm.means[codes[:, level].long()] for level, gmm in enumerate(self.levels)]
        return torch.stack(means).sum(0)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """(N,): see Assignment."""
        return self.assign(x).log_likelihood

    def posteriors(self, x: Tensor, top: int) -> list[tuple[Tensor, Tensor]]:
        """Per level the `top` most probable components (N, top) and their probabilities, along the greedy path."""
        residual = self._checked(x)
        result = []
        for gmm in self.levels:
            probability = gmm.responsibilities(residual)
            component = top_k(probability, min(top, gmm.components))
            result.append((component.int(), probability.gather(1, component)))
            residual = residual - gmm.means[component[:, 0]]
        return result

    def _encode(self, x: Tensor) -> Tensor:
        if self.beam > 1:
            return beam_search(self.levels, x, self.beam)
        path, codes, total = self._path(x), [], x.new_zeros(len(x))
        for _ in self.levels:
            scores = path.scores()
            code = argmax(scores)
            best = values_at(scores, code)
            total += best
            path.choose(code, best)
            codes.append(code)
        check_finite(total)
        return torch.stack(codes, dim=1).int()

    def _assign(self, piece: tuple[Tensor, Tensor | None, int]) -> tuple[Tensor, ...]:
        x, given, alternates = piece
        path, codes, log_posterior = self._path(x), [], x.new_zeros(len(x))
        soft: list[tuple[Tensor, Tensor]] = []
        for level in range(self.n_levels):
            if level == self.n_levels - 1:
                row_term = path.row_term()
            scores = path.scores()
            code = argmax(scores)
            best = chosen = values_at(scores, code)
            if given is not None:
                code = given[:, level].long()
                chosen = values_at(scores, code)
            if alternates:
                temperature = self.temperatures[level] if self.temperatures else None
                soft.append(level_alternates(scores, code, alternates, temperature))
            log_evidence = exp_minus(scores, best).sum(dim=1).log_().add_(best)  # (n,), without the row term
            log_posterior += chosen - log_evidence
            path.choose(code, chosen)
            codes.append(code)
        check_finite(log_posterior)
        result = torch.stack(codes, dim=1).int()
        log_likelihood = path_log_weights(self.levels, result[:, :-1]) + log_evidence + row_term
        stacked = (torch.stack(column, dim=1) for column in zip(*soft, strict=True))
        return result, log_posterior.exp().clamp(0, 1), log_likelihood, *stacked

    def _path(self, x: Tensor) -> ResidualPath | SphericalPath:
        tables = self._spherical_tables
        return ResidualPath(self.levels, x) if tables is None else SphericalPath(tables, x)

    @cached_property
    def _spherical_tables(self) -> SphericalTables | None:
        return SphericalTables(self.levels) if SphericalTables.exact_enough(self.levels) else None

    def _checked(self, x: Tensor) -> Tensor:
        """As float32, as fit takes it."""
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise DataError(
                f"embeddings have shape {tuple(x.shape)}; expected (N, {self.dim}), the dimension of this codebook"
            )
        return x.detach().float()
