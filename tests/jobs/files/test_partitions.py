"""partitions: of daily folders the newest, under each folder above them."""

from __future__ import annotations

import pytest

from jobs.files.partitions import newest_snapshot, partition_of


@pytest.mark.parametrize(
    ("folders", "newest", "note"),
    [
        (["d=20251231", "d=20260101"], ["d=20260101"], "snapshot d=20260101"),
        (["y=1/dt=2026-01-01", "y=1/dt=2026-01-02"], ["y=1/dt=2026-01-02"], "snapshot dt=2026-01-02"),
        (
            ["year=2026/month=2/day=9", "year=2026/month=2/day=10"],
            ["year=2026/month=2/day=10"],
            "snapshot year=2026/month=2/day=10",
        ),
        (
            ["dt=2026-01-01/b=0", "dt=2026-01-02/b=0", "dt=2026-01-02/b=1"],
            ["dt=2026-01-02/b=0", "dt=2026-01-02/b=1"],
            "snapshot dt=2026-01-02",
        ),
        (
            ["r=eu/dt=2026-01-01", "r=eu/dt=2026-01-02", "r=us/dt=2026-01-01"],
            ["r=eu/dt=2026-01-02", "r=us/dt=2026-01-01"],
            "snapshot dt=2026-01-01, dt=2026-01-02",
        ),
    ],
)
def test_the_newest_day_is_chosen_under_each_folder_above(folders: list[str], newest: list[str], note: str) -> None:
    partitions = {folder: partition_of(f"{folder}/part-0.parquet") for folder in folders}
    assert newest_snapshot(partitions, "newest") == (set(newest), f"{note}, the newest of 2 daily folders")
    chosen, note_of_all = newest_snapshot(partitions, "all")
    assert chosen == set(folders)
    assert note_of_all.startswith("all 2 daily folders, ")


@pytest.mark.parametrize(
    "folders",
    [
        ["dt=2026-01-01"],
        ["dt=2026-01-01", "dt=unknown"],
        ["dt=20260101", "dt=20261399"],
        ["bucket=1", "bucket=2"],
        ["from=20260101/to=20260102", "from=20260103/to=20260104"],
        ["", ""],
    ],
)
def test_folders_that_are_not_daily_are_all_read(folders: list[str]) -> None:
    partitions = {folder: partition_of(f"{folder}/part-0.parquet") for folder in folders}
    assert newest_snapshot(partitions, "newest") == (set(folders), "")
