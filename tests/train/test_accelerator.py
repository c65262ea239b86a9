"""Defaults on an accelerator: the fast ones, each off by a key, and none on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.train.accelerator import (
    Accelerator,
    accelerator_defaults,
    cast_frozen_encoders,
    describe_defaults,
    find_accelerator,
)
from multi_token.train.training_args import training_arguments

GPU = Accelerator(has_bf16=True, has_tf32=True, num_cores=64, num_processes=4)


@pytest.mark.parametrize(
    ("fields", "accelerator", "expected"),
    [
        ({}, GPU, {"bf16": True, "tf32": True, "dataloader_num_workers": 8}),
        ({"bf16": False, "tf32": False, "dataloader_num_workers": 0}, GPU, {}),
        ({"fp16": True}, GPU, {"tf32": True, "dataloader_num_workers": 8}),
        ({"deepspeed": "zero.json", "tf32": False, "dataloader_num_workers": 2}, GPU, {}),
        (
            {},
            Accelerator(False, False, num_cores=12, num_processes=4),
            {"dataloader_num_workers": 3},
        ),
        ({}, Accelerator(False, False, num_cores=4, num_processes=4), {}),
        ({}, Accelerator(False, False, num_cores=64, forks=False), {}),
        ({}, None, {}),
    ],
)
def test_defaults_are_what_the_device_has_and_the_recipe_leaves_open(
    fields: dict[str, Any], accelerator: Accelerator | None, expected: dict[str, Any]
) -> None:
    assert accelerator_defaults(fields, accelerator) == expected


def test_a_run_on_the_cpu_has_none_of_the_defaults(tmp_path: Path) -> None:
    assert find_accelerator({"use_cpu": True}) is None
    args = training_arguments(tmp_path, {"use_cpu": True}, seed=0, learning_rate=1e-3)
    assert not args.bf16 and args.dataloader_num_workers == 0
    config: Any = args.accelerator_config
    assert config.non_blocking is False


def composed(recipe_fields: Any, tmp_path: Path, **image: Any) -> tuple[Any, Recipe]:
    fields = recipe_fields(tmp_path)
    fields["model"]["modalities"]["image"] |= image
    recipe = Recipe.model_validate(fields)
    return MultiTokenForConditionalGeneration.from_spec(recipe.model), recipe


def precisions(model: Any) -> set[torch.dtype]:
    return {p.dtype for p in model.encoder("image").parameters()}


def on(device: str, *, bf16: bool) -> Any:
    """Stand-in for TrainingArguments, of which two fields are read."""
    return SimpleNamespace(device=torch.device(device), bf16=bf16)


def test_frozen_encoders_are_bfloat16_where_the_run_is_and_one_line_says_so(
    recipe_fields: Any, tmp_path: Path
) -> None:
    model, recipe = composed(recipe_fields, tmp_path)
    for args in (on("cpu", bf16=True), on("cuda", bf16=False)):
        cast_frozen_encoders(model, recipe.train, args)
        assert precisions(model) == {torch.float32}
    assert describe_defaults({}, None, model) == []
    cast_frozen_encoders(model, recipe.train, on("cuda", bf16=True))
    assert precisions(model) == {torch.bfloat16}
    (line,) = describe_defaults({"tf32": False}, GPU, model)
    assert line == (
        "on this device by default: bf16, dataloader_num_workers 8, encoder of image in bfloat16 "
        "(off by train.args bf16: false, dataloader_num_workers: 0; "
        "model.modalities.image.dtype: float32)"
    )


def test_an_encoder_that_is_trained_or_has_a_dtype_keeps_its_precision(
    recipe_fields: Any, tmp_path: Path
) -> None:
    model, recipe = composed(recipe_fields, tmp_path, dtype="float32")
    cast_frozen_encoders(model, recipe.train, on("cuda", bf16=True))
    assert precisions(model) == {torch.float32}
    model, recipe = composed(recipe_fields, tmp_path)
    (stage,) = recipe.train.stages
    learn = stage.learn.model_copy(update={"encoders": {"image": None}})
    train = recipe.train.model_copy(update={"stages": [stage.model_copy(update={"learn": learn})]})
    cast_frozen_encoders(model, train, on("cuda", bf16=True))
    assert precisions(model) == {torch.float32}
