"""Laws of the token schemes."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from ctr_data import scheme_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.batch import Items
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.tokens import TokenKind, TokenScheme
from tokenizer.alternates import FULL_WEIGHT

KINDS = get_args(TokenKind)
WITHOUT_PIECES = [kind for kind in KINDS if kind != "pieces"]


def items(n: int, levels: int, components: int, alternates: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, those of a level distinct, and weights (n, L, m) that add to 255 a level."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, levels, components, generator=g).argsort(-1)[:, :, :alternates]
    share = torch.rand(n, levels, alternates, generator=g)
    weights = (share / share.sum(-1, keepdim=True) * FULL_WEIGHT).long()
    weights[:, :, 0] += FULL_WEIGHT - weights.sum(-1)
    return codes, weights


def embedded(scheme: TokenScheme, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    table = torch.randn(scheme.table_rows, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rows, weight = scheme.rows(codes, weights)
    return (table[rows] * weight[..., None]).sum(1)


@settings(max_examples=40, deadline=None)
@given(
    levels=st.integers(1, 4),
    components=st.integers(4, 9),
    alternates=st.integers(1, 4),
    extra=st.integers(1, 50),
    seed=st.integers(0, 999),
)
def test_rows_lie_in_the_table_and_only_what_is_unknown_is_padding(
    levels: int, components: int, alternates: int, extra: int, seed: int
) -> None:
    codes, weights = items(20, levels, components, alternates, seed)
    codes[3] = -1
    codes[5, :, 1:] = -1  # an item with fewer alternates than others
    for kind in KINDS:
        scheme = scheme_of(kind, levels, components, alternates, levels * components + 1 + extra, seed)
        rows, weight = scheme.rows(codes, weights)
        assert rows.shape == weight.shape == (20, scheme.tokens)
        assert (rows.dtype, weight.dtype) == (torch.int64, torch.float32)
        assert int(rows.max()) < scheme.table_rows
        assert not rows[3].any()
        assert not weight[3].any()
        known = torch.ones(20, dtype=torch.bool)
        known[[3, 5]] = False
        if kind == "pieces":
            assert (rows[known] > 0).any(1).all()
            assert torch.equal((rows > 0).float(), weight)
        else:
            assert (rows[known] > 0).all()
        assert not weight[5][rows[5] == 0].any()


@settings(max_examples=20, deadline=None)
@given(levels=st.integers(1, 3), seed=st.integers(0, 999))
def test_soft_with_all_weight_on_the_own_code_is_hard(levels: int, seed: int) -> None:
    codes, _ = items(10, levels, 6, 3, seed)
    weights = torch.zeros_like(codes)
    weights[:, :, 0] = FULL_WEIGHT
    for soft, hard in (("soft", "level"), ("soft-prefix", "prefix")):
        one, other = (TokenScheme(kind, levels, 6, 3, 100) for kind in (soft, hard))
        torch.testing.assert_close(embedded(one, codes, weights), embedded(other, codes, weights))


def test_weights_of_a_level_add_to_one_and_hard_tokens_have_weight_one() -> None:
    codes, weights = items(30, 2, 6, 3, 0)
    for kind in WITHOUT_PIECES:
        scheme = TokenScheme(kind, 2, 6, 3, 100)
        _, weight = scheme.rows(codes, weights)
        torch.testing.assert_close(weight.sum(1), torch.full((30,), 2.0 if kind.endswith("prefix") else 3.0))
        if not kind.startswith("soft"):
            assert (weight == 1).all()


def test_what_a_token_depends_on() -> None:
    """Items that share the code of level 2 only share a level's token and no prefix's; likewise for level 1."""
    codes = torch.tensor([[1, 2], [3, 2], [1, 4]])[:, :, None]
    weights = torch.full_like(codes, FULL_WEIGHT)
    level, _ = TokenScheme("level", 2, 6, 1, 10_000).rows(codes, weights)
    assert (level[0] == level[1]).tolist() == [False, True, False]
    assert (level[0] == level[2]).tolist() == [True, False, False]
    prefix, _ = TokenScheme("prefix", 2, 6, 1, 10_000).rows(codes, weights)
    assert (prefix[0] == prefix[1]).tolist() == [False, False]
    assert (prefix[0] == prefix[2]).tolist() == [True, False]
    assert level[:, :1].tolist() == prefix[:, :1].tolist() == [[2], [4], [2]]


def test_hashed_tuples_collide_no_more_than_chance() -> None:
    """16,384 tuples of 2 x 128 in a table of 65,536: at random, 1 - exp(-1/4) of the rows are hit."""
    one, two = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    codes = torch.stack([one.flatten(), two.flatten()], 1)[:, :, None]
    rows, _ = TokenScheme("prefix", 2, 128, 1, 129 + 65_536).rows(codes, codes)
    hit = len(rows[:, 1].unique())
    assert abs(hit - 65_536 * (1 - 0.7788)) < 4 * 60  # one standard deviation is about 41 rows


def test_a_table_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 257 rows"):
        TokenScheme("soft", 2, 128, 8, 257)
    with pytest.raises(ValueError, match="expected both"):
        TokenScheme("level", 2, 128, 8, 1000).rows(torch.zeros(3, 2, 7), torch.zeros(3, 2, 7))


@settings(max_examples=20, deadline=None)
@given(levels=st.integers(1, 4), extra=st.integers(1, 40), seed=st.integers(0, 999))
def test_items_start_alike_whatever_their_segmentation(levels: int, extra: int, seed: int) -> None:
    """As the sum of the tokens of their codes, which have the rows that they have as tokens of levels."""
    codes, weights = items(20, levels, 6, 3, seed)
    scheme = scheme_of("pieces", levels, 6, 3, levels * 6 + 1 + extra, seed)
    embed = ItemEmbedding(1, scheme.table_rows, 4)
    embed.spread(scheme.level_rows, scheme.sums)
    single, _ = TokenScheme("level", levels, 6, 3, 1000).rows(codes, weights)
    expected = embed.token[single[:, :levels]].sum(1)
    torch.testing.assert_close(embed.sum_tokens(*scheme.rows(codes, weights)), expected)


def test_pieces_that_do_not_fit_are_refused() -> None:
    pieces = scheme_of("pieces", 2, 6, 3, 30).pieces
    assert pieces is not None
    assert len(pieces) == 29
    with pytest.raises(ValueError, match="'pieces' tokens without pieces"):
        TokenScheme("pieces", 2, 6, 3, 30)
    with pytest.raises(ValueError, match="'soft' tokens with pieces"):
        TokenScheme("soft", 2, 6, 3, 30, pieces)
    with pytest.raises(ValueError, match="29 pieces of 2 levels of 6 codes; expected 2 levels of 7 codes"):
        TokenScheme("pieces", 2, 7, 3, 30, pieces)
    with pytest.raises(ValueError, match="fewer pieces than the 29 rows"):
        TokenScheme("pieces", 2, 6, 3, 29, pieces)
    with pytest.raises(ValueError, match="9 levels; learned pieces need 1 to 8"):
        TokenScheme("pieces", 9, 6, 3, 1000)


def test_the_fields_of_an_item_add_to_its_vector() -> None:
    torch.manual_seed(0)
    embed = ItemEmbedding(10, 20, 4)
    items = Items(torch.randint(10, (2, 3)), torch.randint(20, (2, 3, 5)), torch.rand(2, 3, 5))
    fields = embed.fields(items, (2, 3))
    assert fields.shape == (2, 3, 3, 4)
    torch.testing.assert_close(fields.sum(2), embed(items))
