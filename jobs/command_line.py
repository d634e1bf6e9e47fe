"""What the commands of `sid` and `python -m jobs` share: options, exit codes, opening a warehouse, printing."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, date, datetime
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from jobs import failures
from jobs.config import Config, ConfigError
from jobs.read_config import all_mistakes, load_config, parse_date

if TYPE_CHECKING:
    from jobs.models.registry import Registry
    from jobs.models.versions import CodebookVersion
    from jobs.warehouse.delta_spark import Warehouse

LONGEST_VERSION = 9  # digits; stores keep version numbers in 32 bits


# ---- options and commands ----


@dataclass(frozen=True)
class Options:
    """The options that commands share, each declared here once. `command` gives a command some of them."""

    config: Annotated[
        list[Path] | None, typer.Option("--config", help="TOML file; may be given again, later ones win.")
    ] = None
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One setting, section.key=value; may be given again.")
    ] = None
    warehouse: Annotated[str, typer.Option("--warehouse", help="Folder or URI under which every table lives.")] = ""
    run_date: Annotated[str, typer.Option("--date", help="Day of the run, YYYY-MM-DD (today in UTC by default).")] = ""
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the facts to this file.")] = None

    def resolve(self, *further_days: str) -> Config:
        """The configuration, after a check of the other options and of the days among a command's own options.

        Raises:
            ConfigError: every mistake in any of them.
        """
        days = [day for day in (self.run_date, *further_days) if day]
        config, *_ = all_mistakes(
            lambda: load_config(self.config or (), self.settings or (), warehouse=self.warehouse),
            *(lambda day=day: parse_date(day) for day in days),
            lambda: check_json_file(self.json_file),
        )
        assert isinstance(config, Config)
        return config


OF_A_RUN = tuple(option.name for option in fields(Options))
WITHOUT_DATE = tuple(name for name in OF_A_RUN if name != "run_date")


class CommandGroup(TyperGroup):
    """A group of commands. An exception in one becomes a sentence on standard error and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if hasattr(error, "exit_code"):  # typer's own: an exit code, or a usage error, which it prints itself
                _add_hint(error)
                raise
            if isinstance(error, SystemExit):
                raise
            sys.exit(failures.report(error, f"sid {ctx.invoked_subcommand or ''}".strip()))


def _add_hint(error: Any) -> None:
    """Add to the message of an unknown option how a command takes an argument, such as an id, that begins with `-`."""
    if not hasattr(error, "option_name") or error.ctx is None:
        return
    for argument in error.ctx.command.params:
        if argument.param_type_name == "argument":
            name = argument.name.upper()
            hint = f"a value of {name} that begins with '-' goes after '--': {error.ctx.command_path} -- -{name}"
            error.message = f"{error.format_message()}\n{hint[0].upper()}{hint[1:]}"


def command_group(help: str | None = None) -> typer.Typer:
    """An empty group, whose commands are added by `command`."""
    return typer.Typer(cls=CommandGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=help)


def command(group: typer.Typer, shared: tuple[str, ...] = OF_A_RUN) -> Callable[[Callable[..., None]], None]:
    """Register a function as a command of `group`.

    Its first parameter is an `Options`; its other parameters and the options in `shared` are those of the command line.
    """
    types = get_type_hints(Options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(option.name, kind, default=option.default, annotation=types[option.name])
        for option in fields(Options)
        if option.name in shared
    ]

    def register(function: Callable[..., None]) -> None:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @wraps(function)
        def with_options(**values: Any) -> None:
            chosen = Options(**{name: values.pop(name) for name in shared})
            function(chosen, **values)

        signature = inspect.Signature([p.replace(kind=kind) for p in own] + options)
        with_options.__signature__ = signature  # type: ignore[attr-defined]
        group.command()(with_options)

    return register


def check_json_file(file: Path | None) -> None:
    """Check that facts can be written there when the work is done.

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


def run_commands(group: typer.Typer) -> None:
    """Run the command of the command line; `sid`, `python -m jobs` and spark-submit all start here."""
    from jobs.identity import check_packages

    failures.keep_library_logs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a letter of an id shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        check_packages()
    except RuntimeError as error:
        sys.exit(failures.report(error))
    group()


# ---- what a command works on ----


@dataclass(frozen=True)
class Workspace:
    """What a command works with: settings, day, Spark on the warehouse, MLflow, folder of pictures."""

    config: Config
    run_date: date
    warehouse: Warehouse
    registry: Registry
    pictures: Path
    spark_seconds: float  # that Spark took to start


@contextmanager
def open_workspace(config: Config, run_date: str = "", *, write: bool = True) -> Iterator[Workspace]:
    """Open the warehouse for the duration of a command: lock first, then MLflow, then Spark.

    Without `write` nothing is created or changed: neither the folder of the warehouse nor a lock.
    """
    day = parse_date(run_date) if run_date else datetime.now(UTC).date()
    from jobs.models.registry import open_registry, warehouse_id
    from jobs.spark.session import spark_session
    from jobs.warehouse.delta_spark import Warehouse, clear_staging
    from jobs.warehouse.lock import writer_lock
    from jobs.warehouse.root import warehouse_root

    root = warehouse_root(config.warehouse, write=write)
    # For the lock: without the flags, which may hold credentials.
    name = " ".join(["sid", *sys.argv[1:2]])
    with failures.on_warehouse(root, write=write), writer_lock(root, name, day) if write else nullcontext():
        if write:
            clear_staging(root)
            warehouse_id(root)
        registry = open_registry(config, root, create=write)
        pictures = Path("pictures") if "://" in root else Path(root) / "pictures"
        with spark_session(config) as session:
            yield Workspace(config, day, Warehouse(session.spark, root), registry, pictures, session.start_seconds)


def restore_alias(registry: Registry, *, verify_files: bool = True) -> CodebookVersion | None:
    """Set the alias `champion` to the current release's codebook, with a line on standard error if it differed.

    Returns the champion, checked against the releases; None without one.
    """
    from jobs.models.champion import restore_champion

    champion, repair = restore_champion(registry, verify_files=verify_files)
    if repair:
        print_message(repair)
    return champion


def find_codebook(registry: Registry, name: str) -> CodebookVersion:
    """The codebook version that a number or an alias names.

    Raises:
        ConfigError: there is none.
    """
    from jobs.models.registry import CANDIDATE, CHAMPION

    number = version_number(name)
    if number is not None:
        codebook = registry.codebooks.version(number)
    else:
        codebook = registry.codebooks.with_alias(name) if name in (CANDIDATE, CHAMPION) else None
    if codebook is None:
        raise ConfigError(
            f"there is no codebook {name!r} in the registry; expected a version number, candidate or champion. See "
            "`sid status`"
        )
    return codebook


def version_number(name: str) -> int | None:
    """The version that a name such as `4` gives; None for anything else, such as an alias."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) <= LONGEST_VERSION else None


# ---- printing ----


def print_result(result: Any, json_file: Path | None = None) -> None:
    """Print a dataclass or a mapping as `key: value` lines, and write it as JSON where asked."""
    facts = _as_json(result)
    for key, value in facts.items():
        typer.echo(f"{key}: {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(facts, indent=2) + "\n")


def print_message(text: str) -> None:
    """Print a line for people on standard error."""
    typer.echo(f"sid: {text}", err=True)


def _as_json(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _as_json(item) for key, item in asdict(value).items()}
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, date | datetime | Path) else value
