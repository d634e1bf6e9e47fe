"""The stages as commands: `python -m jobs <stage>`, or `sid <stage>`.

On a laptop:

    python -m jobs load --set load.source=vectors.parquet

On a cluster:

    spark-submit --jars "$(python -m jobs.spark.engine)" infra/spark/submit.py load --config infra/conf/cluster.toml
"""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command_line import (
    Options,
    command,
    command_group,
    find_codebook,
    open_workspace,
    print_result,
    restore_alias,
    run_commands,
)
from jobs.config import ConfigError

Codebook = Annotated[str, typer.Option("--codebook", help="Codebook version, or the alias candidate or champion.")]

app = command_group()


@app.callback()
def stages() -> None:
    """The stages of a night, one command each."""


@command(app)
def load(options: Options) -> None:
    """Raw vectors -> item_embeddings, or rejected_embeddings with a reason."""
    from jobs import load as stage

    with open_workspace(options.resolve(), options.run_date) as work:
        print_result(stage.run(work.config, work.warehouse, work.run_date), options.json_file)


@command(app)
def fit(options: Options) -> None:
    """item_embeddings -> a codebook, registered as candidate."""
    from jobs import fit as stage

    with open_workspace(options.resolve(), options.run_date) as work:
        champion = restore_alias(work.registry)
        result = stage.run(work.config, work.warehouse, work.registry, work.run_date, work.pictures, champion)
        print_result(result, options.json_file)


@command(app)
def encode(options: Options, name: Codebook = "candidate") -> None:
    """item_embeddings + a codebook -> semantic_ids of that version."""
    from jobs import encode as stage

    with open_workspace(options.resolve(), options.run_date) as work:
        restore_alias(work.registry)
        codebook = find_codebook(work.registry, name)
        print_result(stage.run(work.config, work.warehouse, work.registry, codebook, work.run_date), options.json_file)


@command(app)
def evaluate(options: Options, name: Codebook = "candidate") -> None:
    """semantic_ids of a version -> quality_reports with a verdict, and pictures."""
    from jobs import evaluate as stage

    with open_workspace(options.resolve(), options.run_date) as work:
        champion = restore_alias(work.registry)
        codebook = find_codebook(work.registry, name)
        result = stage.run(work.config, work.warehouse, work.registry, codebook, champion, work.run_date, work.pictures)
        print_result(result, options.json_file)


@command(app)
def train(options: Options) -> None:
    """Interactions + semantic_ids of the current release -> ctr_examples and the CTR model (DMQN)."""
    from jobs import train as stage
    from jobs.ctr.example_table import check_interactions
    from jobs.warehouse.releases import current_release

    with open_workspace(options.resolve(), options.run_date) as work:
        log = check_interactions(work.config, work.warehouse)
        codebook = restore_alias(work.registry)
        release = current_release(work.warehouse.root)
        if release is None or codebook is None:
            raise ConfigError(
                "this warehouse has no release yet; expected one to train on. Run `sid nightly` or `sid promote` first"
            )
        result = stage.run(
            work.config,
            work.warehouse,
            work.registry,
            codebook,
            release.table_versions,
            work.run_date,
            work.pictures,
            typer.echo,
            log,
        )
        print_result(result, options.json_file)


@command(app)
def cache(options: Options) -> None:
    """ctr_examples + the CTR champion -> user_interests, from which a user is scored without their history."""
    from jobs import cache as stage

    with open_workspace(options.resolve(), options.run_date) as work:
        codebook = restore_alias(work.registry)
        if codebook is None:
            raise ConfigError("this warehouse has no release; expected one with a CTR model. Run `sid nightly` first")
        result = stage.run(work.config, work.warehouse, work.registry, codebook, typer.echo)
        print_result(result, options.json_file)


if __name__ == "__main__":
    run_commands(app)
