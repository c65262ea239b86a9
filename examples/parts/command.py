"""Command line of the examples, and losses of a finished run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

SizeT = TypeVar("SizeT")


def run_command(
    name: str,
    about: str,
    run: Callable[[Path, SizeT, int, Console], Mapping[str, Any]],
    *,
    full: SizeT,
    quick: SizeT,
    others: Mapping[str, tuple[str, SizeT]] | None = None,
) -> None:
    """The whole command: `--out --seed --quick`, then `run(out, size, seed, console)`.

    `about`: the example's own text, whose first line is the help's. `others`: further sizes, each a
    flag of its name with its help. Prints the plain numbers of the report that `run` returns, and
    where its page lies.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="the run's folder")
    parser.add_argument("--seed", type=int, default=0, help="of rows, training and questions")
    sizes = {"quick": ("a small one in about a minute", quick), **(others or {})}
    flags = parser.add_mutually_exclusive_group()
    for flag, (help_text, size) in sizes.items():
        flags.add_argument(
            f"--{flag}", action="store_const", const=size, dest="size", default=full, help=help_text
        )
    options = parser.parse_args()
    # Progress goes to stderr, so that stdout stays free for pipes.
    console = Console(stderr=True)
    report = run(options.out, options.size, options.seed, console)
    for key, value in report.items():
        if isinstance(value, (int, float)):
            shown = f"{value:.1%}" if key.endswith(("accuracy", "rate")) else value
            console.print(f"{key.replace('_', ' '):34} {shown}", highlight=False)
    console.print(f"\nlook:  {options.out / 'report.html'}", highlight=False)


def stage_losses(run_folder: Path) -> list[tuple[int, float]]:
    """Return (step, loss) of all stages of a finished run, one after the other."""
    losses: list[tuple[int, float]] = []
    stages = run_folder / "stages"
    for stage in sorted(stages.iterdir(), key=lambda path: int(path.name.partition("-")[0])):
        done = json.loads((stage / "done.json").read_text(encoding="utf-8"))
        # Steps of a stage begin at 1; the curve goes on from the last step of the one before.
        before = losses[-1][0] if losses else 0
        losses += [
            (before + log["step"], log["loss"])
            for log in done.get("log_history", ())
            if "loss" in log
        ]
    return losses
