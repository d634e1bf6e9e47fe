"""Backfill on real Spark, Delta and MLflow: the plan, a list of items, the rest, again."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse import ITEMS, SmallWarehouse

from jobs import encode
from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.models.versions import CodebookVersion
from jobs.warehouse.queries import Selection, plan
from jobs.warehouse.tables import SEMANTIC_IDS
from pipelines.backfill import listed_items
from pipelines.nightly import Night

DAY, NEXT = date(2026, 1, 1), date(2026, 1, 2)


@pytest.fixture
def without_ids(small: SmallWarehouse) -> SmallWarehouse:
    """Vectors and codebook version 1, but no semantic ID."""
    shutil.rmtree(small.root / SEMANTIC_IDS.name)
    return small


def codebook(small: SmallWarehouse) -> CodebookVersion:
    version = small.registry.codebooks.version(1)
    assert version is not None
    return version


def test_a_list_of_items_then_the_rest_then_nothing(without_ids: SmallWarehouse) -> None:
    small, model = without_ids, codebook(without_ids)

    def encoded(selection: Selection | None) -> int:
        return encode.run(small.config(), small.tables, small.registry, model, NEXT, selection).encoded

    wanted = [str(item) for item in range(0, 30, 3)]
    listed = Selection(pa.array([*wanted, "0", "never loaded"]))
    planned = plan(small.tables, model.number, listed)
    assert (planned.chosen, planned.with_id, planned.to_encode, planned.unknown) == (11, 0, 10, 1)
    assert planned.unknown_items == ("never loaded",)
    assert encoded(listed) == 10
    some = small.ids(1)
    assert set(some) == set(wanted)
    assert plan(small.tables, model.number, listed).with_id == 10

    planned = plan(small.tables, model.number, None)
    assert (planned.chosen, planned.with_id, planned.to_encode, planned.unknown) == (ITEMS, 10, ITEMS - 10, 0)
    assert encoded(None) == ITEMS - 10
    ids = small.ids(1)
    assert len({row["semantic_id"] for row in ids.values()}) == len(ids) == ITEMS
    assert {item: ids[item] for item in some} == some  # what was published first did not move
    assert plan(small.tables, model.number, None).to_encode == 0
    assert encoded(listed) == 0


def test_since_a_day_selects_what_is_new_or_changed(first: tuple[SmallWarehouse, Night]) -> None:
    small, _ = first
    for day, count in ((DAY, ITEMS), (NEXT, 0)):
        assert plan(small.tables, 1, Selection(since=day)).chosen == count


def test_lists_are_text_or_parquet(tmp_path: Path) -> None:
    text = tmp_path / "ids.txt"
    text.write_text("a\n\n  b \nc\r\n")
    assert listed_items(str(text)).to_pylist() == ["a", "b", "c"]
    pq.write_table(pa.table({"item_id": [1, 2, None]}), tmp_path / "ids.parquet")
    assert listed_items(str(tmp_path / "ids.parquet")).to_pylist() == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "does not exist"),
        ("absent.parquet", None, "does not exist"),
        ("empty.txt", b"\n \n", "names no item"),
        ("binary.txt", b"\xfe\xff\x00", "is not UTF-16 text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text"),
        ("empty.parquet", b"", r"empty\.parquet is empty"),
    ],
)
def test_a_bad_list_is_a_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ConfigError, SchemaError), match=message):
        listed_items(str(tmp_path / name))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_marks_and_line_ends_of_windows_are_no_part_of_an_id(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "ids.txt").write_bytes("i0003\r\n\u00e9t\u00e9\r\na\u2028b\r\n".encode(encoding))
    assert listed_items(str(tmp_path / "ids.txt")).to_pylist() == ["i0003", "\u00e9t\u00e9", "a\u2028b"]


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (pa.array([3.0, None, 4.0]), ["3", "4"]),
        (pa.array(["a", "b", None]).dictionary_encode(), ["a", "b"]),
        (pa.array([7], pa.decimal128(38, 0)), ["7"]),
    ],
)
def test_lists_in_parquet_hold_ids_of_any_kind(tmp_path: Path, column: pa.Array, ids: list[str]) -> None:
    pq.write_table(pa.table({"item_id": column}), tmp_path / "list")  # whatever its name
    assert listed_items(str(tmp_path / "list")).to_pylist() == ids


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([["a", "b"]]), r"item_id of .* has type list<item: string>; expected one"),
        (pa.array([DAY]), r"has type date32\[day\]; expected one integer or string a row"),
        (pa.array([3.5]), "names item 3.5; expected text in UTF-8 or whole numbers"),
        (pa.array([None], pa.string()), "names no item"),
    ],
)
def test_what_is_no_list_of_ids_is_a_sentence(tmp_path: Path, column: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"item_id": column}), tmp_path / "ids.parquet")
    with pytest.raises(ConfigError, match=message):
        listed_items(str(tmp_path / "ids.parquet"))


def test_a_list_without_item_ids_is_a_sentence(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "ids.parquet")
    with pytest.raises(ConfigError, match=r"has columns \['id'\]; expected item_id"):
        listed_items(str(tmp_path / "ids.parquet"))
