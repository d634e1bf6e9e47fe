"""sources: which files count and what they hold together; without Spark."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.config import ConfigError
from jobs.errors import SchemaError
from jobs.files.sources import Source, open_source


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def rows(source: Source, *columns: str, as_written: tuple[str, ...] = ()) -> list[tuple[Any, ...]]:
    names = list(columns) or source.schema.names
    return [tuple(row.values()) for batch in source.batches(names, 2, as_written) for row in batch.to_pylist()]


# ---- which files ----


@pytest.mark.parametrize(
    "name",
    [
        "_temporary/0/_temporary/attempt_0/part-0.parquet",
        "_staged.parquet",
        ".ipynb_checkpoints/part-0-checkpoint.parquet",
        "._part-0.parquet",
        ".part-0.parquet.crc",
        "day=1/.hidden/part-0.parquet",
        "part-9.parquet._COPYING_",
    ],
)
def test_what_spark_passes_over_is_not_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"not Parquet")
    (tmp_path / "_SUCCESS").touch()
    assert rows(open_source(str(tmp_path))) == [("a",)]


def test_only_names_below_the_source_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "_new" / ".x" / "part-0.parquet", item_id=["a"])
    assert rows(open_source(str(tmp_path / "_new" / ".x"))) == [("a",)]


def test_files_that_are_not_parquet_are_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    (tmp_path / "README.txt").write_text("how this was made")
    (tmp_path / "empty.csv").touch()
    source = open_source(str(tmp_path))
    assert rows(source) == [("a",)]
    assert source.note == "left out, not Parquet: README.txt, empty.csv"


def test_parquet_is_read_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path / "000000_0", item_id=["a"])
    write(tmp_path / "b.PARQUET", item_id=["b"])
    write(tmp_path / "c.parquet" / "part-0", item_id=["c"])  # a folder that looks like a file
    assert sorted(rows(open_source(str(tmp_path)))) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"part-1\.parquet is empty \(0 bytes\)"),
        (b"item_id,vector\n", r"part-1\.parquet is not a readable Parquet file"),
        (b"PAR1 cut off", r"part-1\.parquet is not a readable Parquet file"),
        (b"PAR1" + bytes(8) + b"PARE", "is an encrypted Parquet file"),
        (b"PAR1" + b"?" * 40 + (40).to_bytes(4, "little") + b"PAR1", r"part-1\.parquet is not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    (tmp_path / "part-1.parquet").write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_read_is_a_sentence(tmp_path: Path, exists: bool) -> None:
    where = tmp_path if exists else tmp_path / "nowhere"
    with pytest.raises(ConfigError, match="holds no Parquet file" if exists else "nowhere does not exist"):
        open_source(str(where))


STRANGE = [
    "a b",
    "a:b",
    "[ab]",
    "{a,b}",
    "100%",
    "per%20cent",
    "q?m",
    "a#b",
    "*",
    "gar\u00e7on",
    "back`tick",
    "\u65e5",
    "it's",
    "x:/y",
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_path_is_taken_as_it_is_written(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / name / "part-0.parquet", item_id=["a"])
    write(tmp_path / "a" / "part-0.parquet", item_id=["of another folder"])
    assert rows(open_source(str(tmp_path / name))) == [("a",)]
    assert rows(open_source(str(tmp_path / name / "part-0.parquet"))) == [("a",)]
    monkeypatch.chdir(tmp_path)
    assert rows(open_source(name)) == [("a",)]


@pytest.mark.parametrize("location", ["nonsense://x", "hdfs://nowhere.invalid/x", "s3://bucket/a b", "x\0y"])
def test_what_is_neither_path_nor_uri_is_a_sentence(location: str) -> None:
    with pytest.raises(ConfigError, match=r"is neither a path that exists nor a URI|cannot be read|does not exist"):
        open_source(location)


def test_the_fingerprint_is_of_names_sizes_and_times(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_source(str(tmp_path)).fingerprint

    write(tmp_path / "a" / "part-0.parquet", item_id=["a"])
    before = fingerprint()
    assert fingerprint() == before
    (tmp_path / "a").rename(tmp_path / "b")
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("part-1.parquet", "moved.parquet", r"part-1\.parquet is a link to .*moved\.parquet, which does not exist"),
        ("loop", ".", "loop is a link to a folder that it lies in"),
        ("loop", "..", "loop is a link to a folder that it lies in"),
    ],
)
def test_links_to_nothing_or_upwards_are_named(tmp_path: Path, name: str, target: str, message: str) -> None:
    write(tmp_path / "in" / "part-0.parquet", item_id=["a"])
    (tmp_path / "in" / name).symlink_to(tmp_path / "in" / target)
    with pytest.raises(SchemaError, match=message):
        open_source(str(tmp_path / "in"))


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "part-0.parquet", item_id=["a"])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "part-0.parquet").symlink_to(tmp_path / "elsewhere" / "part-0.parquet")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    assert rows(open_source(str(tmp_path / "in"))) == [("a",), ("a",)]


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, inside: bool) -> None:
    write(tmp_path / "in" / "part-0.parquet", item_id=["a"])
    pipe = tmp_path / "in" / "pipe.parquet"
    os.mkfifo(pipe)
    if inside:
        assert rows(open_source(str(pipe.parent))) == [("a",)]
    else:
        with pytest.raises(ConfigError, match=r"pipe\.parquet is neither a file nor a folder"):
            open_source(str(pipe))


def test_names_that_are_not_utf8_are_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    os.link(tmp_path / "part-0.parquet", os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    for location in (str(tmp_path), f"{tmp_path}/caf\udce9.parquet"):
        with pytest.raises(ConfigError, match="a name that is not UTF-8"):
            open_source(location)


# ---- other tables ----


def delta_log(folder: Path) -> None:
    (folder / "_delta_log").mkdir(parents=True)
    text = {"type": "struct", "fields": [{"name": "item_id", "type": "string", "nullable": True, "metadata": {}}]}
    metadata = {"id": "0", "format": {"provider": "parquet", "options": {}}, "schemaString": json.dumps(text)}
    actions = [
        {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
        {"metaData": {**metadata, "partitionColumns": [], "configuration": {}}},
    ]
    (folder / "_delta_log" / f"{0:020}.json").write_text("\n".join(map(json.dumps, actions)))


def test_a_delta_table_is_never_loose_files(tmp_path: Path) -> None:
    write(tmp_path / "table" / "part-0.parquet", item_id=["deleted"])
    delta_log(tmp_path / "table")
    source = open_source(str(tmp_path / "table"))
    assert (source.format, source.version, source.row_groups) == ("delta", 0, ())
    assert source.schema == pa.schema([("item_id", pa.string())])
    assert open_source(str(tmp_path / "table"), "delta") == source
    with pytest.raises(ConfigError, match=r"is a Delta table; .*Set load\.source_format to delta or auto"):
        open_source(str(tmp_path / "table"), "parquet", setting="load.source_format")
    with pytest.raises(ConfigError, match="part of the Delta table"):
        open_source(str(tmp_path / "table" / "part-0.parquet"))
    with pytest.raises(ConfigError, match="holds the Delta table table"):
        open_source(str(tmp_path))


def test_a_damaged_delta_log_is_a_sentence(tmp_path: Path) -> None:
    delta_log(tmp_path)
    (tmp_path / "_delta_log" / f"{0:020}.json").write_text("{")
    with pytest.raises(SchemaError, match="the log of the Delta table"):
        open_source(str(tmp_path))


def test_a_folder_that_is_no_delta_table_is_refused_as_one(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    with pytest.raises(ConfigError, match="is not a Delta table"):
        open_source(str(tmp_path), "delta")


@pytest.mark.parametrize(("name", "kind"), [("metadata/v1.metadata.json", "Iceberg"), (".hoodie/x", "Hudi")])
def test_tables_of_other_formats_are_refused(tmp_path: Path, name: str, kind: str) -> None:
    write(tmp_path / "data" / "part-0.parquet", item_id=["a"])
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"{kind} table"):
        open_source(str(tmp_path))


# ---- folders key=value ----


def test_folders_are_columns(tmp_path: Path) -> None:
    for folder in ("lang=de/n=1", "lang=a%20b/n=2", "lang=__HIVE_DEFAULT_PARTITION__/n=10", "_k=x/n=3"):
        if not folder.startswith("_"):
            write(tmp_path / folder / "part-0.parquet", item_id=[folder[:7]])
    source = open_source(str(tmp_path))
    assert source.schema.field("lang").type == pa.string()
    assert source.schema.field("n").type == pa.int64()
    assert sorted(rows(source, "n", "lang")) == [(1, "de"), (2, "a b"), (10, None)]


def test_a_task_reads_from_another_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "lang=de" / "part-0.parquet", x=[1])
    monkeypatch.chdir(tmp_path)
    source = open_source("in")
    reader, group = source.reader(["x", "lang"]), source.row_groups[0]
    monkeypatch.chdir("/")
    assert [batch.to_pylist() for batch in reader.batches(group.uri, group.index)] == [[{"x": 1, "lang": "de"}]]


def test_partition_ids_with_leading_zeros_stay_text(tmp_path: Path) -> None:
    for value in ("007", "8"):
        write(tmp_path / f"item_id={value}" / "p.parquet", x=[1])
    assert rows(open_source(str(tmp_path)), "item_id") == [("007",), ("8",)]


def test_underscored_keys_are_read(tmp_path: Path) -> None:
    write(tmp_path / "_day=1" / "p.parquet", x=[5])
    assert rows(open_source(str(tmp_path)), "_day", "x") == [(1, 5)]


def test_folders_of_different_keys_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a=1" / "p.parquet", x=[5])
    write(tmp_path / "q.parquet", x=[5])
    with pytest.raises(SchemaError, match="different keys"):
        open_source(str(tmp_path))


def test_of_daily_folders_the_newest_is_read_if_that_is_asked_for(tmp_path: Path) -> None:
    for day in (1, 3, 2):
        write(tmp_path / f"dt=2026-01-0{day}" / "part-0.parquet", x=[day])
    newest = open_source(str(tmp_path), snapshots="newest")
    assert rows(newest, "x") == [(3,)]
    assert newest.note == "snapshot dt=2026-01-03, the newest of 3 daily folders"
    assert rows(open_source(str(tmp_path)), "x") == [(1,), (2,), (3,)]


# ---- schemas ----


def both(tmp_path: Path, first: pa.Array, second: pa.Array) -> Source:
    write(tmp_path / "part-0.parquet", x=first)
    write(tmp_path / "part-1.parquet", x=second)
    return open_source(str(tmp_path))


F32, F64 = pa.list_(pa.float32()), pa.list_(pa.float64())


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (pa.array([[1.5]], F32), pa.array([[2.5]], F64), [[1.5], [2.5]]),
        (pa.array([[1.5]], pa.list_(pa.float16())), pa.array([[2.5]], pa.large_list(pa.float32())), [[1.5], [2.5]]),
        (pa.array([[1.5]], pa.list_(pa.float32(), 1)), pa.array([[2]], pa.list_(pa.int64())), [[1.5], [2.0]]),
        (pa.array([[Decimal("1.5")]]), pa.array([[2.5]], F32), [[1.5], [2.5]]),
        (pa.array([None], pa.null()), pa.array([[2.5]], F32), [None, [2.5]]),
        (pa.array([[]], pa.list_(pa.null())), pa.array([[2.5]], F32), [[], [2.5]]),
        (pa.array([None, None], pa.float64()), pa.array([[2.5]], F32), [None, None, [2.5]]),  # pandas, of NaN alone
        (pa.array([[2.5]], F32), pa.array([None], pa.float64()), [[2.5], None]),
        (pa.array([], pa.float64()), pa.array([[2.5]], F32), [[2.5]]),  # pandas, without rows
        (pa.array([[2.5]], F32), pa.array([], pa.string()), [[2.5]]),
        (pa.array([1], pa.int64()), pa.array(["a"]), ["1", "a"]),
        (pa.array([3.0]), pa.array(["a"]), ["3", "a"]),
        (pa.array([1], pa.int32()), pa.array([2.5]), [1.0, 2.5]),
        (pa.array(["a"]).dictionary_encode(), pa.array(["b"], pa.large_string()), ["a", "b"]),
        (pa.array([b"ab"], pa.binary(2)), pa.array([b"abc"], pa.large_binary()), [b"ab", b"abc"]),
    ],
)
def test_schemas_are_unified(tmp_path: Path, first: pa.Array, second: pa.Array, expected: list[Any]) -> None:
    assert [x for (x,) in rows(both(tmp_path, first, second))] == expected


def test_what_cannot_be_unified_names_both_files_and_types(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"'x' is list<item: float> in part-0\.parquet and string in part-1\.parquet"):
        both(tmp_path, pa.array([[1.0]], F32), pa.array(["a"]))


def test_a_column_that_a_file_lacks_is_null_there(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    write(tmp_path / "part-1.parquet", item_id=["b"], x=[[1.0]])
    source = open_source(str(tmp_path))
    assert rows(source) == [("a", None), ("b", [1.0])]
    assert source.lacking == {"x": (str(tmp_path / "part-0.parquet"),)}


def test_one_name_twice_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([["a"], ["b"]], names=["item_id", "item_id"]), tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=r"x\.parquet has two columns named 'item_id'"):
        open_source(str(tmp_path / "x.parquet"))


def test_one_name_in_two_spellings_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=["a"])
    write(tmp_path / "part-1.parquet", ITEM_ID=["b"])
    with pytest.raises(
        SchemaError, match=r"part-0\.parquet has a column 'item_id', part-1\.parquet a column 'ITEM_ID'"
    ):
        open_source(str(tmp_path))


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.uint8()])
@pytest.mark.parametrize("nulls", [[0], [1], [0, 2], [0, 1, 2], []])
def test_fixed_size_lists_with_null_rows(tmp_path: Path, kind: pa.DataType, nulls: list[int]) -> None:
    values: list[Any] = [None if n in nulls else [n, n + 1] for n in range(3)]
    path = write(tmp_path / "x.parquet", x=pa.array(values, pa.list_(kind, 2)))
    assert [x for (x,) in rows(open_source(str(path)))] == values


def test_arrays_of_duckdb_with_null_rows_are_named(tmp_path: Path) -> None:
    def copy(kind: str) -> Source:
        rows = f"SELECT CASE WHEN i = 1 THEN NULL ELSE [i, i + 1]::{kind} END AS x FROM range(3) t(i)"
        with duckdb.connect() as connection:
            connection.execute(f"COPY ({rows}) TO '{tmp_path / 'x.parquet'}' (FORMAT parquet)")
        return open_source(str(tmp_path / "x.parquet"))

    with pytest.raises(SchemaError, match=r"DuckDB writes arrays .* cast to FLOAT\[\]"):
        rows(copy("FLOAT[2]"))
    assert rows(copy("FLOAT[]")) == [([0.0, 1.0],), (None,), ([2.0, 3.0],)]


def test_names_with_dots_and_backticks_are_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "a.b": [2], "`": [3]}), tmp_path / "x.parquet")
    assert rows(open_source(str(tmp_path / "x.parquet")), "a", "a.b", "`") == [(1, 2, 3)]


def test_ids_keep_the_type_of_their_file(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", item_id=pa.array([2**53 + 1]))
    write(tmp_path / "part-1.parquet", item_id=pa.array([2.0, None]))
    source = open_source(str(tmp_path))
    assert rows(source, as_written=("item_id",)) == [(2**53 + 1,), (2.0,), (None,)]
