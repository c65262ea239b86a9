"""Out of memory: the plan predicts it, a run names the remedy, and the remedy works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from multi_token.recipe.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's"),
]
SCARCE = Path(__file__).with_name("scarce_memory.py")
MIB = 450


@pytest.fixture
def recipe(recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A recipe whose 256 rows make one batch; keyword arguments change its `train` section.

    Rows are text: Pillow says that it has no memory where there still is some.
    """
    rows = [
        {
            "id": f"long {i}",
            "messages": [
                {"role": "user", "content": "Say it often."},
                {"role": "assistant", "content": "red " * 150},
            ],
        }
        for i in range(256)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**train: Any) -> Path:
        stages = [{"name": "tune", "learn": {"adapter": 1e-3}, "args": {"max_steps": 2}}]
        fields = recipe_fields(tmp_path / "run", closed_form=None, stages=stages, **train)
        fields["data"] = {"train": [{"rows": str(tmp_path / "long.jsonl")}], "max_tokens": 4000}
        fields["train"]["args"]["per_device_train_batch_size"] = 256
        fields["train"]["args"]["save_steps"] = 1
        Recipe.model_validate(fields).save(tmp_path / "recipe.yaml")
        return tmp_path / "recipe.yaml"

    return write


def scarce(*args: Any) -> subprocess.CompletedProcess[str]:
    """The command line, with `MIB` more than what its libraries take."""
    command = [sys.executable, str(SCARCE), str(MIB), *map(str, args)]
    env = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # else each thread reserves 64 MiB
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )


def test_the_plan_tries_smaller_batches_and_names_one_that_fits(
    recipe: Callable[..., Path],
) -> None:
    planned = scarce("train", recipe(), "--plan")
    assert planned.returncode == 0, planned.stderr
    advice = re.search(r"per_device_train_batch_size: (\d+) \(it is 256", planned.stderr)
    assert advice is not None, planned.stderr
    assert "there was not enough left when it was tried" in planned.stderr
    size = f"train.args.per_device_train_batch_size={advice[1]}"
    trained = scarce("train", recipe(), size, "train.args.gradient_accumulation_steps=1")
    assert trained.returncode == 0, trained.stderr


def test_a_run_out_of_memory_names_the_changes_and_then_resumes(
    recipe: Callable[..., Path],
) -> None:
    path = recipe(logits_megabytes=60)
    failed = scarce("train", path)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    said = failed.stderr[failed.stderr.index("error: ") :]
    assert said.startswith("error: memory was not enough in step 1 of stage tune, on cpu")
    assert "train.args.per_device_train_batch_size: 128 (it is 256" in said
    assert "train.logits_megabytes: 15 (it is 60, and a loss holds up to four times as much" in said
    smaller = (
        "train.args.per_device_train_batch_size=2",
        "train.args.gradient_accumulation_steps=128",
    )
    assert scarce("train", path, *smaller).returncode == 0


def test_a_pack_that_does_not_fit_is_named(recipe: Callable[..., Path]) -> None:
    planned = scarce("train", recipe(packing=True, pack_tokens=40000), "--plan")
    assert planned.returncode == 1
    assert "Traceback" not in planned.stderr
    assert "a pack does not fit into the memory of cpu" in planned.stderr
    assert "train.pack_tokens: 20000 (it is 40000)" in planned.stderr
