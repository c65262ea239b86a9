"""`multi-token evaluate`: how a trained run does on rows whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from multi_token.evaluate.blind import BlindReport

evaluate_app = typer.Typer(
    name="evaluate", help="Measure a trained run on rows with answers.", no_args_is_help=True
)


@evaluate_app.callback()
def _evaluate() -> None:
    """Measure a trained run on rows with answers."""


@evaluate_app.command("blind")
def blind_command(
    run: Path = typer.Argument(..., help="The folder of a trained run."),
    rows: str = typer.Option(..., help="Rows that were not trained on: a file, folder, hub name."),
    split: str = typer.Option("train", help="Which split, where there are several."),
    num_rows: int = typer.Option(256, min=2, help="At most so many, evenly over all of them."),
    batch_size: int = typer.Option(8, min=1, help="Rows at a time."),
    seed: int = typer.Option(0, help="Decides which items rows exchange."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    language_model: str = typer.Option(
        None, help="Where the frozen language model is, if it has moved."
    ),
    device: str = typer.Option(None, help="cpu, cuda, mps; default: the best there is."),
) -> None:
    """Does it use its media? Loss and exact match with original, shuffled and ablated media."""
    from rich.console import Console

    from multi_token.cli.ask import _load
    from multi_token.data.files.open import load_rows
    from multi_token.evaluate.blind import blind
    from multi_token.evaluate.scores import evenly_spaced, with_processor

    every = load_rows(rows, split=split)
    model = _load(run, language_model, device)
    chosen = with_processor(every, model, source=rows, indices=evenly_spaced(len(every), num_rows))
    report = blind(model, chosen, batch_size=batch_size, seed=seed)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
        return
    console = Console()
    console.print(table_of(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)


def table_of(report: BlindReport) -> Table:
    """A line for each way in which the media were shown."""
    from rich.table import Table

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
