"""`multi-token combine`: runs whose modalities were trained apart, joined without training."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from multi_token.errors import ConvertError


def combine(
    runs: list[str] = typer.Argument(..., help="Folders or hub names of two or more runs."),
    out: Path = typer.Option(..., help="The new run's folder."),
    rename: list[str] = typer.Option(
        [],
        help="OLD=NEW, or RUN:OLD=NEW where several runs have the modality OLD. Repeatable.",
    ),
) -> None:
    """Join runs on one frozen language model into one run with the modalities of all."""
    from multi_token.convert.combine import combine as join

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status(f"combining {', '.join(runs)}"):
        origins = join(runs, out, rename=_renames(rename))
    slots = ", ".join(f"<{name}> of {run}" for name, run in origins.items())
    console.print(f"{out}: {slots}", soft_wrap=True)


def _renames(typed: list[str]) -> dict[str, str]:
    renames = {}
    for text in typed:
        old, equals, new = text.rpartition("=")
        if not equals or not old or not new:
            raise ConvertError(f"expected --rename OLD=NEW (image=photo), got {text!r}")
        if old in renames:
            raise ConvertError(f"--rename gives {old} two names; leave one out")
        renames[old] = new
    return renames
