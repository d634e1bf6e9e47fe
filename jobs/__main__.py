"""The stages as commands: `python -m jobs <stage>`, or `sid <stage>`.

On a laptop:   python -m jobs load --set load.source=vectors.parquet
On a cluster:  spark-submit --jars "$(python -m jobs.spark.engine)" infra/spark/submit.py load --config infra/conf/cluster.toml
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, date, datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs import failures
from jobs.config import Config, ConfigError
from jobs.read_config import all_mistakes, load_config, parse_date

ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", help="TOML file; may be given again, later ones win.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be given again.")
]
WarehouseDir = Annotated[str, typer.Option("--warehouse", help="Folder or URI under which every table lives.")]
RunDate = Annotated[str, typer.Option("--date", help="Day of the run, YYYY-MM-DD (today in UTC by default).")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the facts to this file.")]
Alias = Annotated[str, typer.Option("--codebook", help="Codebook version, or the alias candidate or champion.")]


class Commands(TyperGroup):
    """A group of commands, each of which ends in an exit code: what goes wrong in one is a sentence on standard error."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            # typer's own: an exit code, or a usage error, which it prints itself. Ids may begin with "-".
            if hasattr(error, "exit_code"):
                if (
                    ctx.invoked_subcommand == "explain"
                    and hasattr(error, "message")
                    and hasattr(error, "format_message")
                ):
                    error.message = (
                        f"{error.format_message()}\nAn item id that begins with '-' goes after '--': sid explain -- -ID"
                    )
                raise
            if isinstance(error, SystemExit):
                raise
            sys.exit(failures.report(error, f"sid {ctx.invoked_subcommand or ''}".strip()))


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def stages() -> None:
    """The stages of a night, one command each."""


@dataclass(frozen=True)
class Work:
    """What a command works with: settings, day, Spark on the warehouse, MLflow, folder of pictures."""

    config: Config
    run_date: date
    warehouse: Any
    registry: Any
    pictures: Path
    spark_seconds: float


def resolved(
    files: list[Path] | None,
    settings: list[str] | None,
    warehouse: str = "",
    *,
    days: tuple[str, ...] = (),
    json_file: Path | None = None,
) -> Config:
    """The configuration of a command, after a look at its other flags: days, and the file that its facts go to.

    Raises:
        ConfigError: every mistake in any of them.
    """
    config, *_ = all_mistakes(
        lambda: load_config(files or (), settings or (), warehouse=warehouse),
        *(lambda day=day: parse_date(day) for day in days if day),
        lambda: check_json_file(json_file),
    )
    assert isinstance(config, Config)
    return config


def check_json_file(file: Path | None) -> None:
    """Whether facts can be written there when the work is done.

    Raises:
        ConfigError: they cannot.
    """
    if file is None:
        return
    folder = file.resolve().parent
    if file.is_dir():
        raise ConfigError(f"--json {file} is a folder; expected the path of a file to write")
    if not folder.is_dir():
        raise ConfigError(
            f"--json {file}: there is no folder {folder}; expected one to write the file in. Make it first"
        )
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ConfigError(f"--json {file} cannot be written; expected a file or folder that this user may write")


@contextmanager
def opened(config: Config, run_date: str = "", *, write: bool = True) -> Iterator[Work]:
    """Everything a command needs, for as long as it runs: lock first, then MLflow, then Spark.

    Without `write` nothing is made or changed: neither the folder of the warehouse nor a lock.
    """
    day = parse_date(run_date) if run_date else datetime.now(UTC).date()
    from jobs.models.registry import open_registry, warehouse_id
    from jobs.spark.session import spark_session
    from jobs.warehouse.delta_spark import Warehouse, clear_staging
    from jobs.warehouse.lock import writer_lock
    from jobs.warehouse.root import warehouse_root

    root = warehouse_root(config.warehouse, write=write)
    with failures.on_warehouse(root, write=write), writer_lock(root, _command(), day) if write else nullcontext():
        if write:
            clear_staging(root)
            warehouse_id(root)
        registry = open_registry(config, root, create=write)
        pictures = Path("pictures") if "://" in root else Path(root) / "pictures"
        with spark_session(config) as session:
            yield Work(config, day, Warehouse(session.spark, root), registry, pictures, session.start_seconds)


def _command() -> str:
    """What runs, as a person would name it; without its flags, which may hold credentials."""
    return " ".join(["sid", *sys.argv[1:2]])


def tell(result: Any, json_file: Path | None = None) -> None:
    """Print a stage's result as `key: value` lines, and write it as JSON where asked."""
    facts = _plain(result)
    for key, value in facts.items():
        typer.echo(f"{key}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n")


def notice(text: str) -> None:
    """What a command put right before its work, for who reads its errors."""
    typer.echo(f"sid: {text}", err=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, date | datetime | Path) else value


LONGEST_VERSION = 9  # digits; stores keep version numbers in 32 bits


def version_number(name: str) -> int | None:
    """The version that a name such as `4` gives; None for an alias, and for what can be no version."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= LONGEST_VERSION else None


def codebook(registry: Any, name: str) -> Any:
    """The codebook version that a number or an alias names.

    Raises:
        ConfigError: there is none.
    """
    from jobs.models.registry import CANDIDATE, CHAMPION

    number = version_number(name)
    if number is not None:
        found = registry.codebooks.version(number)
    else:
        found = registry.codebooks.with_alias(name) if name in (CANDIDATE, CHAMPION) else None
    if found is None:
        raise ConfigError(
            f"there is no codebook {name!r} in the registry; expected a version number, candidate or champion. See `sid status`"
        )
    return found


def current_codebook(registry: Any, *, verify_files: bool = True) -> Any:
    """The champion, checked against the releases; says on standard error if its alias had to be put back."""
    from jobs.models.champion import restore_champion

    champion, repaired = restore_champion(registry, verify_files=verify_files)
    if repaired:
        notice(repaired)
    return champion


@app.command()
def load(
    config: ConfigFiles = None,
    settings: Settings = None,
    warehouse: WarehouseDir = "",
    run_date: RunDate = "",
    json_file: JsonFile = None,
) -> None:
    """Raw vectors -> item_embeddings, or rejected_embeddings with a reason."""
    from jobs import load as job

    with opened(resolved(config, settings, warehouse, days=(run_date,), json_file=json_file), run_date) as work:
        tell(job.run(work.config, work.warehouse, work.run_date), json_file)


@app.command()
def fit(
    config: ConfigFiles = None,
    settings: Settings = None,
    warehouse: WarehouseDir = "",
    run_date: RunDate = "",
    json_file: JsonFile = None,
) -> None:
    """item_embeddings -> a codebook, registered as candidate."""
    from jobs import fit as job

    with opened(resolved(config, settings, warehouse, days=(run_date,), json_file=json_file), run_date) as work:
        champion = current_codebook(work.registry)
        tell(job.run(work.config, work.warehouse, work.registry, work.run_date, work.pictures, champion), json_file)


@app.command()
def encode(
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", run_date: RunDate = "", json_file: JsonFile = None,
    name: Alias = "candidate",
) -> None:  # fmt: skip
    """item_embeddings + a codebook -> semantic_ids of that version."""
    from jobs import encode as job

    with opened(resolved(config, settings, warehouse, days=(run_date,), json_file=json_file), run_date) as work:
        current_codebook(work.registry)
        tell(
            job.run(work.config, work.warehouse, work.registry, codebook(work.registry, name), work.run_date), json_file
        )


@app.command()
def evaluate(
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", run_date: RunDate = "", json_file: JsonFile = None,
    name: Alias = "candidate",
) -> None:  # fmt: skip
    """semantic_ids of a version -> quality_reports with a verdict, and pictures."""
    from jobs import evaluate as job

    with opened(resolved(config, settings, warehouse, days=(run_date,), json_file=json_file), run_date) as work:
        champion = current_codebook(work.registry)
        model = codebook(work.registry, name)
        tell(
            job.run(work.config, work.warehouse, work.registry, model, champion, work.run_date, work.pictures),
            json_file,
        )


@app.command()
def train(
    config: ConfigFiles = None,
    settings: Settings = None,
    warehouse: WarehouseDir = "",
    run_date: RunDate = "",
    json_file: JsonFile = None,
) -> None:
    """Interactions + semantic_ids of the current release -> ctr_examples and the CTR model (DMQN)."""
    from jobs import train as job
    from jobs.warehouse.releases import current_release

    with opened(resolved(config, settings, warehouse, days=(run_date,), json_file=json_file), run_date) as work:
        log = job.check_interactions(work.config, work.warehouse)
        model = current_codebook(work.registry)
        release = current_release(work.warehouse.root)
        if release is None:
            raise ConfigError(
                "this warehouse has no release yet; expected one to train on. Run `sid nightly` or `sid promote` first"
            )
        tell(
            job.run(
                work.config,
                work.warehouse,
                work.registry,
                model,
                release.table_versions,
                work.run_date,
                work.pictures,
                typer.echo,
                log,
            ),
            json_file,
        )


def start(commands: typer.Typer) -> None:
    """Run the command of the command line; `sid`, `python -m jobs` and spark-submit all come through here."""
    from jobs.identity import check_packages

    failures.keep_library_logs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a letter of an id shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        check_packages()
    except RuntimeError as error:
        sys.exit(failures.report(error))
    commands()


if __name__ == "__main__":
    start(app)
