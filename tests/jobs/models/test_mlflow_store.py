"""The MLflow store: made whole or not at all, usable after a move, refused in a sentence where it cannot be used."""

from __future__ import annotations

import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import mlflow
import pytest

from jobs.config import ConfigError
from jobs.errors import WarehouseError
from jobs.models import sqlite_store
from jobs.models.registry import Registry, open_registry, register
from jobs.models.versions import RegisteredVersion
from jobs.read_config import load_config

NAME = "semantic-id-codebook"
CODE = """
import mlflow
from pathlib import Path

class Echo(mlflow.pyfunc.PythonModel):
    _skip_type_hint_validation = True

    def load_context(self, context):
        self.text = Path(context.artifacts["artefact"], "prediction.txt").read_text()

    def predict(self, context, model_input, params=None):
        return self.text

mlflow.models.set_model(Echo())
"""


def registry_at(root: Path, uri: str = "", *, create: bool = True) -> Registry:
    return open_registry(
        load_config(overrides=[f"mlflow.tracking_uri={uri}"], warehouse=str(root)), str(root), create=create
    )


def register_champion(registry: Registry, scratch: Path, prediction: str) -> RegisteredVersion:
    """A champion that predicts `prediction`."""
    folder = scratch / "artefact"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prediction.txt").write_text(prediction)
    (scratch / "model.py").write_text(CODE)
    with registry.run("fit", load_config(), {}):
        model = register(registry, NAME, scratch / "model.py", folder, {})
    registry.codebooks.set_alias("champion", model.number)
    return model


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["plain", "q?m", "per%20cent a#b;[1]{é}:x'@"])
def test_a_moved_or_copied_warehouse_uses_its_own_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # a model that is loaded adds the code that it carries
    parent = tmp_path / "parent"
    root = parent / name
    root.mkdir(parents=True)
    register_champion(registry_at(root), tmp_path / "one", "first")
    assert "mlflow.db" in files(root)
    copy, moved = parent / f"{name} copy", parent / f"moved {name}"
    shutil.copytree(root, copy)
    before = files(root)
    second = register_champion(registry_at(copy), tmp_path / "two", "second")
    assert second.number == 2
    assert files(root) == before  # a copy writes nothing into the original
    root.rename(moved)
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    for folder, expected in ((copy, "second"), (moved, "first")):
        registry = registry_at(folder)
        mlflow.set_tracking_uri(registry.tracking_uri)
        # Of a local path with a % MLflow itself can load nothing, so there the artefacts go to another folder first.
        elsewhere = str(tmp_path / expected) if "%" in name else None
        assert mlflow.pyfunc.load_model(f"models:/{NAME}@champion", dst_path=elsewhere).predict([1]) == expected
        for run in registry.client.search_runs([registry.experiment_id]):
            assert mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/config.json")["load"]["item_id"] == "item_id"
    assert {path.name for path in parent.iterdir()} == {copy.name, moved.name}


def test_nothing_is_made_where_nothing_may_be_written(tmp_path: Path) -> None:
    for uri in ("", f"sqlite:///{tmp_path}/other.db"):
        registry = registry_at(tmp_path, uri, create=False)
        assert registry.codebooks.alias("champion") is None
        assert registry.codebooks.version(1) is None
        assert registry.codebooks.versions() == {}
    assert list(tmp_path.iterdir()) == []


FORKS = """
import os, signal, sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
import mlflow.store.model_registry.sqlalchemy_store
from jobs.read_config import load_config
from jobs.models.registry import open_registry

def start(root, uri=""):
    child = os.fork()
    if child == 0:
        try:
            open_registry(load_config(overrides=[f"mlflow.tracking_uri={uri}"], warehouse=str(root)), str(root))
        except BaseException as error:
            print(type(error), error, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def ends(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run_forks(code: str, folder: Path) -> str:
    output = subprocess.run(
        [sys.executable, "-c", FORKS + code, str(folder)], capture_output=True, text=True, check=False, timeout=300
    )
    assert output.returncode == 0, output.stdout + output.stderr
    return output.stdout


@pytest.mark.slow
def test_a_first_command_that_is_killed_leaves_no_half_made_store(tmp_path: Path) -> None:
    """Killed when the file that it makes has reached a size; the whole one has about 700 kB."""
    output = run_forks(
        """
for size in (0, 100_000, 300_000):
    root = Path(sys.argv[1]) / str(size)
    root.mkdir()
    child = start(root)
    while max([path.stat().st_size for path in root.rglob("*.db")], default=-1) <= size:
        pass
    os.kill(child, signal.SIGKILL)
    print("killed" if ends(child) == -signal.SIGKILL else "not killed")
    print("then", ends(start(root)), sorted(os.listdir(root)))
""",
        tmp_path,
    )
    assert output.splitlines() == ["killed", "then 0 ['mlflow.db']"] * 3


def test_two_first_commands_at_once_use_one_store(tmp_path: Path) -> None:
    output = run_forks(
        """
root = Path(sys.argv[1])
children = [start(root, f"sqlite:///{root}/shared.db") for _ in range(2)]
print([ends(child) for child in children], sorted(os.listdir(root)))
""",
        tmp_path,
    )
    assert output.strip() == "[0, 0] ['shared.db']"


def half_made(path: Path) -> None:
    """What MLflow leaves when it is killed: some of the first tables, no revision."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY, name TEXT)")
        database.execute("CREATE TABLE runs (run_uuid TEXT PRIMARY KEY)")
        database.commit()


def test_a_half_made_store_without_data_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "SETTLE_SECONDS", 0)
    half_made(tmp_path / "mlflow.db")
    assert registry_at(tmp_path).experiment_id == "1"
    (tmp_path / "empty.db").touch()
    assert registry_at(tmp_path, f"sqlite:///{tmp_path}/empty.db").experiment_id == "1"


def test_a_store_of_another_version_with_data_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "SETTLE_SECONDS", 0)
    path = tmp_path / "mlflow.db"
    half_made(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("INSERT INTO runs VALUES ('a')")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(WarehouseError, match=r"mlflow db upgrade 'sqlite:///.*mlflow\.db'"):
        registry_at(tmp_path)
    assert path.read_bytes() == before


def test_a_locked_store_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "LOCK_SECONDS", 0.2)
    registry_at(tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(WarehouseError, match=r"mlflow\.db is locked by another process"):
            registry_at(tmp_path)


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be one" * 100, None], ids=["garbage", "cut"]
)
def test_a_damaged_store_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    if content is None:
        registry_at(tmp_path)
        content = path.read_bytes()[:100_000]
        path.unlink()
    path.write_bytes(content)
    with pytest.raises(WarehouseError, match=r"mlflow\.db is damaged"):
        registry_at(tmp_path)
    with pytest.raises(WarehouseError, match=r"mlflow\.db is damaged"):
        registry_at(tmp_path, create=False)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("htp://mlflow:5000", "cannot use the tracking store htp://mlflow:5000"),
        ("http:/mlflow:5000", "names no server"),
        ("http://mlflow:50x", "is not a URI"),
        ("file:///tmp/mlruns", "cannot use the tracking store file:///tmp/mlruns"),
        ("mlruns", "cannot use the tracking store mlruns"),
        ("sqlite://tmp/x.db", "names no file"),
        ("sqlite:////no/such/folder/x.db", "folder /no/such/folder .* does not exist"),
        ("oracle://ann:hunter22@db/x", r"cannot use the tracking store oracle://\*\*\*@db/x"),
    ],
)
def test_a_uri_that_means_no_store_is_a_wrong_setting(uri: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        registry_at(tmp_path, uri)
    assert "\n" not in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_warehouse_on_an_object_store_needs_a_server() -> None:
    with pytest.raises(ConfigError, match=r"set mlflow\.tracking_uri"):
        open_registry(load_config(warehouse="s3a://bucket/w"), "s3a://bucket/w")


def test_a_server_that_is_down_is_named(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        uri = f"http://ann:hunter22@127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WarehouseError, match="does not answer") as caught:
            registry_at(tmp_path, uri)
    assert "hunter22" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
