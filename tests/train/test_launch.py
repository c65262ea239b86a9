"""The command line in several processes prints once, and ends with a message."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.launchers import accelerate_launch, launched, torchrun

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


def test_a_failed_command_leaves_no_process_group(text_recipe: Path) -> None:
    # else gloo's threads abort a process in ten at its end, which hides its exit code
    code = (
        "import sys; from multi_token.cli import main; from torch import distributed\n"
        "try: main()\n"
        "finally: print('left behind:', distributed.is_initialized(), file=sys.stderr)"
    )
    start = f'{sys.executable} -c "{code}" train {text_recipe} train.seed=$RANK'
    shown = launched(2, ["--no-python", "bash", "-c", start], fails=True)
    assert "error: the recipe of process 1 differs from that of process 0" in shown
    assert "left behind: False" in shown
    assert "left behind: True" not in shown
