"""benchmarks/gpu.py at toy size on the CPU, so that it works the first time it meets a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu

SCRIPT = Path(gpu.__file__)


def figures(folder: Path, part: str) -> list[dict[str, Any]]:
    """Rows of a part, without the facts of the machine before them."""
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()][1:]


@pytest.mark.slow
def test_every_part_gives_its_figures_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    page = (tmp_path / "gpu.md").read_text()
    assert done.returncode == 0, page
    assert page.count("Complete (") == len(gpu.TITLES)
    *steps, answers = figures(tmp_path, "parity")
    assert len(steps) == 3 * 2 * 2 and all(row["equal"] for row in [*steps, answers])
    trained = figures(tmp_path, "training")
    assert [row["by"] for row in trained] == 2 * ["ours", "LLaVA + Trainer"]
    for one, other in (trained[:2], trained[2:]):
        assert one["loss of 8 rows"] == pytest.approx(other["loss of 8 rows"], rel=1e-3)
    runs = figures(tmp_path, "qlora")
    assert [row["weights"] for row in runs] == ["bfloat16", "4bit"]
    assert all(row["last loss"] < row["first loss"] for row in runs)
    assert all(row["tokens/s"] > 0 and row["TFLOP/s"] > 0 for row in [*trained, *runs])
    (served,) = figures(tmp_path, "serving")
    assert served["equal to `generate`"] == served["prompts"] == 8
    assert served["all clients tokens/s"] > served["one client tokens/s"]


def test_a_part_that_takes_too_long_leaves_its_reason_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "serving", 0.2)
    part = gpu.run_part("serving", tmp_path, toy=True)
    assert not part.is_good
    assert "**Not complete**: stopped after 0.2 s, its limit" in gpu.render({"serving": part})


def test_mfu_needs_a_known_peak() -> None:
    row = {"by": "ours", "tokens/s": 10_000, "TFLOP/s": 494.5}
    facts = dict.fromkeys(("python", "torch", "transformers"), "1")
    for name, cell in (("NVIDIA H200", "| 50% |"), ("Unheard of", "MFU is left out")):
        part = gpu.Part([row], {**facts, "device": name})
        assert cell in gpu.render({"training": part})


def test_the_page_has_figures_of_a_gpu_or_says_that_they_are_missing() -> None:
    page = gpu.PAGE.read_text(encoding="utf-8")
    assert page == gpu.render({}) or ("GiB, CUDA" in page and "toy size" not in page)
