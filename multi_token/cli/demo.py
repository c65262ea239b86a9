"""`multi-token demo`: the main job on real input, from nothing to a report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer
from rich.console import Console


def demo(
    out: Path = typer.Option(Path("runs/demo"), help="Folder of the run and its report."),
    seed: int = typer.Option(0, help="Seed of images, rows and training."),
    names: int = typer.Option(None, help="Number of things to name, 100 by default."),
    quick: bool = typer.Option(False, "--quick", help="Run a small version in about a minute."),
) -> None:
    """Train a text-only language model to name images, ask it about new ones, write a report."""
    from multi_token.demo.run import QUICK, DemoSize, run

    console = Console(stderr=True)
    size = QUICK if quick else DemoSize()
    if names is not None:
        size = replace(size, num_names=names)
    report = run(out, size=size, seed=seed, console=console)
    console.rule("done")
    for key, value in report.items():
        if isinstance(value, (bool, int, float)):
            shown = f"{value:.1%}" if key.endswith("accuracy") else value
            console.print(f"{key.replace('_', ' '):32} {shown}", highlight=False)
    console.print(f"\nlook:  {out / 'report.html'}", highlight=False)
    console.print(f"talk:  multi-token chat {out}", highlight=False)
    # an image that training has not seen
    image = next((out / "data" / "images").glob("*/held_out_000.png"))
    console.print(f'ask:   multi-token ask {out} "What is this?" --image {image}', highlight=False)
