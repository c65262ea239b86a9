"""`multi-token train`: a recipe and overrides in, a run's folder out."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from multi_token.errors import Interrupted


def train(
    recipe: Path = typer.Argument(
        ..., help="A YAML recipe; `multi-token recipes list` has some to start from."
    ),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        help="Other values for keys of the recipe: train.seed=1 train.stages.0.args.max_steps=100",
    ),
    plan: bool = typer.Option(
        False, "--plan", help="Print the steps, memory and time of every stage, and train nothing."
    ),
) -> None:
    """Train the stages of a recipe. The same command continues an interrupted run."""
    from multi_token.recipe.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    console = Console(stderr=True)
    if plan:
        from multi_token.train import plan_run

        plan_run(loaded, console=console)
        return
    from multi_token.distributed import is_main_process
    from multi_token.train import train as train_recipe

    try:
        train_recipe(loaded, console=console)
    except Interrupted:
        # all processes are interrupted, and one message is enough
        if is_main_process():
            raise
        raise typer.Exit(130) from None
    if is_main_process():
        console.print(f"ask it: multi-token chat {loaded.train.output_dir}", highlight=False)
