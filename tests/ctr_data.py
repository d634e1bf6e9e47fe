"""Events of users, rows of `ctr_examples` and CTR models, small and made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from jobs.ctr.artefact import CtrModel, new_model
from jobs.ctr.dmqn import DMQNShape
from jobs.ctr.examples import FEATURES, user_rows
from jobs.ctr.pieces import learn
from jobs.ctr.tokens import TokenKind, TokenScheme
from jobs.ctr.user_table import ModelInputs

LEVELS, ALTERNATES, COMPONENTS = 2, 2, 8


class Event(NamedTuple):
    """What a row of a log, or a sampled row, says; items are numbers, and those divisible by 5 have no semantic ID."""

    user: int
    ts: int
    item: int
    label: int
    logged: bool = True
    example: bool = True

    @property
    def split(self) -> str:
        return "test" if self.ts >= 8 else "validation" if self.ts >= 6 else "train"


def codes_of(item: int) -> list[int]:
    """LEVELS x ALTERNATES codes, level by level."""
    return [item % 8, (item + 1) % 8, item // 8 % 8, (item + 3) % 8] if item % 5 else []


def weights_of(item: int) -> list[int]:
    return [200, 55, 255, 0] if item % 5 else []


def events_batch(events: Sequence[Event]) -> pa.RecordBatch:
    """As `build_examples` gives them to `user_rows`: in order of user and ts. Counts of items are made up of the item's
    number.
    """
    events = sorted(events)
    return pa.RecordBatch.from_pydict(
        {
            "user_id": [f"u{event.user}" for event in events],
            "item_id": [f"i{event.item}" for event in events],
            "label": pa.array([event.label for event in events], pa.int32()),
            "ts": pa.array([event.ts for event in events], pa.int64()),
            "logged": [event.logged for event in events],
            "example": [event.example for event in events],
            "split": [event.split for event in events],
            "item_shown": pa.array([event.item for event in events], pa.int64()),
            "item_clicked": pa.array([event.item // 2 for event in events], pa.int64()),
            "shown": pa.array([event.item + 1 for event in events], pa.int32()),
            "codes": pa.array([codes_of(event.item) or None for event in events], pa.list_(pa.int32())),
            "weights": pa.array([weights_of(event.item) or None for event in events], pa.list_(pa.int16())),
        }
    )


def random_events(seed: int, users: int, longest: int, items: int = 40) -> list[Event]:
    """Users of 1 to `longest` events at moments 0 to 9."""
    g = np.random.default_rng(seed)
    return [
        Event(user, int(g.integers(10)), int(g.integers(items)), int(g.integers(2)))
        for user in range(users)
        for _ in range(int(g.integers(1, longest + 1)))
    ]


def scheme_of(kind: TokenKind, levels: int, components: int, alternates: int, rows: int, seed: int = 0) -> TokenScheme:
    """A token scheme; where it needs pieces these are learned from random codes, of which the low ones are likelier."""
    if kind != "pieces":
        return TokenScheme(kind, levels, components, alternates, rows)
    g = np.random.default_rng(seed)
    codes = torch.from_numpy((components * g.random((100, levels)) ** 2).astype(np.int64))
    pieces = learn(codes, torch.from_numpy(g.integers(1, 20, 100)), components, rows - 1)
    return TokenScheme(kind, levels, components, alternates, rows, pieces)


def ctr_model(seed: int = 0, history: int = 4) -> CtrModel:
    """Untrained; every input shows in its scores."""
    inputs = ModelInputs(TokenScheme("soft", LEVELS, COMPONENTS, ALTERNATES, 100), item_rows=50, history=history)
    torch.manual_seed(seed)
    model = new_model(inputs, DMQNShape(len(FEATURES), width=8, interest_codebooks=2, codewords=4)).eval()
    with torch.no_grad():
        for table in (model.embed.item, model.embed.token):
            table.mul_(50)
        model.interact.out.normal_()
    return CtrModel(model, inputs, "c" * 64, f"{seed}" * 64)


def users(seed: int = 0, count: int = 20) -> pa.Table:
    """Rows of user_id, behaviours, history_hash; some have more behaviours than a history of 4, some none."""
    rows = user_rows(events_batch(random_events(seed, users=count, longest=15)), history=4)
    table = pa.Table.from_batches([rows]).select(["user_id", "behaviours"])
    return table.append_column("history_hash", pa.array(np.arange(len(table)) * 11))
