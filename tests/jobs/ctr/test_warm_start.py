"""Warm start: a model that takes over all parameters scores alike; the bridge of tokens against a slow loop."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ctr_data import ALTERNATES, COMPONENTS, LEVELS, ctr_model, scheme_of, users
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.ctr.artefact import CtrModel
from jobs.ctr.batch import Items
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.example_table import Examples
from jobs.ctr.interest_cache import newest_batch
from jobs.ctr.tokens import TokenKind, TokenScheme
from jobs.ctr.user_table import ModelInputs
from jobs.ctr.warm_start import Champion, TokenPairs, bridge_tokens, random_start, take_over, why_not
from jobs.models.versions import CtrVersion
from tokenizer.alternates import FULL_WEIGHT

WIDTH = 6


def some_codes(seed: int, items: int, scheme: TokenScheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and weights (items, L, m); the codes of a level differ, every tenth item has no codes."""
    g = np.random.default_rng(seed)
    shape = items, scheme.levels, scheme.alternates
    codes = np.array([[g.permutation(scheme.components)[: shape[2]] for _ in range(shape[1])] for _ in range(items)])
    weights = np.floor(g.dirichlet(np.ones(shape[2]), size=shape[:2]) * FULL_WEIGHT).astype(int)
    weights[..., 0] += FULL_WEIGHT - weights.sum(-1)
    codes[::10] = -1
    return torch.from_numpy(codes), torch.from_numpy(weights)


def items_of(scheme: TokenScheme, codes: tuple[torch.Tensor, torch.Tensor], rows: slice = slice(None)) -> Items:
    tokens, weights = scheme.rows(codes[0][rows], codes[1][rows])
    return Items(torch.zeros(len(tokens), dtype=torch.int64), tokens, weights)


def table(rows: int, seed: int) -> ItemEmbedding:
    torch.manual_seed(seed)
    embed = ItemEmbedding(5, rows, WIDTH)
    torch.nn.init.normal_(embed.token)
    with torch.no_grad():
        embed.token[0] = 0
    return embed


def vectors(embed: ItemEmbedding, items: Items) -> torch.Tensor:
    return embed.sum_tokens(items.tokens, items.weights).detach()


@settings(max_examples=20, deadline=None)
@given(
    kinds=st.tuples(*[st.sampled_from(["level", "soft", "prefix", "soft-prefix", "pieces"])] * 2),
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 50),
)
def test_the_bridge_is_the_mean_of_what_coarser_tokens_leave(
    kinds: tuple[TokenKind, TokenKind], seed: int, batch: int
) -> None:
    old, new = scheme_of(kinds[0], 2, 5, 2, 40), scheme_of(kinds[1], 3, 4, 3, 300)
    before, after = some_codes(seed, 50, old), some_codes(seed + 1, 50, new)
    previous, embed = table(40, seed), table(300, seed + 1)
    expected = embed.token.detach().double().numpy().copy()
    left = vectors(previous, items_of(old, before)).double().numpy()
    tokens, weights = (part.numpy() for part in new.rows(*after))
    begin = 0
    for size in new.fields:
        field = slice(begin, begin + size)
        for row in np.unique(tokens[:, field]):
            carries = (tokens[:, field] == row) * weights[:, field]  # (items, size)
            if row and carries.sum():
                expected[row] = (carries.sum(1)[:, None] * left).sum(0) / carries.sum()
        left = left - (weights[:, field, None] * expected[tokens[:, field]]).sum(1)
        begin += size
    pairs = [
        (items_of(old, before, rows), items_of(new, after, rows))
        for rows in (slice(start, start + batch) for start in range(0, 50, batch))
    ]
    assert bridge_tokens(embed, previous, new.fields, pairs) == 50
    np.testing.assert_allclose(embed.token.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["level", "soft", "prefix"])
def test_an_item_with_a_tuple_of_its_own_keeps_its_vector(kind: TokenKind) -> None:
    """And what no item carries keeps its start, as does padding."""
    old, new = TokenScheme("soft", 2, 5, 2, 64), TokenScheme(kind, 2, 6, 3, 20_000)
    grid = torch.cartesian_prod(torch.arange(5), torch.arange(6))  # the last code of each level is carried by none
    codes = torch.stack([grid, (grid + 1) % 5, (grid + 2) % 5], dim=2)[grid[:, 1] < 5]
    weights = torch.tensor([200, 55, 0]).expand_as(codes)
    before, after = some_codes(1, len(codes), old), (codes, weights)
    previous, embed = table(64, 1), table(20_000, 2)
    start = embed.token.detach().clone()
    bridge_tokens(embed, previous, new.fields, [(items_of(old, before), items_of(new, after))])
    torch.testing.assert_close(vectors(embed, items_of(new, after)), vectors(previous, items_of(old, before)))
    unused = torch.ones(20_000, dtype=torch.bool)
    unused[items_of(new, after).tokens[items_of(new, after).weights > 0]] = False
    assert unused[[0, new.level_rows[0].stop - 1]].all()
    assert torch.equal(embed.token[unused], start[unused])


def test_pairs_are_read_from_files_with_items_that_lack_codes(tmp_path: Path) -> None:
    old, new = TokenScheme("soft", 2, 5, 3, 40), TokenScheme("soft", 2, 4, 2, 40)
    codes: list[list[int]] = [
        [1, 2, 3, 0],
        [4, 0, 2, 1],
        [],
        [0, 1, 1, 2],
    ]  # two alternates a level, the scheme reads 3
    weights = [[200, 55, 255, 0] if row else [] for row in codes]
    schema = pa.schema(
        [(name, pa.list_(pa.int32())) for name in ("previous_codes", "previous_weights", "codes", "weights")]
    )
    columns = [codes, weights, codes[::-1], weights[::-1]]
    pq.write_table(
        pa.Table.from_arrays([pa.array(c, pa.list_(pa.int32())) for c in columns], schema=schema),
        tmp_path / "0.parquet",
    )
    ((before, after),) = TokenPairs([str(tmp_path / "0.parquet")], old, new)
    assert before.tokens[0, :6].tolist() == [2, 3, 0, 9, 6, 0]
    assert before.weights[2].sum() == after.weights[1].sum() == 0
    assert after.tokens[3, :4].tolist() == [2, 3, 8, 5]


# ---- what is taken over ----


def test_a_model_that_takes_all_over_scores_alike() -> None:
    previous = ctr_model(1)
    start = random_start(previous.inputs, previous.model.shape, seed=5)
    own = start.model.embed.token.detach().clone()  # type: ignore[union-attr, operator]
    batch = newest_batch(previous, users())
    take_over(start.model, previous.model, tokens=False)
    assert torch.equal(start.model.embed.token, own)  # type: ignore[arg-type]
    assert not torch.equal(start.model.eval()(batch), previous.model(batch))
    take_over(start.model, previous.model, tokens=True)
    assert torch.equal(start.model(batch), previous.model(batch))


def version(train_key: str, validation_from: int | None) -> CtrVersion:
    return CtrVersion(
        number=3,
        codebook_hash="c" * 64,
        codebook_version=1,
        train_key=train_key,
        passed=True,
        judged_at=datetime(2026, 1, 1, tzinfo=UTC),
        started_from=None,
        table_versions={},
        run_date=date(2026, 1, 1),
        result={"validation_from": validation_from},
        name="dmqn-ctr",
        run_id="",
    )


def reason(
    previous: CtrModel,
    *,
    item_rows: int = 50,
    width: int = 8,
    seen: tuple[str, int | None] = ("3-ids-5-log-settings-key", 100),
    validation_from: int | None = 100,
    key: str = "5-other-settings",
) -> str | None:
    inputs = ModelInputs(TokenScheme("prefix", LEVELS + 1, COMPONENTS, ALTERNATES, 900), item_rows, history=9)
    start = random_start(inputs, replace(previous.model.shape, width=width), seed=0)
    return why_not(start, Champion(version(*seen), previous), Examples(1, key, (), {}, validation_from))


def test_another_shape_starts_anew_and_another_codebook_does_not() -> None:
    """Levels, kinds of token, rows of their table and lengths of histories may differ."""
    assert reason(ctr_model()) is None
    assert reason(ctr_model(), width=16, item_rows=60) == "item_rows is 60, its own 50, width is 16, its own 8"


@pytest.mark.parametrize(
    ("seen", "validation_from", "key", "usable"),
    [
        (("3-ids-5-log-settings-key", 99), 100, "5-other", True),  # the log has grown
        (("3-ids-5-log-settings-key", 101), 100, "5-other", False),  # it has been trained on what is validation here
        (("3-ids-5-log-settings-key", None), None, "5-other", False),  # only the order of a user's rows is known
        (("3-ids-5-log-settings-key", None), None, "5-log-settings", True),  # the same log
        (("", None), 100, "5-other", False),  # of an earlier release of this software
    ],
)
def test_a_model_that_may_have_seen_the_test_is_not_started_from(
    seen: tuple[str, int | None], validation_from: int | None, key: str, usable: bool
) -> None:
    answer = reason(ctr_model(), seen=seen, validation_from=validation_from, key=key)
    assert (answer is None) == usable
    assert usable or answer == "it may have been trained on what is validation or test here"
