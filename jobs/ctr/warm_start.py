"""A training that starts from an earlier model: what it takes over, and the bridge of tokens between two codebooks.

All parameters but the token table mean the same under every codebook: the vectors of item ids, the interest codebooks
and the layers. The tokens of a new codebook start so that an item is worth what its tokens of the earlier one gave.
Ours, not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import torch
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from torch import nn

from jobs.ctr.artefact import CtrModel, new_model
from jobs.ctr.batch import Items
from jobs.ctr.dmqn import DMQN, DMQNShape
from jobs.ctr.embedding import ItemEmbedding
from jobs.ctr.example_table import Examples
from jobs.ctr.examples import item_codes
from jobs.ctr.tokens import TokenScheme
from jobs.ctr.user_table import ModelInputs, code_arrays
from jobs.files.parquet import read_ahead, row_groups
from jobs.models.versions import CtrVersion

BATCH_ROWS = 2**16


@dataclass(frozen=True, eq=False)
class Champion:
    """The model that serves, or served under an earlier codebook."""

    version: CtrVersion
    ctr: CtrModel


@dataclass(frozen=True, eq=False)
class Start:
    """A model before its training; `version` is of the model whose parameters it has, None for random ones."""

    model: DMQN
    inputs: ModelInputs
    version: int | None = None


def random_start(inputs: ModelInputs, shape: DMQNShape, seed: int) -> Start:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Start(new_model(inputs, shape), inputs)


def why_not(start: Start, champion: Champion, examples: Examples) -> str | None:
    """Why a training on `examples` cannot start from the champion; None if it can.

    A champion that was trained on what is validation or test here would look better than it is.
    """
    previous, seen_until = champion.ctr, champion.version.result.get("validation_from")
    validation_from = examples.validation_from
    later = seen_until is not None and validation_from is not None and seen_until <= validation_from
    if not later and f"-{examples.key}-" not in champion.version.train_key:
        return "it may have been trained on what is validation or test here"
    if previous.inputs.scheme is None:
        return "it has no tokens"
    ours, theirs = (
        {"item_rows": inputs.item_rows, **asdict(model.shape)}
        for inputs, model in ((start.inputs, start.model), (previous.inputs, previous.model))
    )
    differing = [f"{name} is {ours[name]}, its own {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    return ", ".join(differing) or None


def take_over(model: DMQN, previous: DMQN, *, tokens: bool) -> None:
    """Give `model` the parameters and counts of a `previous` one of its shape, the token table only with `tokens`."""
    state = previous.state_dict()
    if not tokens:
        state["embed.token"] = model.state_dict()["embed.token"]
    model.load_state_dict(state)


@torch.no_grad()
def bridge_tokens(
    embed: nn.Module, previous: nn.Module, fields: Sequence[int], pairs: Iterable[tuple[Items, Items]]
) -> int:
    """Start the tokens of `embed` so that items are worth what their tokens in `previous` give together.

    Field by field, coarsest first: a token becomes the mean, by its weight, of what the tokens before it leave of the
    vectors of the items that carry it. The last field, the tuple of codes, takes what is left, so an item that shares
    it with no other keeps its vector exactly; of learned pieces only one whose whole tuple is a piece does. Tokens of
    no item stay as they are.

    Args:
        fields: Tokens of each field of `embed` (`TokenScheme.fields`).
        pairs: Re-iterable batches of the same items (N,), with their tokens in `previous` and in `embed`.

    Returns:
        The number of items.
    """
    assert isinstance(embed, ItemEmbedding)
    assert isinstance(previous, ItemEmbedding)
    begin = items = 0
    for size in fields:
        total = torch.zeros(embed.token.shape, dtype=torch.float64)
        weight = torch.zeros(len(total), dtype=torch.float64)
        items = 0
        for before, after in pairs:
            left = previous.sum_tokens(before.tokens, before.weights)
            if begin:
                left -= embed.sum_tokens(after.tokens[:, :begin], after.weights[:, :begin])
            rows, share = (part[:, begin : begin + size] for part in (after.tokens, after.weights.double()))
            total.index_add_(0, rows.flatten(), (share[..., None] * left[:, None]).flatten(0, 1))
            weight.index_add_(0, rows.flatten(), share.flatten())
            items += len(left)
        carried = weight > 0
        carried[0] = False  # padding
        embed.token[carried] = (total[carried] / weight[carried, None]).to(embed.token.dtype)
        begin += size
    return items


def code_pairs(previous: DataFrame, current: DataFrame) -> DataFrame:
    """The codes and weights of the items that both codebooks have given IDs; of rows of `semantic_ids`."""
    before = item_codes(previous).select(
        "item_id", F.col("codes").alias("previous_codes"), F.col("weights").alias("previous_weights")
    )
    both = before.join(item_codes(current), "item_id", how="inner")
    return both.select("previous_codes", "previous_weights", "codes", "weights")


@dataclass(frozen=True)
class TokenPairs:
    """The rows of `code_pairs` as tokens under two schemes, batch by batch, each time that it is iterated over."""

    uris: Sequence[str]  # of the files
    previous: TokenScheme
    current: TokenScheme

    def __iter__(self) -> Iterator[tuple[Items, Items]]:
        return read_ahead(self._batches())

    def _batches(self) -> Iterator[tuple[Items, Items]]:
        columns = ["previous_codes", "previous_weights", "codes", "weights"]
        for group in row_groups(self.uris):
            for batch in group.batches(columns, BATCH_ROWS):
                before = self._items(self.previous, batch["previous_codes"], batch["previous_weights"])
                yield before, self._items(self.current, batch["codes"], batch["weights"])

    @staticmethod
    def _items(scheme: TokenScheme, codes: pa.ListArray, weights: pa.ListArray) -> Items:
        arrays = code_arrays(codes, weights, scheme.levels, scheme.alternates)
        rows, weight = scheme.rows(*(torch.from_numpy(array) for array in arrays))
        return Items(torch.zeros(len(rows), dtype=torch.int64), rows, weight)
