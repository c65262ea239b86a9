"""The command line in several processes prints once, and ends with a message."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.launchers import ROOT, accelerate_launch, launched, torchrun

pytestmark = pytest.mark.slow

ROWS_OF_TEXT = [
    {
        "id": word,
        "messages": [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": word},
        ],
    }
    for word in ("red", "blue")
]


@pytest.fixture
def text_recipe(recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A recipe of two steps on rows of text, for the command line."""
    args = {
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
    }
    stages = [{"name": "projector", "learn": {"adapter": 3e-3}}]
    fields = recipe_fields(tmp_path / "run", stages=stages, args=args)
    text = [row for row in ROWS_OF_TEXT for _ in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    fields["data"] = {"train": [{"rows": str(tmp_path / "rows.jsonl")}]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(fields))
    return recipe


@pytest.mark.parametrize("by", [torchrun, accelerate_launch])
def test_the_command_line_prints_once_for_all_processes(text_recipe: Path, by: Any) -> None:
    shown = launched(2, ["-m", "multi_token", "train", str(text_recipe)], by=by)
    assert shown.count("saved to") == shown.count("ask it:") == shown.count("first batch:") == 1
    # rows of a step are those of two processes
    assert (
        json.loads(next((text_recipe.parent / "run").rglob("whole.json")).read_text())[
            "rows_per_step"
        ]
        == 4
    )
    assert (text_recipe.parent / "run" / "config.json").is_file()


def test_processes_with_other_recipes_end_with_a_message_and_an_exit_code(
    text_recipe: Path,
) -> None:
    start = f"{sys.executable} -m multi_token train {text_recipe} train.seed=$RANK"
    shown = launched(2, ["--no-python", "bash", "-c", start], fails=True)
    assert "error: the recipe of process 1 differs from that of process 0 in " in shown
    assert "multi_token/train" not in shown, "a traceback"
    assert set(re.findall(r"exitcode *: (-?\d+)", shown)) <= {"1", "-15"}
    assert not (text_recipe.parent / "run").exists()


@pytest.mark.parametrize(
    ("error", "code"), [("", 0), ("MultiTokenError", 1), ("Interrupted", 130), ("ValueError", 1)]
)
def test_a_pending_collective_does_not_change_the_exit_code(
    tmp_path: Path, error: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.broken_group", "end", str(tmp_path / "meet"), error],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert ("lost another process" in done.stderr) == bool(error)
    assert "a tracker ends its run" in done.stdout
    assert ("Traceback" in done.stderr) == (error == "ValueError")
