"""filesystem: paths and URIs lead to the file that their writer meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.files.filesystem import filesystem_of, uri_below


def test_file_uris_are_encoded_or_not(tmp_path: Path) -> None:
    for name in ("a b", "50%20"):
        (tmp_path / name).mkdir()
        for uri in ((tmp_path / name).as_uri(), f"file:{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
            assert filesystem_of(uri)[1] == str(tmp_path / name), uri


@pytest.mark.parametrize(
    ("location", "path", "expected"),
    [
        (
            "s3://bucket/in?region=eu-north-1",
            "bucket/in/dt=1/a b.parquet",
            "s3://bucket/in/dt%3D1/a%20b.parquet?region=eu-north-1",
        ),
        ("s3a://bucket/50%25/?region=eu-north-1", "bucket/50%/p%20q", "s3a://bucket/50%25/p%2520q?region=eu-north-1"),
        (
            "s3://bucket/one.parquet?region=eu-north-1",
            "bucket/one.parquet",
            "s3://bucket/one.parquet?region=eu-north-1",
        ),
        ("/data/a%20b", "/data/a%20b/c d", "/data/a%20b/c d"),
        ("file:///data/a%20b", "/data/a b/c%20d", "/data/a b/c%20d"),
    ],
)
def test_a_file_of_a_folder_has_an_address_of_its_own(location: str, path: str, expected: str) -> None:
    assert uri_below(location, path) == expected
    assert filesystem_of(expected)[1] == path
