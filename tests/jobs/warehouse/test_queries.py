"""When the likelihood of new items calls for a refit: which rows count as new."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from jobs.warehouse.delta_spark import Warehouse
from jobs.warehouse.queries import likelihood_drop
from jobs.warehouse.tables import ITEM_EMBEDDINGS, SEMANTIC_IDS

BEFORE, TONIGHT = date(2026, 1, 1), date(2026, 1, 2)


def write(warehouse: Warehouse, rows: list[dict[str, Any]]) -> None:
    """`count` items of each kind, with the days first seen, changed and encoded, and the likelihoods of their IDs."""
    items, ids = [], []
    for number, row in enumerate(kind for kind in rows for _ in range(kind["count"])):
        item = {"item_id": str(number), "content_hash": "h", "codes": [0, 0]}
        items.append(
            {
                **item,
                "embedding": bytes(4),
                "dim": 1,
                "modalities": ["text"],
                "first_seen": row["seen"],
                "run_date": row["changed"],
            }
        )
        likelihoods = row["likelihoods"]
        ids.append(
            {
                **item,
                "codebook_version": row.get("version", 1),
                "suffix": number,
                "semantic_id": str(number),
                "confidence": 1.0,
                "log_likelihood": likelihoods[number % len(likelihoods)],
                "codebook_hash": "x",
                "held": row.get("held", False),
                "alternates": None,
                "squared_error": 0.5,
                "run_date": row["encoded"],
            }
        )
    warehouse.append(ITEM_EMBEDDINGS, warehouse.rows(ITEM_EMBEDDINGS, items))
    warehouse.append(SEMANTIC_IDS, warehouse.rows(SEMANTIC_IDS, ids))


def test_only_items_that_came_tonight_are_new(warehouse: Warehouse) -> None:
    far = {"likelihoods": [-1000.0]}
    old = {
        "count": 40,
        "seen": BEFORE,
        "changed": BEFORE,
        "encoded": BEFORE,
        "likelihoods": [-1.0, 1.0],
    }  # mean 0, deviation 1
    new = {"count": 40, "seen": TONIGHT, "changed": TONIGHT, "encoded": TONIGHT, "likelihoods": [-3.0]}
    changed = {**new, **far, "seen": BEFORE}
    write(
        warehouse,
        [old, new, changed, {**changed, "held": True}, {**old, **far, "held": True}, {**new, **far, "version": 2}],
    )
    assert likelihood_drop(warehouse, 1, TONIGHT) == pytest.approx(3.0)
    assert likelihood_drop(warehouse, 1, date(2026, 1, 3)) is None  # nothing came on that day


def test_few_new_items_say_nothing(warehouse: Warehouse) -> None:
    old = {"count": 40, "seen": BEFORE, "changed": BEFORE, "encoded": BEFORE, "likelihoods": [-1.0, 1.0]}
    changed = {**old, "changed": TONIGHT, "encoded": TONIGHT}
    new = {**old, "count": 29, "seen": TONIGHT, "changed": TONIGHT, "encoded": TONIGHT}
    write(warehouse, [old, changed, new])
    assert likelihood_drop(warehouse, 1, TONIGHT) is None
