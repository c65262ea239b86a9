"""parameter_groups.py: each parameter learns once, at its own rate, in float32; others are
frozen."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from multi_token.checkpoint.save import save
from multi_token.errors import MultiTokenError, RecipeError
from multi_token.language_model.lora import attach_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.parameter_groups import freeze_and_unfreeze, parameter_groups
from multi_token.train.run import train
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments

Fields = Callable[..., dict[str, Any]]


def composed(fields: dict[str, Any], *, adapter: bool = False) -> Any:
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    if adapter:
        model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    return model


def learn(**fields: Any) -> Trainable:
    return Trainable.model_validate(fields)


def in_optimizer(model: Any, what: Trainable, folder: Path, **args: Any) -> dict[str, Any]:
    """Parameter -> (group, learning rate, weight decay) as torch's optimizer has them."""
    arguments = training_arguments(
        folder, {"use_cpu": True, **args}, seed=0, learning_rate=what.logged_lr
    )
    trainer = MultiTokenTrainer(model, learn=what, batches=PaddedBatches([]), args=arguments)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Any] = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found, "in two groups"
            found[names[id(parameter)]] = (group["name"], group["lr"], group["weight_decay"])
    return found


def test_each_parameter_is_in_one_group_of_the_optimizer_with_its_rate_and_decay(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    model = composed(recipe_fields(tmp_path), adapter=True)
    model.projector("image").add_closed_form()
    what = learn(
        projectors={"lr": 1e-3, "weight_decay": 0.3},
        projector_biases=1e-2,
        adapter={"lr": 1e-4, "weight_decay": 0},
        encoders={"image": {"lr": 1e-6, "last_layers": 1}},
    )
    found = in_optimizer(model, what, tmp_path, weight_decay=0.1)
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == learning.keys()
    assert not any("closed_form" in name for name in learning)
    last_biases = [f"projectors.image.network.branches.{i}.2.bias" for i in range(3)]
    for name, parameter in learning.items():
        decays = parameter.ndim > 1
        if name in last_biases:
            expected: Any = ("projector_biases", 1e-2, 0)
        elif name.startswith("projectors."):
            expected = ("projectors", 1e-3, 0.3 if decays else 0)
        elif name.startswith("encoders."):
            expected = ("encoder image", 1e-6, 0.1 if decays else 0)
        else:
            assert name.startswith("language_model.") and "lora_" in name
            expected = ("adapter", 1e-4, 0)
        assert found[name] == expected, name
    assert set(last_biases) <= found.keys()


def test_projectors_have_their_own_rates_and_decays_and_biases_are_decayed_if_it_is_said(
    model: Any, tmp_path: Path
) -> None:
    what = learn(
        projectors={"vector": {"lr": 1e-3, "weight_decay": 0.2}},
        projector_biases={"lr": 1e-2, "weight_decay": 0.5},
    )
    found = in_optimizer(model, what, tmp_path)
    every = {f"projectors.vector.{n}" for n, _ in model.projectors["vector"].named_parameters()}
    assert found.keys() == every == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found.values()) == {
        ("projector vector", 1e-3, 0.2),
        ("projector vector", 1e-3, 0),
        ("projector_biases", 1e-2, 0.5),
    }


def test_the_whole_language_model_learns_in_one_group_and_tied_weights_once(
    recipe_fields: Fields, tied_language_model: str, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "run")
    fields["model"]["language_model"] = tied_language_model
    model = composed(fields)
    found = in_optimizer(
        model, learn(language_model={"lr": 2e-5, "weight_decay": 0.1}), tmp_path / "run"
    )
    own = {f"language_model.{n}": p for n, p in model.language_model.named_parameters()}
    assert found.keys() == own.keys() and "language_model.lm_head.weight" not in own
    assert all(
        found[name] == ("language_model", 2e-5, 0.1 if p.ndim > 1 else 0) for name, p in own.items()
    )


@pytest.mark.parametrize("part", ["adapter", "language_model"])
def test_what_learns_is_float32_and_what_is_frozen_keeps_its_own_precision(
    recipe_fields: Fields, tmp_path: Path, part: str
) -> None:
    stages = [
        {"name": "a", "learn": {"projectors": 1e-2}, "args": {"max_steps": 1}},
        {"name": "b", "learn": {"projectors": 1e-2, part: 1e-3}, "args": {"max_steps": 1}},
    ]
    fields = recipe_fields(tmp_path / "run", stages=stages)
    fields["model"]["dtype"] = "bfloat16"
    model = train(Recipe.model_validate(fields), console=Console(quiet=True))
    learning = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.language_model.parameters() if not p.requires_grad}
    assert learning == {torch.float32}
    assert frozen == (set() if part == "language_model" else {torch.bfloat16})


def test_the_lines_at_the_start_of_a_stage_name_rate_and_decay(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    what = {"projectors": {"lr": 1e-2, "weight_decay": 0.25}, "language_model": 1e-5}
    args = {"max_steps": 1, "weight_decay": 0.1}
    fields = recipe_fields(tmp_path, stages=[{"name": "a", "learn": what, "args": args}])
    model = train(Recipe.model_validate(fields), console=console)
    said = console.export_text()
    assert "parameters in float32, learning rate 0.01, weight decay 0.25" in said
    num = sum(p.numel() for p in model.language_model.parameters())
    assert (
        f"language_model: {num:,} parameters in float32, learning rate 1e-05, weight decay 0.1"
        in said
    )


def test_lora_attaches_to_the_language_model_only(recipe_fields: Fields, tmp_path: Path) -> None:
    model = composed(recipe_fields(tmp_path), adapter=True)
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted and all(name.startswith("language_model.") for name in adapted)


def test_a_stage_that_would_learn_nothing_is_refused(model: Any) -> None:
    with pytest.raises(MultiTokenError, match="nothing to train under 'adapter'"):
        freeze_and_unfreeze(model, learn(adapter=1e-3))


def test_the_language_model_does_not_learn_under_an_adapter_that_was_made_for_it(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    model = composed(recipe_fields(tmp_path), adapter=True)
    with pytest.raises(MultiTokenError, match="the model's adapter was trained for"):
        freeze_and_unfreeze(model, learn(language_model=1e-5))
    save(model, tmp_path / "a")
    stages = [{"name": "full", "learn": {"language_model": 1e-5}}]
    fields = recipe_fields(tmp_path / "b", init_from=str(tmp_path / "a"), stages=stages)
    with pytest.raises(RecipeError, match="stage 'full' trains `language_model`, but .* has an ad"):
        train(Recipe.model_validate(fields), console=Console(quiet=True))


def test_integers_do_not_learn(recipe_fields: Fields, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    fields = recipe_fields(tmp_path)
    fields["model"]["quantization"] = "4bit"
    model = composed(fields)
    with pytest.raises(MultiTokenError, match=r"quantized; train an `adapter` on it \(QLoRA\)"):
        freeze_and_unfreeze(model, learn(language_model=1e-5))


def test_groups_of_a_stage_are_named(model: Any) -> None:
    what = learn(projectors=1e-3, projector_biases=1e-2)
    groups = parameter_groups(model, what, weight_decay=0.1)
    assert [(group.name, group.lr, group.weight_decay) for group in groups] == [
        ("projector_biases", 1e-2, 0.0),
        ("projectors", 1e-3, 0.1),
    ]
