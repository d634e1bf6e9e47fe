"""`sid`: the stages, and demo, nightly, promote, rollback, register, backfill, status, explain, bench.

Exit codes: 0 done or nothing to do · 2 wrong settings · 3 the gate did not pass · 4 wrong data or tables ·
5 the machine or the warehouse cannot be used, or a fault of the program · 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from jobs import failures
from jobs.__main__ import Codebook
from jobs.__main__ import app as stages
from jobs.command_line import (
    WITHOUT_DATE,
    Options,
    command,
    command_group,
    find_codebook,
    open_workspace,
    print_message,
    print_result,
    restore_alias,
    run_commands,
    version_number,
)
from jobs.config import Config, ConfigError
from jobs.failure_rules import GATE_DID_NOT_PASS, WRONG_DATA
from jobs.read_config import parse_date

DEMO_WAREHOUSE = "warehouse/demo"

app = command_group("Semantic IDs for ranking: load, fit, encode, evaluate, promote, train.")
app.registered_commands += stages.registered_commands


@command(app)
def demo(
    options: Options,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Folder with embeddings.parquet and, to train, interactions.parquet. Generated data by default.",
        ),
    ] = None,
) -> None:
    """A whole night, on generated data or on a folder of yours, and a summary to judge it by."""
    name = data.resolve().name if data else ""
    warehouse = options.warehouse or (f"{DEMO_WAREHOUSE}-{name}" if name else DEMO_WAREHOUSE)
    options = replace(options, warehouse=warehouse)
    options.resolve()
    expected = ""
    if data is None:
        from jobs.demo_data import best_auc, write_demo_data
        from jobs.warehouse.root import warehouse_root

        data = Path(warehouse_root(warehouse)) / "demo_data"
        if not (data / "interactions.parquet").exists():
            typer.echo("writing generated items, vectors and clicks", err=True)
            write_demo_data(data)
        expected = f"at best AUC {best_auc(data):.4f}, that of the probabilities that the clicks were drawn with"
    if not (data / "embeddings.parquet").exists():
        raise ConfigError(f"{data} has no embeddings.parquet; expected the folder format of the README")
    interactions = data / "interactions.parquet"
    sources = [
        f"load.source={data / 'embeddings.parquet'}",
        *([f"train.interactions={interactions}", "train.control=true"] if interactions.exists() else []),
    ]
    options = replace(options, settings=[*sources, *(options.settings or [])])
    _night(options.resolve(), options, expected)


@command(app)
def nightly(options: Options) -> None:
    """The night of a date: encodes what changed, refits when due, gates, promotes, trains."""
    _night(options.resolve(), options)


def _night(config: Config, options: Options, expected: str = "") -> None:
    from pipelines.nightly import run
    from pipelines.report import Terminal, facts, print_summary, write_json

    began = time.monotonic()
    terminal = Terminal()
    terminal.done("start", "Spark and MLflow")
    shown = config.warehouse  # as given, not absolute
    with open_workspace(config, options.run_date) as work:
        pictures = Path(shown) / "pictures" if "://" not in shown else work.pictures
        night = run(work.config, work.warehouse, work.registry, work.run_date, work.pictures, terminal)
        seconds = time.monotonic() - began
    if options.json_file is not None:
        write_json(options.json_file, facts(night, shown, pictures, seconds))
    print_summary(night, shown, pictures, seconds, work.spark_seconds, expected=expected)
    flags = f" --warehouse {shlex.quote(shown)}" if shown != "warehouse" else ""
    typer.echo(f"\nTry next: sid status{flags} · sid explain ITEM_ID{flags}")
    for refusal in night.refusals:
        typer.echo(f"gate: {refusal}", err=True)
    if night.refusals:
        raise typer.Exit(GATE_DID_NOT_PASS)


@command(app, WITHOUT_DATE)
def promote(
    options: Options,
    version: Annotated[str, typer.Argument(help="Codebook version; the candidate by default.")] = "candidate",
) -> None:
    """Move the champion to a version whose verdict passed, and write the release."""
    from jobs.warehouse.reports import report
    from pipelines.promote import promote as move

    with open_workspace(options.resolve()) as work:
        restore_alias(work.registry, verify_files=False)
        codebook = find_codebook(work.registry, version)
        verdict = report(work.warehouse.root, codebook.number)
        if verdict is None:
            raise ConfigError(
                f"codebook version {codebook.number} has no quality report; expected one. "
                f"Run `sid evaluate --codebook {codebook.number}`"
            )
        by_number = version_number(version) is not None
        result = move(work.warehouse, work.registry, codebook, verdict, again=by_number)
        print_result({**asdict(result.release), "nothing_to_do": result.nothing_to_do}, options.json_file)


@command(app, WITHOUT_DATE)
def rollback(
    options: Options,
    to: Annotated[
        int | None,
        typer.Option("--to", min=1, help="Release to go back to; by default the newest of another codebook."),
    ] = None,
) -> None:
    """Make an earlier release the current one again, with its codebook and its table versions."""
    from jobs.models.champion import own_versions
    from pipelines.promote import rollback as move

    with open_workspace(options.resolve()) as work:
        own_versions(work.registry)
        result = asdict(move(work.warehouse, work.registry, to))
        release = result.pop("release")
        names = ("release_id", "codebook_version", "codebook_hash", "table_versions")
        print_result({**{name: release[name] for name in names}, **result}, options.json_file)


@command(app, WITHOUT_DATE)
def register(options: Options) -> None:
    """Register the codebooks of this warehouse again, under their numbers, after the MLflow registry was lost."""
    from pipelines.register import register as register_anew

    with open_workspace(options.resolve()) as work:
        print_result(register_anew(work.config, work.registry, print_message), options.json_file)


@command(app)
def backfill(
    options: Options,
    name: Codebook,
    items: Annotated[
        str, typer.Option("--items", help="Parquet with a column item_id, or text with one id a line.")
    ] = "",
    since: Annotated[str, typer.Option("--since", help="Items new or changed on this day or later, YYYY-MM-DD.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every item.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
) -> None:
    """Semantic IDs of a codebook version for listed items, for items changed since a day, or for all. Prints a plan."""
    from jobs import encode
    from jobs.models.champion import current_champion
    from jobs.warehouse.queries import Selection, plan
    from pipelines.backfill import listed_items
    from pipelines.report import write_json

    if (bool(items), bool(since), everything).count(True) != 1:
        raise ConfigError("which items? Expected one of --items FILE, --since DAY and --all")
    config = options.resolve(since)
    selection = None
    if not everything:
        selection = Selection(listed_items(items) if items else None, parse_date(since) if since else None)
    with open_workspace(config, options.run_date, write=not dry_run) as work:
        if dry_run:
            current_champion(work.registry)
        else:
            restore_alias(work.registry)
        codebook = find_codebook(work.registry, name)
        counts = asdict(plan(work.warehouse, codebook.number, selection))
        planned = {"codebook_version": codebook.number, "codebook_hash": codebook.hash, **counts}
        print_result(planned)
        result = None
        if not dry_run:
            result = encode.run(work.config, work.warehouse, work.registry, codebook, work.run_date, selection)
            print_result(result)
    if options.json_file is not None:
        write_json(options.json_file, {"plan": planned, "result": asdict(result) if result else None})


@command(app, WITHOUT_DATE)
def status(options: Options) -> None:
    """The current release, the candidate, the last verdict and every table, in one screen."""
    from jobs.models.registry import open_registry
    from jobs.warehouse.root import warehouse_root
    from pipelines.lineage import print_status, status_facts
    from pipelines.report import write_json

    config = options.resolve()
    root = warehouse_root(config.warehouse, write=False)
    with failures.on_warehouse(root, write=False):
        facts = status_facts(root, open_registry(config, root, create=False))
    print_status(facts)
    if options.json_file is not None:
        write_json(options.json_file, facts)


@command(app, ("config", "settings", "warehouse"))
def explain(options: Options, item_id: Annotated[str, typer.Argument(help="The item to explain.")]) -> None:
    """Where the semantic ID of one item comes from: vector, codebook, release, models."""
    from pipelines.lineage import print_item

    with open_workspace(options.resolve(), write=False) as work:
        known = print_item(work.warehouse, work.registry, item_id)
    if not known:
        raise typer.Exit(WRONG_DATA)


bench = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Measurements: quality and speed of the quantizer, and what its IDs are worth to a ranker.",
)


def _add_bench() -> None:
    """Add the benchmarks, which need packages of the `dev` extra that a production image does not have."""
    try:
        from benchmarks.cache import cache
        from benchmarks.ctr.bridge import ctr_bridge
        from benchmarks.ctr.figures import ctr_figures
        from benchmarks.ctr.harness import ctr
        from benchmarks.ctr_memory import ctr_memory
        from benchmarks.encode import encode
        from benchmarks.encode_job import encode_job
        from benchmarks.fit import fit
        from benchmarks.gpu import gpu
        from benchmarks.quantizers import quantizers
        from benchmarks.train import train
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`sid bench` needs {error.name}, which is not installed; expected the repository with its dev extra. "
            "Run `make setup`"
        ) from error
    for benchmark in (quantizers, fit, encode, encode_job, gpu, ctr, ctr_bridge, ctr_figures, train, cache, ctr_memory):
        bench.command()(benchmark)
    app.add_typer(bench, name="bench")


def main() -> None:
    if sys.argv[1:2] == ["bench"]:
        try:
            _add_bench()
        except ConfigError as error:
            sys.exit(failures.report(error))
    run_commands(app)


if __name__ == "__main__":
    main()
