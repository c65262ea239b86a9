"""train.args.deepspeed: ZeRO of stages 1 and 2 learns what one process does, and goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train
from tests.train.launchers import launched
from tests.train.test_distributed import assert_equal_runs

ASIDE = Path(sys.prefix) / "deepspeed"
SCRIPT = Path(__file__).with_name("in_processes.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ASIDE.is_dir() and find_spec("deepspeed") is None,
        reason="deepspeed is not there; `make test-slow` puts it into .venv/deepspeed",
    ),
]

Fields = Callable[..., dict[str, Any]]
AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(scope="module")
def fields_of(recipe_fields: Fields, data: Path, tmp_path_factory: Any) -> Fields:
    """Fields of a run of six steps of four rows; of the second step's, two have no image."""
    folder = tmp_path_factory.mktemp("zero")
    rows = []
    for number, answer in enumerate(("red", "blue", "green", "white") * 2):
        shown = number not in (6, 7)
        row: dict[str, Any] = {
            "id": str(number),
            "messages": [
                {"role": "user", "content": "What is " + ("<image>?" if shown else "it?")},
                {"role": "assistant", "content": " ".join([answer] * (1 + number % 3))},
            ],
        }
        if shown:
            row["images"] = [str(data / f"{answer}.png")]
        rows.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(rows))

    def fields(out: Path, learn: str, *, stage: int | None = None, **args: Any) -> dict[str, Any]:
        common = {
            "use_cpu": True,
            "logging_steps": 1,
            "max_steps": 6,
            "save_steps": 2,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "report_to": [],
            "per_device_train_batch_size": 4,
        }
        if stage is not None:
            config = folder / f"zero{stage}.json"
            config.write_text(json.dumps({**AUTO, "zero_optimization": {"stage": stage}}))
            common |= {"per_device_train_batch_size": 2, "deepspeed": str(config)}
        rates = {"projectors": 3e-3, learn: 2e-3}
        stages = [{"name": "tune", "learn": rates}]
        made = recipe_fields(out, stages=stages, args={**common, **args}, adapter={"r": 4})
        made["data"] = {"train": [{"rows": str(folder / "rows.jsonl")}]}
        return made

    return fields


@pytest.fixture(scope="module")
def alone(fields_of: Fields, tmp_path_factory: Any) -> Callable[[str], Path]:
    """The folder of a run by one process without deepspeed, each trained once."""
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)

    def run(learn: str) -> Path:
        out = folder / learn
        if not out.exists():
            fields = fields_of(out, learn)
            train(Recipe.model_validate(fields), console=Console(quiet=True))
        return out

    return run


@pytest.fixture(scope="module")
def two(fields_of: Fields, tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    """All that two processes are asked, in one start of them."""
    folder = tmp_path_factory.mktemp("two")
    halved = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    runs: list[dict[str, Any]] = [
        {"name": "one", "fields": fields_of(folder / "one", "adapter", stage=1)},
        {"name": "two", "fields": fields_of(folder / "two", "adapter", stage=2)},
        {"name": "all", "fields": fields_of(folder / "all", "language_model", stage=2)},
        {"name": "halved", "fields": fields_of(folder / "halved", "adapter", stage=2, **halved)},
        {"name": "cut", "fields": fields_of(folder / "cut", "adapter", stage=2), "stop_at": 3},
        {"name": "on", "fields": fields_of(folder / "cut", "adapter", stage=2)},
    ]
    job, seen = folder / "job.json", folder / "seen.json"
    job.write_text(json.dumps({"out": str(seen), "runs": runs, "deepspeed": True}))
    launched(2, [str(SCRIPT), str(job)], beside=[ASIDE])
    return folder, json.loads(seen.read_text())


@pytest.mark.parametrize(
    ("name", "learn"),
    [("one", "adapter"), ("two", "adapter"), ("all", "language_model"), ("halved", "adapter")],
)
def test_zero_in_two_processes_learns_what_one_process_does(
    two: Any, alone: Any, name: str, learn: str
) -> None:
    folder, seen = two
    assert [one.get("error") for one in seen[name]] == [None, None]
    assert [one["wrapper"] for one in seen[name]] == ["DeepSpeedEngine"] * 2
    assert_equal_runs(alone(learn), folder / name)


def test_zero_goes_on_from_its_checkpoint(two: Any, alone: Any) -> None:
    folder, seen = two
    assert all("stopped at step 3 of 6" in one["error"] for one in seen["cut"])
    assert [one["steps"] for one in seen["on"]] == [3, 3]
    assert_equal_runs(alone("adapter"), folder / "cut")
