"""`multi-token evaluate`: metrics of a trained run on rows with answers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console
from rich.table import Table

from multi_token.cli.data import NumShards, Reading, Shard
from multi_token.cli.loading import LoadOptions, load_run, with_load_options
from multi_token.cli.predict import (
    NUM_WORKERS,
    ON_BAD_ROW,
    OUT,
    bad_row_rule,
    finish,
    open_job,
    open_run_rows,
    workers_for,
)
from multi_token.errors import MultiTokenError

if TYPE_CHECKING:
    from multi_token.evaluate.blind import BlindReport

evaluate_app = typer.Typer(no_args_is_help=True)


@evaluate_app.callback()
def _evaluate() -> None:
    """Measure a trained run on rows with answers."""


@evaluate_app.command("blind")
@with_load_options
def blind_command(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    rows: str = typer.Option(..., help="Held-out rows: a file, folder or hub name."),
    split: str = typer.Option("train", help="Split to read, if there are several."),
    reading: Reading = None,
    num_rows: int = typer.Option(256, min=2, help="Most rows, evenly spaced over all."),
    batch_size: int = typer.Option(8, min=1, help="Rows per batch."),
    seed: int = typer.Option(0, help="Seed of the shuffled media."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    *,
    load: LoadOptions,
) -> None:
    """Test whether a run uses its media: loss and exact match with shuffled and ablated media."""
    from multi_token.evaluate.blind import blind
    from multi_token.evaluate.scores import evenly_spaced, with_processor

    # each process would do all of it
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MultiTokenError(
            "the blind test exchanges media between all its rows, so it runs in one process: start "
            "it without torchrun (`evaluate rows` scores rows in several)"
        )
    source = open_run_rows(run, rows, split, reading)
    model = load_run(run, load)
    # evenly spaced, since files are often sorted by source or topic
    chosen = with_processor(source, model, evenly_spaced(len(source.rows), num_rows))
    report = blind(model, chosen, batch_size=batch_size, seed=seed)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
        return
    console = Console()
    console.print(table_of(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


@evaluate_app.command("rows")
@with_load_options
def rows_command(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    rows: str = typer.Option(..., help="Rows with answers: a file, folder or hub name."),
    out: Path = OUT,
    split: str = typer.Option("train", help="Split to read, if there are several."),
    batch_size: int = typer.Option(8, min=1, help="Rows per batch."),
    on_bad_row: Literal["raise", "skip"] = ON_BAD_ROW,
    reading: Reading = None,
    num_workers: int = NUM_WORKERS,
    num_shards: NumShards = None,
    shard: Shard = None,
    *,
    load: LoadOptions,
) -> None:
    """Write loss and exact match of every row, and print their means.

    A killed command resumes, and several processes may share the rows, as for `predict`.
    """
    columns = ("loss", "exact")
    source = open_run_rows(run, rows, split, reading)
    job, console = open_job(
        "evaluate rows", run, source, out, columns, load.precision, split, (shard, num_shards)
    )
    if job.is_joined:
        console.print(f"{job.num_done:,} of {len(job.rows):,} rows are scored already")
        return
    from multi_token.evaluate.predict import run_work, scores

    model = load_run(run, load)
    run_work(
        job,
        scores(model),
        replace(model.require_processor(), fetch=source.fetch),
        source=rows,
        batch_size=batch_size,
        prompt_only=False,
        num_workers=workers_for(model, num_workers),
        on_bad_row=bad_row_rule(run, on_bad_row),
        console=console,
        description="Scoring",
    )
    totals = [0.0, 0.0, 0.0]

    def add(fields: Mapping[str, float]) -> None:
        for i, value in enumerate((fields["loss"], fields["loss"] ** 2, fields["exact"])):
            totals[i] += value

    report = finish(job, console, on_result=add)
    if report is not None and report.num_bad < report.num_rows:
        num = report.num_rows - report.num_bad
        loss, squares, exact = (total / num for total in totals)
        error = (max(0.0, squares - loss**2) / num) ** 0.5
        typer.echo(f"loss {loss:.3f} ± {2 * error:.3f} (two standard errors), exact {exact:.1%}")


def table_of(report: BlindReport) -> Table:
    """A table with a row per condition: original, shuffled and ablated media."""
    left_out = f", {report.num_left_out} left out" if report.num_left_out else ""
    table = Table(title=f"{report.num_rows} rows{left_out}", title_justify="left")
    for column in ("media", "loss", "exact answers", "loss increase (± 2 standard errors)"):
        table.add_column(column, justify="left" if column == "media" else "right")
    for condition in report.conditions:
        increase = f"{condition.loss_increase:+.3f} ± {2 * condition.standard_error:.3f}"
        table.add_row(
            condition.media,
            f"{condition.loss:.3f}",
            f"{condition.accuracy:.0%}",
            "" if condition is report.conditions[0] else increase,
        )
    return table
