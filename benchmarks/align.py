"""How many steps the closed-form start saves: the same training with and without it, interleaved.

Border: runs the demo's own rows, model and trainer; prints a table whose last line is JSON.
Each variant is trained for several lengths (each with its own learning-rate schedule, as a user
would choose it) and asked about held-out renderings.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from multi_token.demo.report import machine
from multi_token.demo.rows import DemoData, build_rows, read_questions
from multi_token.demo.run import SYSTEM, Asker, Size, recipe
from multi_token.recipe import Recipe
from multi_token.train.run import train

VARIANTS: dict[str, dict[str, Any]] = {
    "random MLP, 1e-3": {"align": None, "learn": {"projectors": 1e-3}},
    "closed form + MLP, 1e-3": {"learn": {"projectors": 1e-3}},
    "closed form + MLP 4e-4, biases 3e-3": {
        "learn": {"projectors": 4e-4, "projector_biases": 3e-3}
    },
}


def plan(data: DemoData, out: Path, size: Size, seed: int, variant: dict[str, Any]) -> Recipe:
    """The demo's recipe on its naming rows, with one variant's changes."""
    fields = recipe(data, out, size, seed=seed).model_dump(mode="json")
    fields["data"]["train"] = [{"rows": str(data.naming)}]
    fields["train"]["stages"][0]["learn"] = variant["learn"]
    if "align" in variant:
        fields["train"]["align"] = variant["align"]
    fields["train"]["args"]["save_strategy"] = "no"
    return Recipe.model_validate(fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--asked", type=int, default=100)
    options = parser.parse_args()
    console = Console()
    scores: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = build_rows(
            Path(folder) / "data",
            num_names=Size().num_names,
            num_renderings=Size().num_renderings,
            num_held_out_renderings=Size().num_held_out_renderings,
            seed=0,
            system=SYSTEM,
        )
        questions = read_questions(data.held_out_naming)[: options.asked]
        quiet = Console(quiet=True)
        features = Path(folder) / "features.safetensors"
        for seed in range(options.repeats):
            for num_steps in options.steps:
                for name, variant in VARIANTS.items():
                    out = Path(folder) / f"{len(scores)}-{seed}"
                    size = replace(Size(), num_steps=num_steps)
                    if features.is_file():  # every variant starts from features that are there
                        (out / "cache").mkdir(parents=True)
                        shutil.copy(features, out / "cache" / features.name)
                    began = time.perf_counter()
                    model = train(plan(data, out, size, seed, variant), console=quiet)
                    seconds = time.perf_counter() - began
                    if not features.is_file():
                        shutil.copy(out / "cache" / features.name, features)
                    history = json.loads((out / "stages/1-projector/done.json").read_text())
                    loss = [e["loss"] for e in history["log_history"] if "loss" in e][-1]
                    examples = Asker(model, data, Path(folder), quiet).ask(questions, "naming")
                    accuracy = sum(e.right for e in examples) / len(examples)
                    scores.setdefault((name, num_steps), []).append((accuracy, loss, seconds))
                    console.print(f"{name}, {num_steps} steps: {accuracy:.0%}, loss {loss:.3f}")
    table = Table("variant", "steps", "exact on new renderings", "last loss", "seconds")
    for (name, num_steps), runs in scores.items():
        accuracy, loss, seconds = (statistics.median(values) for values in zip(*runs, strict=True))
        table.add_row(name, str(num_steps), f"{accuracy:.0%}", f"{loss:.3f}", f"{seconds:.0f}")
    console.print(table)
    rows = [
        {"variant": name, "steps": steps, "runs": runs} for (name, steps), runs in scores.items()
    ]
    print(json.dumps({"machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
