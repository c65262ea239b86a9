"""Figures that only a GPU can show, as docs/benchmarks/gpu.md: ten minutes on one H200.

    python benchmarks/gpu.py [--write] [--out FOLDER] [--only parity,training]

Without a GPU the same runs at toy size on the CPU, so that it works the first time it meets one.
It needs no network. Each part is a process with a time limit: one that dies, or runs out of memory
or time, leaves its reason on the page, and the others go on. `--write` replaces the page in docs/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "gpu.md"
COMMAND = "python benchmarks/gpu.py --write"

LIMITS = {"parity": 60, "tests": 120, "training": 200, "qlora": 110, "serving": 110}
"""Part -> its most seconds: ten minutes in all."""
TITLES = {
    "parity": "The CPU and the GPU agree",
    "tests": "Tests marked `gpu`",
    "training": "A 7B with CLIP-L/336, and transformers' LLaVA with `Trainer`",
    "qlora": "A recipe in bfloat16 and in 4 bits",
    "serving": "Eight clients of the local engine",
}
NOTES = {
    "parity": "Tiny models, the same weights and batch on both. Gradients are those of everything "
    "trained, as one vector; apart: the norm of their difference, as a share of their norm. "
    "float32 is without TF32; bfloat16 is autocast. Answers are greedy, in float32.",
    "tests": "Tests of kernels, host syncs, 4-bit layers, planned memory and the local engine.",
    "training": "Random weights in Mistral 7B's shape, one copy for both; bfloat16 autocast, "
    "sdpa, AdamW, 8 rows of one image a step, read and decoded by 8 data workers. Ours packs and "
    "computes logits at supervised positions only. In turns; medians. FLOPs are those of real "
    "tokens, for both; the loss of the first 8 rows shows that both compute the same.",
    "qlora": "`multi-token train`, packed, with LoRA on all linear layers: Mistral 7B's layers, 4 "
    "of the 32. The defaults on a GPU are those that the run names.",
    "serving": "The 7B with an image in each prompt, greedy. Without prefix cache and media cache. "
    "In bfloat16 a batch of another size rounds otherwise, and so some answers may differ.",
}
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0}
"""Part of a device's name -> dense bfloat16 TFLOP/s by its datasheet; the first that fits."""


@dataclass
class Part:
    """Result of a part: rows of figures, and the reason if it ended early."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """True if it ended, all that should be equal is, and no test failed."""
        return not self.fault and all(
            row.get("equal", True) and not row.get("failed") for row in self.rows
        )


def peak_tflops(device: str) -> float | None:
    """Return the peak of a device, by its name."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


# ---- running


def missing_packages() -> list[str]:
    """Return the packages that a part needs and that are not installed."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = re.findall(
        r'^    "([\w-]+)', text.partition("dependencies = [")[2].split("]")[0], re.M
    )
    missing = []
    for name in [*needed, "pytest"]:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    # rows come from files here, and never from the hub
    return [name for name in missing if name != "datasets"]


def run_part(name: str, out: Path, *, toy: bool) -> Part:
    """Run a part in a process of its own, which may not outlast its limit."""
    log, found = out / f"{name}.log", out / f"{name}.jsonl"
    found.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--part", name, "--out", str(out)] + ["--toy"] * toy
    if name == "tests":
        # only files with such tests: others import packages that a GPU machine may lack
        files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in read(p)]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={out / 'tests.xml'}", *map(str, files)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    part, began = Part(), time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
        try:
            code = process.wait(LIMITS[name])
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # with its data workers, whichever way it ended
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    part.seconds = round(time.monotonic() - began, 1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if code is None:
        part.fault = f"stopped after {LIMITS[name]} s, its limit"
    elif code < 0:
        part.fault = f"ended by signal {signal.Signals(-code).name}"
    elif code and name != "tests":
        part.fault = _error(lines) or f"ended with exit code {code}"
    if name == "tests" and code is not None:
        _read_tests(out / "tests.xml", part, lines)
    elif found.is_file():
        part.facts, *part.rows = [json.loads(line) for line in found.read_text().splitlines()]
    return part


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _error(log: Sequence[str]) -> str:
    """Return the last error of a log, or else its last line."""
    errors = [line for line in log if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return [*log[-1:], *errors][-1][:500] if log else ""


def _read_tests(path: Path, part: Part, log: Sequence[str]) -> None:
    if not path.is_file():
        part.fault = _error(log) or "pytest wrote nothing"
        return
    counts: dict[str, Any] = dict.fromkeys(("passed", "failed", "skipped"), 0)
    cases = list(ElementTree.parse(path).iter("testcase"))
    for case in cases:
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
            part.fault += f"{case.get('name')} failed. "
        else:
            counts["skipped" if "skipped" in kinds else "passed"] += 1
    if not cases:
        part.fault = _error(log) or "no test ran"
    part.rows = [counts]


def run_here(name: str, out: Path, *, toy: bool) -> None:
    """Compute a part in this process; its figures are lines of `out`/NAME.jsonl."""
    import torch
    from gpu_models import FULL, TOY
    from gpu_parts import PARTS

    from multi_token.report.machine import machine_facts

    device = torch.device("cpu" if toy else "cuda")
    facts: dict[str, Any] = dict(machine_facts())
    if device.type == "cuda":
        torch.cuda.set_device(0)
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        facts |= {"device": properties.name, "memory": f"{memory:.0f} GiB"}
        facts["cuda"] = str(torch.version.cuda)
    with tempfile.TemporaryDirectory() as folder, (out / f"{name}.jsonl").open("w") as stream:
        print(json.dumps(facts), file=stream, flush=True)
        for row in PARTS[name](device, TOY if toy else FULL, Path(folder)):
            print(json.dumps(row), file=stream, flush=True)


# ---- the page


def render(parts: Mapping[str, Part]) -> str:
    """The page; without parts it says that figures are missing."""
    lines = ["# On a GPU", ""]
    facts = next((part.facts for part in parts.values() if part.facts), {})
    if not parts:
        lines += [
            "**The figures are missing**: no GPU could be had. On a machine with one, "
            f"`{COMMAND}` replaces this page by its figures, in ten minutes on an H200, without a "
            "network. It needs the packages of `pyproject.toml` (all but `datasets`), pytest, and "
            "bitsandbytes for the part in 4 bits.",
            "",
            "CI runs the same script at toy size on the CPU. It also ran with transformers 5.17.0 "
            "(torch 2.13.0, huggingface_hub 1.33.0) on 2026-11-30; torch 2.11 was *not tried*.",
            "",
        ]
    elif facts:
        device = facts.get("device", f"no GPU, toy size on the CPU ({facts.get('cpu')})")
        peak = peak_tflops(device)
        against = f"MFU is against {peak:g} TFLOP/s" if peak else "MFU is left out: unknown peak"
        versions = ", ".join(f"{k} {facts[k]}" for k in ("python", "torch", "transformers"))
        memory = f" ({facts['memory']}, CUDA {facts['cuda']})" if "memory" in facts else ""
        cpu = f"{facts.get('cores')} cores of {facts.get('cpu')}"
        lines += [
            f"`{COMMAND}`, {facts.get('date')}, {device}{memory}, {cpu}, {versions}. {against}.",
            "",
        ]
    for name, title in TITLES.items():
        if parts and name not in parts:
            continue
        lines += [f"## {title}", "", NOTES[name], ""]
        if parts:
            lines += _figures(parts[name], peak_tflops(str(facts.get("device"))))
    return "\n".join(lines).rstrip() + "\n"


def _figures(part: Part, peak: float | None) -> list[str]:
    lines: list[str] = []
    rows = [dict(row) for row in part.rows]
    said = {row.pop(key, "") for row in rows for key in ("defaults", "packs")} - {""}
    while rows:
        # rows of one kind are a table
        keys = list(rows[0])
        alike = [row for row in rows if list(row) == keys]
        rows = [row for row in rows if list(row) != keys]
        if peak is not None and "TFLOP/s" in keys:
            for row in alike:
                row["MFU"] = f"{row['TFLOP/s'] / peak:.0%}"
            keys = list(alike[0])
        lines += [_line(keys), _line(["---"] * len(keys))]
        lines += [_line([_cell(row[key]) for key in keys]) for row in alike]
        lines.append("")
    for line in sorted(said):
        lines += [f"The run says: {line}.", ""]
    ended = f"**Not complete**: {part.fault.strip()}" if part.fault else "Complete"
    return [*lines, f"{ended} ({part.seconds} s).", ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return ("yes" if value else "**no**") if isinstance(value, bool) else str(value)


def main() -> None:
    """Run the parts and write the page. Exit code 1 if one is not complete, or not equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="logs and page")
    parser.add_argument("--only", help=f"parts, with commas: {', '.join(TITLES)}")
    parser.add_argument("--toy", action="store_true", help="toy size on the CPU, with a GPU too")
    parser.add_argument("--write", action="store_true", help=f"replace {PAGE.relative_to(ROOT)}")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := missing_packages():
        raise SystemExit(f"missing packages: {', '.join(missing)}; install them and start again")
    if options.part:
        run_here(options.part, options.out, toy=options.toy)
        return
    import torch

    toy = options.toy or not torch.cuda.is_available()
    if toy and options.write:
        raise SystemExit("--write needs a GPU: figures of the CPU have no place in docs/")
    names = options.only.split(",") if options.only else list(TITLES)
    if unknown := sorted({*names} - {*TITLES}):
        raise SystemExit(f"--only: no part is called {unknown[0]!r}; there is {', '.join(TITLES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Part] = {}
    page = PAGE if options.write else options.out / "gpu.md"
    for name in names:
        print(f"{name}: at most {LIMITS[name]} s", flush=True)
        parts[name] = run_part(name, options.out, toy=toy)
        # after each part: what is done is kept, whatever comes next
        page.write_text(render(parts), encoding="utf-8")
        print(f"  {parts[name].fault or 'complete'} ({parts[name].seconds} s)", flush=True)
    print(read(page))
    if not all(part.is_good for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
