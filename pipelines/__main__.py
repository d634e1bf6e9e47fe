"""`sid`: the stages, and what is made of them: demo, nightly, promote, rollback, register, backfill, status, explain, bench.

Exit codes: 0 done or nothing to do · 2 wrong settings · 3 the gate did not pass · 4 wrong data or tables ·
5 the machine or the warehouse cannot be used, or a fault of the program · 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs import failures
from jobs.__main__ import (
    Commands,
    ConfigFiles,
    JsonFile,
    RunDate,
    Settings,
    WarehouseDir,
    codebook,
    current_codebook,
    notice,
    opened,
    resolved,
    start,
    tell,
    version_number,
)
from jobs.__main__ import (
    app as stages,
)
from jobs.config import Config, ConfigError
from jobs.failure_rules import GATE_DID_NOT_PASS, WRONG_DATA
from jobs.read_config import parse_date

DEMO_WAREHOUSE = "warehouse/demo"

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Semantic IDs for ranking: load, fit, encode, evaluate, promote, train.",
)
app.registered_commands += stages.registered_commands


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="Folder with embeddings.parquet and, to train, interactions.parquet. Generated data by default.")] = None,
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", run_date: RunDate = "", json_file: JsonFile = None,
) -> None:  # fmt: skip
    """A whole night, on generated data or on a folder of yours, and a summary to judge it by."""
    name = data.resolve().name if data else ""
    where = warehouse or (f"{DEMO_WAREHOUSE}-{name}" if name else DEMO_WAREHOUSE)
    resolved(config, settings, where, days=(run_date,), json_file=json_file)
    expected = ""
    if data is None:
        from jobs.demo_data import EXPECTED_LIFT, write_demo_data
        from jobs.warehouse.root import warehouse_root

        data = Path(warehouse_root(where)) / "demo_data"
        if not (data / "interactions.parquet").exists():
            typer.echo("writing generated items, vectors and clicks", err=True)
            write_demo_data(data)
        expected = EXPECTED_LIFT
    if not (data / "embeddings.parquet").exists():
        raise ConfigError(f"{data} has no embeddings.parquet; expected the folder format of the README")
    interactions = data / "interactions.parquet"
    sources = [
        f"load.source={data / 'embeddings.parquet'}",
        *([f"train.interactions={interactions}"] if interactions.exists() else []),
    ]
    _night(resolved(config, [*sources, *(settings or [])], where), run_date, json_file, where, expected)


@app.command()
def nightly(
    config: ConfigFiles = None,
    settings: Settings = None,
    warehouse: WarehouseDir = "",
    run_date: RunDate = "",
    json_file: JsonFile = None,
) -> None:
    """The night of a date: encodes what changed, refits when due, gates, promotes, trains."""
    chosen = resolved(config, settings, warehouse, days=(run_date,), json_file=json_file)
    _night(chosen, run_date, json_file, chosen.warehouse, "")


def _night(config: Config, run_date: str, json_file: Path | None, shown: str, expected: str) -> None:
    from pipelines.nightly import run
    from pipelines.report import Terminal, facts, print_summary, write_json

    began = time.monotonic()
    terminal = Terminal()
    terminal.done("start", "Spark and MLflow")
    with opened(config, run_date) as work:
        pictures = Path(shown) / "pictures" if "://" not in shown else work.pictures
        night = run(work.config, work.warehouse, work.registry, work.run_date, work.pictures, terminal)
        seconds = time.monotonic() - began
    if json_file is not None:
        write_json(json_file, facts(night, shown, pictures, seconds))
    print_summary(night, shown, pictures, seconds, work.spark_seconds, expected=expected)
    flags = f" --warehouse {shlex.quote(shown)}" if shown != "warehouse" else ""
    typer.echo(f"\nTry next: sid status{flags} · sid explain ITEM_ID{flags}")
    if night.gate_message is not None:
        typer.echo(f"gate: {night.gate_message}", err=True)
        raise typer.Exit(GATE_DID_NOT_PASS)


@app.command()
def promote(
    version: Annotated[str, typer.Argument(help="Codebook version; the candidate by default.")] = "candidate",
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Move the champion to a version whose verdict passed, and write the release."""
    from jobs.warehouse.reports import report
    from pipelines.promote import promote as move

    with opened(resolved(config, settings, warehouse, json_file=json_file)) as work:
        current_codebook(work.registry, verify_files=False)
        model = codebook(work.registry, version)
        verdict = report(work.warehouse.root, model.number)
        if verdict is None:
            raise ConfigError(
                f"codebook version {model.number} has no quality report; expected one. Run `sid evaluate --codebook {model.number}`"
            )
        done = move(work.warehouse, work.registry, model, verdict, again=version_number(version) is not None)
        tell({**asdict(done.release), "nothing_to_do": done.nothing_to_do}, json_file)


@app.command()
def rollback(
    to: Annotated[int | None, typer.Option("--to", min=1, help="Release to go back to; by default the newest of another codebook.")] = None,
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Make an earlier release the current one again: its codebook the champion, its tables those that readers follow."""
    from jobs.models.champion import own_versions
    from pipelines.promote import rollback as move

    with opened(resolved(config, settings, warehouse, json_file=json_file)) as work:
        own_versions(work.registry)
        done = move(work.warehouse, work.registry, to)
        release = {
            name: value for name, value in asdict(done.release).items() if name not in ("previous", "status", "at")
        }
        tell({**release, **{name: value for name, value in asdict(done).items() if name != "release"}}, json_file)


@app.command()
def register(
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", json_file: JsonFile = None
) -> None:
    """Register the codebooks of this warehouse anew, under their numbers, where the MLflow registry that had them is lost."""
    from pipelines.register import register as anew

    with opened(resolved(config, settings, warehouse, json_file=json_file)) as work:
        tell(anew(work.config, work.registry, notice), json_file)


@app.command()
def backfill(
    name: Annotated[str, typer.Option("--codebook", help="Codebook version, or the alias candidate or champion.")],
    items: Annotated[str, typer.Option("--items", help="Parquet with a column item_id, or text with one id a line.")] = "",
    since: Annotated[str, typer.Option("--since", help="Items new or changed on this day or later, YYYY-MM-DD.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every item.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", run_date: RunDate = "", json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Semantic IDs of a codebook version for a list of items, for what changed since a day, or for all; says first what it will do."""
    from jobs import encode
    from jobs.models.champion import current_champion
    from jobs.warehouse.queries import Selection
    from pipelines.backfill import listed_items, plan
    from pipelines.report import write_json

    if (bool(items), bool(since), everything).count(True) != 1:
        raise ConfigError("which items? Expected one of --items FILE, --since DAY and --all")
    settled = resolved(config, settings, warehouse, days=(run_date, since), json_file=json_file)
    selection = (
        None if everything else Selection(listed_items(items) if items else None, parse_date(since) if since else None)
    )
    with opened(settled, run_date, write=not dry_run) as work:
        if dry_run:
            current_champion(work.registry)
        else:
            current_codebook(work.registry)
        model = codebook(work.registry, name)
        planned = plan(work.warehouse, model, selection)
        tell(planned)
        result = None
        if not dry_run:
            result = encode.run(work.config, work.warehouse, work.registry, model, work.run_date, selection)
            tell(result)
    if json_file is not None:
        write_json(json_file, {"plan": asdict(planned), "result": asdict(result) if result else None})


@app.command()
def status(
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "", json_file: JsonFile = None
) -> None:
    """The current release, the candidate, the last verdict and every table, in one screen."""
    from jobs.models.registry import open_registry
    from jobs.warehouse.root import warehouse_root
    from pipelines.lineage import print_status, status_facts

    chosen = resolved(config, settings, warehouse, json_file=json_file)
    root = warehouse_root(chosen.warehouse, write=False)
    with failures.on_warehouse(root, write=False):
        values = status_facts(root, open_registry(chosen, root, create=False))
    print_status(values)
    if json_file is not None:
        from pipelines.report import write_json

        write_json(json_file, values)


@app.command()
def explain(
    item_id: Annotated[str, typer.Argument(help="The item to explain.")],
    config: ConfigFiles = None, settings: Settings = None, warehouse: WarehouseDir = "",
) -> None:  # fmt: skip
    """Where the semantic ID of one item comes from: vector, codebook, release, models."""
    from pipelines.lineage import print_item

    with opened(resolved(config, settings, warehouse), write=False) as work:
        found = print_item(work.warehouse, work.registry, item_id)
    if not found:
        raise typer.Exit(WRONG_DATA)


bench = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Measurements: quality and speed of the quantizer, and what its IDs are worth to a ranker.",
)


def _add_bench() -> None:
    """The benchmarks need the packages of the `dev` extra, which a production image lacks: loaded only when called."""
    try:
        from benchmarks.ctr.harness import ctr
        from benchmarks.encode import encode
        from benchmarks.encode_job import encode_job
        from benchmarks.fit import fit
        from benchmarks.gpu import gpu
        from benchmarks.quantizers import quantizers
        from benchmarks.train import train
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`sid bench` needs {error.name}, which is not installed; expected the repository with its dev extra. Run `make setup`"
        ) from error
    for command in (quantizers, fit, encode, encode_job, gpu, ctr, train):
        bench.command()(command)
    app.add_typer(bench, name="bench")


def main() -> None:
    if sys.argv[1:2] == ["bench"]:
        try:
            _add_bench()
        except ConfigError as error:
            sys.exit(failures.report(error))
    start(app)


if __name__ == "__main__":
    main()
