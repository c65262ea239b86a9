"""Size: time and memory of a start where a data set has hundreds of thousands of rows.

    python benchmarks/scale.py [scan] [--rows 300000] [--images 2000] [--workers 2] [--out FILE]

Each measurement is a function of MEASUREMENTS, and runs in processes of its own, so that the peak
of one does not hide that of another. Rows and images are written into a temporary folder.

`scan`: rows in LLaVA's form (1 to 7 questions about an image), as .json and as .jsonl. A first
start finds all lengths by headers. A second start trains one step with the lengths that the first
has stored. Bars, on two cores: 3,000 rows/s; peak at most 500 MB above the model; 150 MB of private
memory in a data worker; 30 s to the end of the second start, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from multi_token.report.machine import machine_facts

WORDS = "the a of image red big man dog next to car street in front and it is on with people"
MAX_TOKENS = 2048


def write_llava_rows(folder: Path, num_rows: int, num_images: int, kind: str) -> Path:
    """Write rows in LLaVA's form, row by row, as .json or .jsonl."""
    draw, path, vocabulary = random.Random(0), folder / f"rows.{kind}", WORDS.split()

    def words(num: int) -> str:
        return " ".join(draw.choices(vocabulary, k=num))

    def row(number: int) -> str:
        turns = []
        for turn in range(draw.choice([1, 3, 5, 7])):
            question = ("<image>\n" if turn == 0 else "") + words(12)
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": words(30)})
        image = f"images/{number % num_images:06d}.jpg"
        return json.dumps({"id": f"{number:08d}", "image": image, "conversations": turns})

    with path.open("w", encoding="utf-8") as file:
        separator = ",\n" if kind == "json" else "\n"
        file.write("[" if kind == "json" else "")
        for number in range(num_rows):
            file.write((separator if number else "") + row(number))
        file.write("]" if kind == "json" else "\n")
    return path


def write_parts(folder: Path, num_images: int) -> None:
    """Write images, a tiny language model and a tiny encoder: nothing here depends on weights."""
    from multi_token.testing import tiny_image_encoder, tiny_language_model

    (folder / "images").mkdir()
    for number in range(num_images):
        size = (320 + number % 300, 480)
        Image.new("RGB", size, (number % 256, number // 256, 0)).save(
            folder / "images" / f"{number:06d}.jpg"
        )
    tiny_language_model(folder / "language_model")
    tiny_image_encoder(folder / "encoder", "clip")


def recipe_of(folder: Path, kind: str, options: argparse.Namespace) -> Any:
    """Return the recipe of a run of one step on the rows of a folder."""
    from multi_token.recipe.recipe import Recipe

    language_model = options.language_model or str(folder / "language_model")
    args = {
        "max_steps": 1,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": options.workers,
        "report_to": "none",
    }
    return Recipe.model_validate(
        {
            "model": {
                "language_model": language_model,
                "modalities": {"image": {"type": "image", "encoder": str(folder / "encoder")}},
            },
            "data": {
                "train": [{"rows": str(folder / f"rows.{kind}")}],
                "lengths": "headers",
                "max_tokens": MAX_TOKENS,
            },
            "train": {
                "output_dir": str(folder / f"run-{kind}"),
                "closed_form": None,
                "calibration_items": 64,
                "stages": [{"name": "projectors", "learn": {"projectors": 1e-3}}],
                "args": args,
            },
        }
    )


def status_mb(field: str, pid: int | str = "self") -> float:
    """Return a field of /proc/PID/status or smaps_rollup in MB; 0 where the process is gone."""
    name = "smaps_rollup" if field.startswith("Private") else "status"
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1e3


@contextmanager
def watched_workers(found: list[float]) -> Iterator[None]:
    """Append the largest private memory that a child process had, in MB."""
    done, largest = threading.Event(), 0.0

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.25):
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            largest = max([largest, *(status_mb("Private_Dirty", pid) for pid in children)])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        found.append(largest)


def scan_once(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own: scan all rows after the model is loaded."""
    from multi_token.data.sources import good_rows, open_source
    from multi_token.train.prepare import compose_model, open_stages

    recipe = recipe_of(folder, kind, options)
    model = compose_model(recipe, open_stages(recipe)[0].args)
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    private: list[float] = []
    began = time.perf_counter()
    (data,) = recipe.data.train
    source = open_source(data, model.processor, recipe, None)
    opened_s = time.perf_counter() - began
    with watched_workers(private):
        good_rows([source], recipe, Console(stderr=True))
    seconds = time.perf_counter() - began
    return {
        "rows_per_s": len(source.rows) / (seconds - opened_s),
        "open_s": opened_s,
        "scan_s": seconds - opened_s,
        "peak_above_model_mb": status_mb("VmHWM") - before,
        "worker_private_mb": private[0],
    }


def start_again(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own: train one step with the lengths that are stored."""
    from multi_token.train.prepare import compose_model, open_stages
    from multi_token.train.run import train

    recipe = recipe_of(folder, kind, options)
    began = time.perf_counter()
    compose_model(recipe, open_stages(recipe)[0].args)
    model_s = time.perf_counter() - began
    began = time.perf_counter()
    train(recipe, console=Console(stderr=True))
    return {"second_start_s": time.perf_counter() - began - model_s, "model_s": model_s}


CHILDREN: dict[str, Callable[[Path, str, argparse.Namespace], dict[str, Any]]] = {
    "scan_once": scan_once,
    "start_again": start_again,
}


def in_own_process(name: str, folder: Path, kind: str, options: argparse.Namespace) -> Any:
    """Return what a function of CHILDREN returns in a new process."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--kind", kind]
    command += ["--workers", str(options.workers)]
    if options.language_model:
        command += ["--language-model", options.language_model]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_scan(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the scan of .json and .jsonl rows, and a second start."""
    write_parts(folder, options.images)
    results = []
    for kind in ("json", "jsonl"):
        path = write_llava_rows(folder, options.rows, options.images, kind)
        facts = {"rows": options.rows, "kind": kind, "file_mb": path.stat().st_size / 1e6}
        facts |= in_own_process("scan_once", folder, kind, options)
        facts |= in_own_process("start_again", folder, kind, options)
        results.append(facts)
        path.unlink()
    return results


MEASUREMENTS: dict[str, Callable[[Path, argparse.Namespace], list[dict[str, Any]]]] = {
    "scan": measure_scan,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "measurements",
        nargs="*",
        metavar="MEASUREMENT",
        help=f"of {', '.join(MEASUREMENTS)}; default: all",
    )
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2, help="data workers of a process")
    parser.add_argument("--language-model", help="a folder; default: a tiny model")
    parser.add_argument("--out", type=Path)
    for hidden in ("--child", "--folder", "--kind"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = CHILDREN[options.child](Path(options.folder), options.kind, options)
        print(json.dumps(found))
        return
    console, results = Console(width=110), {}
    for name in options.measurements or MEASUREMENTS:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = MEASUREMENTS[name](Path(folder), options)
        table = Table(*map(str, results[name][0]), title=name)
        for row in results[name]:
            table.add_row(*(f"{v:,.1f}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)
    if options.out is not None:
        facts = {"machine": machine_facts(), **results}
        options.out.write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
