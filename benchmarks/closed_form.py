"""How many steps the closed-form start saves to the same accuracy: both starts, interleaved.

Every length is a training of its own, with its own learning-rate schedule, as a user would choose
it. A start that has reached `--target` is not trained any longer. `--tune` tries a grid of learning
rates on validation renderings of other rows; RATES has the random start's best, and the closed
form's as the demo has them (docs/log.md: chosen in the same way), so that the held-out renderings
of the table chose nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from multi_token.demo.rows import DemoData, build_rows
from multi_token.demo.run import SYSTEM, BatchGenerator, DemoSize, recipe
from multi_token.recipe.recipe import Recipe
from multi_token.report.machine import machine_facts
from multi_token.train.run import train

STARTS = ("random", "closed form")
GRID: list[dict[str, float]] = [
    {"projectors": 1e-3},
    {"projectors": 1e-3, "projector_biases": 3e-3},
    {"projectors": 2e-3},
    {"projectors": 4e-3},
    {"projectors": 8e-3},
]
RATES: dict[str, dict[str, float]] = {
    "random": {"projectors": 8e-3},
    "closed form": {"projectors": 1e-3, "projector_biases": 3e-3},
}
TUNING_SEED = 7
"""Rows of another seed, so that even their images are not those of the final table."""


@dataclass(frozen=True)
class Score:
    """Result of one training."""

    start: str
    learn: dict[str, float]
    steps: int
    seed: int
    accuracy: float
    loss: float
    seconds: float


class Bench:
    """Trains and asks; the encoder's features are made once a seed and shared by all runs."""

    def __init__(self, folder: Path, num_asked: int, console: Console) -> None:
        self.folder = folder
        self.num_asked = num_asked
        self.console = console
        self.scores: list[Score] = []

    def data(self, seed: int) -> DemoData:
        """The demo's rows of a seed, built once."""
        return build_rows(
            self.folder / f"data-{seed}",
            num_names=DemoSize().num_names,
            num_renderings=DemoSize().num_renderings,
            num_held_out_renderings=DemoSize().num_held_out_renderings,
            num_validation_renderings=2,
            seed=seed,
            system=SYSTEM,
        )

    def score(
        self,
        start: str,
        learn: dict[str, float],
        *,
        steps: int,
        seed: int,
        validation: bool = False,
    ) -> Score:
        """One training from nothing, and its exact answers on a split."""
        data = self.data(seed)
        out = self.folder / f"run-{len(self.scores)}"
        features = self.folder / f"features-{seed}"
        # Encoding takes as long as a short training and is the same for every run of a seed.
        if features.is_dir():
            shutil.copytree(features, out / "cache")
        quiet = Console(quiet=True)
        began = time.perf_counter()
        model = train(plan(data, out, start, learn, steps=steps, seed=seed), console=quiet)
        seconds = time.perf_counter() - began
        shutil.copytree(out / "cache", features, dirs_exist_ok=True)
        history = json.loads((out / "stages/1-projector/done.json").read_text(encoding="utf-8"))
        loss = [entry["loss"] for entry in history["log_history"] if "loss" in entry][-1]
        held_out = data.questions("validation_naming" if validation else "held_out_naming")
        questions = held_out[: self.num_asked]
        examples = BatchGenerator(model, data, self.folder, quiet).ask(questions, "naming")
        accuracy = sum(example.right for example in examples) / len(examples)
        score = Score(start, learn, steps, seed, accuracy, loss, seconds)
        self.scores.append(score)
        self.console.print(
            f"seed {seed}, {start}, {rates(learn)}, {steps} steps: {accuracy:.1%} exact, loss "
            f"{loss:.3f}, {seconds:.0f} s",
            highlight=False,
        )
        shutil.rmtree(out)
        return score


def plan(
    data: DemoData, out: Path, start: str, learn: dict[str, float], *, steps: int, seed: int
) -> Recipe:
    """The demo's recipe on its naming rows alone."""
    size = replace(DemoSize(), num_steps=steps)
    fields: dict[str, Any] = recipe(data, out, size, seed=seed).model_dump(mode="json")
    fields["data"]["train"] = [{"rows": str(data.file("naming"))}]
    fields["train"]["stages"][0]["learn"] = learn
    if start == "random":
        fields["train"]["closed_form"] = None
    # Checkpoints on disk would be counted as time of the training.
    fields["train"]["args"]["save_strategy"] = "no"
    return Recipe.model_validate(fields)


def rates(learn: dict[str, float]) -> str:
    """`4e-04, biases 3e-03`"""
    biases = learn.get("projector_biases")
    return f"{learn['projectors']:.0e}" + (f", biases {biases:.0e}" if biases else "")


def tune(bench: Bench, steps: int, starts: list[str], grid: list[int]) -> None:
    """Lines of the grid for each start, on validation renderings."""
    for learn in [GRID[line] for line in grid]:
        for start in starts:
            bench.score(start, learn, steps=steps, seed=TUNING_SEED, validation=True)
    for start in starts:
        best = max((s for s in bench.scores if s.start == start), key=lambda s: s.accuracy)
        bench.console.print(f"{start}: {rates(best.learn)} is best ({best.accuracy:.1%})")


def compare(bench: Bench, lengths: dict[str, list[int]], seeds: int, target: float) -> None:
    """Ever longer trainings of both starts in turn, until each has reached the target."""
    every = sorted({steps for of_start in lengths.values() for steps in of_start})
    for seed in range(seeds):
        waiting: list[str] = list(STARTS)
        for steps in every:
            # In turns, so that a slow hour of the machine does not fall on one start alone.
            for start in [s for s in waiting if steps in lengths[s]]:
                score = bench.score(start, RATES[start], steps=steps, seed=seed)
                if score.accuracy >= target:
                    waiting.remove(start)
    table = Table("start", "rates", "steps", "exact on new renderings", "last loss", "seconds")
    for start in STARTS:
        for steps in every:
            runs = [s for s in bench.scores if s.start == start and s.steps == steps]
            if runs:
                table.add_row(
                    start,
                    rates(RATES[start]),
                    str(steps),
                    " ".join(f"{s.accuracy:.1%}" for s in runs),
                    f"{statistics.median(s.loss for s in runs):.3f}",
                    f"{statistics.median(s.seconds for s in runs):.0f}",
                )
    # By seed, not as a mean: a start that misses the target with one seed has no number of steps.
    bench.console.print(table)
    for start in STARTS:
        first = [
            min((s.steps for s in mine if s.accuracy >= target), default=None)
            for seed in range(seeds)
            if (mine := [s for s in bench.scores if s.start == start and s.seed == seed])
        ]
        bench.console.print(f"{start}: steps to {target:.0%}, by seed: {first}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = [15, 30, 45, 60, 90, 120, 180, 240]
    parser.add_argument("--steps", type=int, nargs="+", default=steps, help="of the closed form")
    parser.add_argument("--random-steps", type=int, nargs="+", help="default: the same")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--asked", type=int, default=200, help="held-out questions a training")
    parser.add_argument("--target", type=float, default=0.95, help="share of exact answers")
    parser.add_argument("--tune", type=int, metavar="STEPS", help="try the grid of rates instead")
    parser.add_argument("--grid", type=int, nargs="+", default=range(len(GRID)), help="its lines")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.asked, console)
        if options.tune:
            tune(bench, options.tune, options.starts, list(options.grid))
        else:
            lengths = {
                "closed form": options.steps,
                "random": options.random_steps or options.steps,
            }
            chosen = {start: lengths[start] if start in options.starts else [] for start in STARTS}
            compare(bench, chosen, options.seeds, options.target)
    print(
        json.dumps({"machine": machine_facts(), "scores": [vars(score) for score in bench.scores]})
    )


if __name__ == "__main__":
    main()
