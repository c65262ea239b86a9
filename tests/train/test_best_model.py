"""Saving of a stage: the best checkpoint, checkpoints of the model alone, stages of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from multi_token.errors import CheckpointError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
LEARN = {
    "projectors": {"projectors": 1e-2},
    "adapter": {"projectors": 1e-2, "adapter": 1e-2},
    "full": {"projectors": 1e-2, "language_model": 1e-2},
}
# the loss falls, so the highest one is that of the first evaluation, between two saves
BEST = {
    "max_steps": 4,
    "eval_steps": 1,
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,
    "lr_scheduler_type": "constant",
}


def trained(fields: dict[str, Any], console: Console | None = None) -> Any:
    return train(Recipe.model_validate(fields), console=console or Console(quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{f.relative_to(folder)}: {k}": v for f in files for k, v in load_file(f).items()}


def watched(fields: dict[str, Any], data: Path) -> dict[str, Any]:
    fields["data"]["eval"] = [{"rows": str(data / "rows.jsonl")}]
    fields["train"] |= {"blind": False, "num_samples": 0}
    return fields


@pytest.mark.parametrize("learn", LEARN)
def test_the_result_is_the_best_checkpoint_though_it_lies_between_two_saves(
    recipe_fields: Fields, data: Path, tmp_path: Path, learn: str
) -> None:
    # a run whose rows are grouped by length evaluates too
    args = {**BEST, "train_sampling_strategy": "group_by_length"}
    stages = [{"name": learn, "learn": LEARN[learn], "args": args}]
    text = StringIO()
    fields = watched(recipe_fields(tmp_path / "run", stages=stages), data)
    model = trained(fields, Console(file=text, width=200))
    stage = tmp_path / "run" / "stages" / f"1-{learn}"
    losses = {
        entry["step"]: entry["eval_loss"]
        for entry in json.loads((stage / "done.json").read_text())["log_history"]
        if "eval_loss" in entry
    }
    assert max(losses, key=losses.__getitem__) == 1
    assert "the checkpoint of step 1 is the best by loss" in text.getvalue()
    best = weights(stage / "checkpoint-1")
    result = weights(stage / "result")
    assert best.keys() == result.keys()
    assert all(torch.equal(result[key], best[key]) for key in best)
    held = model.projectors["image"].state_dict()
    assert all(torch.equal(best[f"projectors.safetensors: image.{k}"], held[k]) for k in held)


def test_a_checkpoint_of_the_model_alone_is_not_continued_from(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    args = {"max_steps": 2, "save_steps": 1, "save_only_model": True}
    stages = [{"name": "projector", "learn": {"projectors": 1e-2}, "args": args}]
    fields = recipe_fields(tmp_path / "run", stages=stages)
    trained(fields)
    stage = tmp_path / "run" / "stages" / "1-projector"
    (tmp_path / "run" / "config.json").unlink()
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "checkpoint-2")
    with pytest.raises(CheckpointError, match="lacks the optimizer's state and cannot be"):
        trained(fields)


@contextmanager
def recorded_autocast() -> Iterator[list[bool]]:
    """Record if autocast is on, for each forward of the language model in a step of training."""
    found: list[bool] = []
    within: list[Any] = []

    def before(module: Any, _: Any) -> None:
        if isinstance(module, MultiTokenForConditionalGeneration):
            within.append(module)
        elif within and module is within[-1].language_model and module.training:
            found.append(torch.is_autocast_enabled("cpu"))

    def after(module: Any, *_: Any) -> None:
        if within and module is within[-1]:
            within.pop()

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def test_each_stage_trains_in_the_precision_it_asks_for(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    stages = [
        {"name": f"stage{number}", "learn": {"projectors": 1e-2}, "args": {**args, "max_steps": 1}}
        for number, args in enumerate(({}, {"bf16": True}, {"bf16": False}))
    ]
    with recorded_autocast() as found:
        trained(recipe_fields(tmp_path / "run", stages=stages))
    assert found == [False, True, False]


def test_one_process_that_sees_several_devices_says_how_to_train_on_all(
    recipe_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as torch answers on a machine with eight
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    text = StringIO()
    args = {"per_device_train_batch_size": 2, "max_steps": 1}
    stages = [{"name": "projector", "learn": {"projectors": 1e-2}}]
    fields = recipe_fields(tmp_path / "run", stages=stages, args=args)
    trained(fields, Console(file=text, width=200))
    assert "8 devices are visible, and this process trains on one" in text.getvalue()
    assert "`torchrun --nproc-per-node 8 -m multi_token train RECIPE`" in text.getvalue()
