"""The step time that `multi-token train --plan` predicts, beside that of a run right after it.

    python benchmarks/plan.py [--quick] [--threads 1] [--out FILE.json]

A plan and a run of the same recipe take turns, as a user starts them. The ratio of each pair
counts; its median is printed with the smallest and the largest. The run's time is the median of its
steps, from the tokens per second that it logs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from training import NUM_ROWS, build_parts, rows

from multi_token.recipe.recipe import Recipe
from multi_token.report.machine import machine_facts
from multi_token.train import plan_run, train

NUM_STEPS = 12
STAGE = "tried"
PROJECTOR = {"projectors": 1e-3}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "projector": (PROJECTOR, {}),
    "projector, packed": (PROJECTOR, {"packing": True}),
    "projector and adapter": ({**PROJECTOR, "adapter": 1e-3}, {"adapter": {"r": 8}}),
    "all of the language model": ({**PROJECTOR, "language_model": 1e-4}, {}),
}
"""Name -> `learn` of the stage, and other lines of `train`."""


def recipe_of(folder: Path, out: Path, learn: dict[str, Any], more: dict[str, Any]) -> Recipe:
    """A run of a few steps over the same eight rows."""
    image = {"type": "image", "encoder": str(folder / "clip"), "features": "patches"}
    arguments = {
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "max_steps": NUM_STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
    }
    return Recipe.model_validate(
        {
            "model": {
                "language_model": str(folder / "language_model"),
                "dtype": "float32",
                "modalities": {"image": image},
            },
            "data": {"train": [{"rows": str(folder / "rows.jsonl")}]},
            "train": {
                "output_dir": str(out),
                "stages": [{"name": STAGE, "learn": learn}],
                "closed_form": None,
                "feature_cache": False,
                "args": arguments,
                **more,
            },
        }
    )


def planned(recipe: Recipe) -> tuple[float, int]:
    """Seconds and tokens of a step, as `--plan` prints them."""
    said = io.StringIO()
    plan_run(recipe, console=Console(file=said, width=1000))
    found = re.search(r"about (\S+) s a step", said.getvalue())
    tokens = re.search(r"steps of about ([\d,]+) tokens", said.getvalue())
    assert found is not None and tokens is not None, said.getvalue()
    return float(found[1]), int(tokens[1].replace(",", ""))


def measured(recipe: Recipe, tokens_per_step: int) -> float:
    """Seconds of a step in the median of a run, of which all steps have the same tokens."""
    train(recipe, console=Console(quiet=True))
    done = Path(recipe.train.output_dir) / "stages" / f"1-{STAGE}" / "done.json"
    history = json.loads(done.read_text("utf-8"))["log_history"]
    speeds = [one["tokens_per_second"] for one in history if "tokens_per_second" in one]
    assert len(speeds) == NUM_STEPS
    return tokens_per_step / statistics.median(speeds)


def main() -> None:
    """The table, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 2 if options.quick else 5
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_parts(folder)
        lines = [json.dumps(row) + "\n" for row in rows(NUM_ROWS, random.Random(0))]
        (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
        pairs: dict[str, list[tuple[float, float]]] = {way: [] for way in SETTINGS}
        for turn in range(rounds):
            for number, (way, (learn, more)) in enumerate(SETTINGS.items()):
                recipe = recipe_of(folder, folder / f"{turn}-{number}", learn, more)
                seconds, tokens = planned(recipe)
                pairs[way].append((seconds, measured(recipe, tokens)))
    for way, found in pairs.items():
        ratios = [seconds / took for seconds, took in found]
        results.append(
            {
                "way": way,
                "planned_s": statistics.median(seconds for seconds, _ in found),
                "measured_s": statistics.median(took for _, took in found),
                "ratio": statistics.median(ratios),
                "smallest": min(ratios),
                "largest": max(ratios),
            }
        )
    # The ratio of each pair, not of the medians: both halves of a pair meet the same machine.
    table = Table(
        "what is trained",
        "planned, ms a step",
        "measured, ms a step",
        "planned / measured",
        title=f"{rounds} rounds of {NUM_STEPS} steps",
    )
    for one in results:
        table.add_row(
            one["way"],
            f"{1000 * one['planned_s']:.0f}",
            f"{1000 * one['measured_s']:.0f}",
            f"{one['ratio']:.2f} ({one['smallest']:.2f} to {one['largest']:.2f})",
        )
    Console(width=110).print(table)
    numbers = {
        "results": results,
        "rounds": rounds,
        "threads": options.threads,
        "machine": machine_facts(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
