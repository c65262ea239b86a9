"""Size: time and memory of a start where a data set has hundreds of thousands of rows.

    python benchmarks/scale.py [scan] [stage-zero] [server] [--rows 300000] [--images 2000]
                               [--out FILE]

Each measurement is a function of MEASUREMENTS, and runs in processes of its own, so that the peak
of one does not hide that of another. Rows and images are written into a temporary folder.

`scan`: rows in LLaVA's form (1 to 7 questions about an image), as .json and as .jsonl. A first
start finds all lengths by headers. A second start trains one step with the lengths that the first
has stored. Bars, on two cores: 3,000 rows/s; peak at most 500 MB above the model; 150 MB of private
memory in a data worker; 30 s to the end of the second start, without loading the model.

`stage-zero`: captions, each another one, about 2,000 vectors of width 768, for a language model of
width 512. Bars: one encoding for each vector; peak at most 300 MB above the model.

`server`: a server in a process of its own, while clients send requests of 64 JPEG files and n = 8,
the second of each with the files of the first. A stall is the time by which a timer of the event
loop is late; one client asks for /health all the time. Bar: no stall over 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
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


STAGE_ZERO: dict[str, tuple[int, dict[str, Any], str]] = {
    "pooled, expand": (1, {"type": "expand", "factor": 4}, "mean"),
    "64 groups, mean": (64, {"type": "mlp"}, "mean"),
    "64 groups, by position": (64, {"type": "mlp"}, "by_position"),
}
"""Case of stage zero -> features of an item, projector, targets."""


def write_captions(folder: Path, num_features: int, options: argparse.Namespace) -> None:
    """Write vectors, and rows with a caption of their own about one of them each."""
    draw, vocabulary = random.Random(0), WORDS.split()
    numbers = np.random.default_rng(0)
    for number in range(options.images):
        values = numbers.normal(size=(num_features, 768)).astype(np.float32)
        np.save(folder / f"{number}.npy", values)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as file:
        for number in range(options.captions):
            caption = f"{number} {' '.join(draw.choices(vocabulary, k=20))}"
            row = {
                "vector": f"{number % options.images}.npy",
                "conversations": [
                    {"from": "human", "value": "<vector>"},
                    {"from": "gpt", "value": caption},
                ],
            }
            file.write(json.dumps(row) + "\n")


def stage_zero_once(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own: stage zero after the model is loaded and the rows are known."""
    from multi_token.recipe.recipe import Recipe
    from multi_token.train.prepare import open_stages, prepare
    from multi_token.train.run import closed_form_stage

    _, projector, targets = STAGE_ZERO[kind]
    fields = recipe_of(folder, "jsonl", options).model_dump(mode="json")
    vector = {"type": "vector", "dim": 768, "projector": projector}
    fields["model"]["modalities"] = {"vector": vector}
    fields["data"]["train"] = [{"rows": str(folder / "captions.jsonl")}]
    fields["train"] |= {"closed_form": {"targets": targets}, "calibration_items": 4096}
    recipe = Recipe.model_validate(fields)
    run = prepare(recipe, open_stages(recipe), Console(stderr=True))
    encoded = 0

    def count(_module: Any, _args: Any, features: Any) -> None:
        nonlocal encoded
        encoded += len(features.values)

    run.model.encoder("vector").register_forward_hook(count)
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    closed_form_stage(run)
    return {
        "encodings": encoded,
        "seconds": time.perf_counter() - began,
        "peak_above_model_mb": status_mb("VmHWM") - before,
    }


NUM_ITEMS, NUM_CHOICES, NUM_CLIENTS = 64, 8, 4
"""Load on the server: items and choices of a request, and clients that send requests."""
BEAT_S = 0.002


def serve_watched(folder: Path, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run in a process of its own: serve, print the address, and measure until the input ends.

    Each line of the input names the phase that begins.
    """
    import torch

    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.model import ModelSpec
    from multi_token.serve.server import DrainingServer
    from multi_token.serve.service import Service
    from multi_token.serve.settings import ServeSettings

    # One token an image, since the context is 512 tokens.
    projector = {"type": "pool", "factor": 4, "grid": True}
    image = {"type": "image", "encoder": str(folder / "encoder"), "projector": projector}
    fields = {"language_model": str(folder / "language_model"), "modalities": {"image": image}}
    spec = ModelSpec.model_validate(fields)
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(spec)
    settings = ServeSettings(
        port=0, num_workers=options.workers, max_batch=NUM_CHOICES, max_queue=10 * NUM_CHOICES
    )
    stalls: dict[str, list[float]] = {"": []}
    phases = [""]

    async def beat() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            stalls[phases[-1]].append(1e3 * (time.perf_counter() - began - BEAT_S))

    def started() -> None:
        beats.append(asyncio.get_running_loop().create_task(beat()))
        print(server.url, flush=True)

    def read_phases() -> None:
        for line in sys.stdin:
            stalls[line.strip()] = []
            phases.append(line.strip())
        server.should_exit = True

    beats: list[asyncio.Task[None]] = []
    server = DrainingServer(Service(model, settings), on_started=started)
    threading.Thread(target=read_phases, daemon=True).start()
    server.run()
    return {
        phase: {"stall_ms": max(found), "p99_ms": sorted(found)[int(0.99 * len(found))]}
        for phase, found in stalls.items()
        if phase
    }


def request_of(number: int) -> bytes:
    """Return the body of a request about images that no request of another number has."""
    draw = np.random.default_rng(number)
    content = []
    for _ in range(NUM_ITEMS):
        file = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (192, 256, 3), dtype=np.uint8)).save(file, "JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Which?"}]}]
    options = {"n": NUM_CHOICES, "temperature": 1.0, "max_tokens": 16, "ignore_eos": True}
    return json.dumps({"messages": messages, **options}).encode()


def measure_server(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure stalls of a server's event loop, idle and under load."""
    write_parts(folder, 0)
    bodies = [request_of(number) for number in range(options.requests)]
    command = child_command("serve_watched", folder, "", options)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with ExitStack() as stack:
        child = stack.enter_context(subprocess.Popen(command, text=True, **pipes))
        assert child.stdin is not None and child.stdout is not None
        url, to_child = child.stdout.readline().strip(), child.stdin
        headers = {"Content-Type": "application/json"}
        client = stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=300))

        def post(body: bytes) -> None:
            for _ in range(2):
                answer = client.post("/v1/chat/completions", content=body)
                assert answer.status_code == 200, answer.text

        def phase(name: str, is_over: Callable[[], bool]) -> dict[str, Any]:
            print(name, file=to_child, flush=True)
            waits: list[float] = []
            while not threading.Event().wait(0.01) and not is_over():
                began = time.perf_counter()
                client.get("/health").raise_for_status()
                waits.append(1e3 * (time.perf_counter() - began))
            return {"phase": name, "body_mb": len(bodies[0]) / 1e6, "health_ms": max(waits)}

        post(bodies[0])
        until = time.perf_counter() + 5
        results = [phase("idle", lambda: time.perf_counter() > until)]
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            asked = [pool.submit(post, body) for body in bodies]
            results.append(phase("load", lambda: all(each.done() for each in asked)))
            for each in asked:
                each.result()
        found = json.loads(child.communicate()[0].splitlines()[-1])
    return [{**each, **found[each["phase"]]} for each in results]


CHILDREN: dict[str, Callable[[Path, str, argparse.Namespace], dict[str, Any]]] = {
    "scan_once": scan_once,
    "serve_watched": serve_watched,
    "stage_zero_once": stage_zero_once,
    "start_again": start_again,
}


def child_command(name: str, folder: Path, kind: str, options: argparse.Namespace) -> Sequence[str]:
    """Return the command line of a process that runs a function of CHILDREN."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--kind", kind]
    command += ["--workers", str(options.workers)]
    if options.language_model:
        command += ["--language-model", options.language_model]
    return command


def in_own_process(name: str, folder: Path, kind: str, options: argparse.Namespace) -> Any:
    """Return what a function of CHILDREN returns in a new process."""
    command = child_command(name, folder, kind, options)
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


def measure_stage_zero(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure stage zero on captions, of which each is another one."""
    from multi_token.testing import tiny_language_model

    results = []
    for kind, (num_features, _, _) in STAGE_ZERO.items():
        inner = folder / kind.replace(" ", "-")
        inner.mkdir()
        tiny_language_model(inner / "language_model", hidden_size=512)
        write_captions(inner, num_features, options)
        facts = {"case": kind, "captions": options.captions, "items": options.images}
        results.append({**facts, **in_own_process("stage_zero_once", inner, kind, options)})
    return results


MEASUREMENTS: dict[str, Callable[[Path, argparse.Namespace], list[dict[str, Any]]]] = {
    "scan": measure_scan,
    "stage-zero": measure_stage_zero,
    "server": measure_server,
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
    parser.add_argument("--captions", type=int, default=50_000, help="rows of stage zero")
    parser.add_argument("--requests", type=int, default=12, help="to the server, each sent twice")
    parser.add_argument("--workers", type=int, default=2, help="data or media workers")
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
