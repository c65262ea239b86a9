"""Time to find the lengths of rows with images: by decoding them, and from their headers.

    python benchmarks/lengths.py [--rows 2000] [--size 640 480] [--rounds 3] [--out FILE.json]

Writes JPEGs of one size (noise, blurred so that files are as large as those of photographs). Then
scans the rows in one process, as a run does before it trains, with three encoders: one shape for
all images, LLaVA-NeXT's tiles, and native proportions. Both modes take turns; a time is the median
over the rounds. Files are in the system's cache for both modes. A cold or distant disk gains more
by headers, since fewer bytes are read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from multi_token.data.dataset import row_to_sample
from multi_token.data.files.open import load_rows
from multi_token.data.scan import ScanReport, scan
from multi_token.processor import MultiTokenProcessor, build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.report.machine import machine_facts
from multi_token.testing import tiny_image_encoder, tiny_language_model

GRIDS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "one shape for all": ("clip", {}),
    "tiles": ("clip", {"tile_grids": GRIDS, "projector": {"type": "linear", "line_break": True}}),
    "native proportions": ("siglip2", {}),
}
"""Name -> encoder and fields of the modality. Encoders are tiny, since nothing is encoded."""


def write_rows(folder: Path, num_rows: int, size: tuple[int, int]) -> int:
    """Write images and `rows.jsonl`; return the mean size of a file in bytes."""
    num_bytes = 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            path = folder / f"{number}.jpg"
            # Plain noise would give files far larger than photographs, and one color far smaller.
            noise = Image.effect_noise((size[0] // 4, size[1] // 4), 90).resize(size)
            noise.filter(ImageFilter.BoxBlur(1)).convert("RGB").save(path, quality=90)
            num_bytes += path.stat().st_size
            messages = [
                {"role": "user", "content": "What is <image>?"},
                {"role": "assistant", "content": "noise"},
            ]
            file.write(json.dumps({"image": path.name, "messages": messages}) + "\n")
    return num_bytes // num_rows


def processor_of(folder: Path, encoder: str, fields: dict[str, Any]) -> MultiTokenProcessor:
    """Return the processor of a recipe with one modality."""
    recipe = Recipe.model_validate(
        {
            "model": {
                "language_model": str(folder / "language_model"),
                "modalities": {
                    "image": {"type": "image", "encoder": str(folder / encoder), **fields}
                },
            },
            "data": {"train": [{"rows": str(folder / "rows.jsonl")}], "max_tokens": 100_000},
            "train": {
                "output_dir": str(folder / "run"),
                "stages": [{"name": "projector", "learn": {"projectors": 1e-3}}],
            },
        }
    )
    return build_processor(recipe, root=str(folder))


def scanned(processor: MultiTokenProcessor, rows: Any) -> tuple[float, ScanReport]:
    """Return the seconds of a scan, and its report."""
    began = time.perf_counter()
    read = partial(row_to_sample, processor=processor, modalities=["image"])
    report = scan(rows, read, progress=False)
    return time.perf_counter() - began, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--size", type=int, nargs=2, default=[640, 480], metavar=("W", "H"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=110)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_language_model(folder / "language_model")
        for kind in ("clip", "siglip2"):
            tiny_image_encoder(folder / kind, kind)
        num_bytes = write_rows(folder, options.rows, tuple(options.size))
        rows = load_rows(str(folder / "rows.jsonl"))
        for encoder, (kind, fields) in ENCODERS.items():
            processor = processor_of(folder, kind, fields)
            processors = {"decode": processor, "headers": replace(processor, lengths_only=True)}
            seconds: dict[str, list[float]] = {name: [] for name in processors}
            reports: dict[str, ScanReport] = {}
            # In turns: the first reading of a file fills the system's cache for both.
            for _ in range(options.rounds):
                for name, one in processors.items():
                    took, reports[name] = scanned(one, rows)
                    seconds[name].append(took)
            # A faster reading that gives other lengths would be no gain.
            assert reports["headers"] == reports["decode"], "headers give other lengths"
            assert reports["headers"].num_decoded == 0
            decode, headers = (statistics.median(seconds[name]) for name in processors)
            results.append({"encoder": encoder, "decode_s": decode, "headers_s": headers})
    table = Table(
        "encoder",
        "decode, s",
        "headers, s",
        "ratio",
        title=f"{options.rows:,} JPEGs of {options.size[0]} x {options.size[1]}, "
        f"{num_bytes / 1000:.0f} kB each, {options.rounds} rounds",
    )
    for one in results:
        decode, headers = one["decode_s"], one["headers_s"]
        table.add_row(one["encoder"], f"{decode:.2f}", f"{headers:.2f}", f"{decode / headers:.1f}")
    console.print(table)
    if options.out is not None:
        facts = {"machine": machine_facts(), "rows": options.rows, "size": options.size}
        options.out.write_text(json.dumps({**facts, "results": results}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
