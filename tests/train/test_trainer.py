"""train/trainer.py: what learns, how fast, and in which order rows come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from multi_token.errors import MultiTokenError, RecipeError
from multi_token.train.trainer import (
    ByLength,
    parameter_groups,
    select_parameters,
    training_arguments,
)
from multi_token.train_spec import AdapterSpec, Learn


def test_each_group_has_its_own_learning_rate_and_nothing_is_in_two(
    recipe_fields: Any, tmp_path: Path
) -> None:
    from multi_token.checkpoint import compose
    from multi_token.language_model import attach_adapter
    from multi_token.recipe import Recipe

    model = compose(Recipe.model_validate(recipe_fields(tmp_path)).model)
    model.projector("image").add_closed_form()
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    learn = Learn(projectors=1e-3, projector_biases=1e-2, adapter=1e-4)
    select_parameters(model, learn)
    groups = {name: (rate, parameters) for name, rate, parameters in parameter_groups(model, learn)}
    assert {name: rate for name, (rate, _) in groups.items()} == {
        "projector_biases": 1e-2,
        "projectors": 1e-3,
        "adapter": 1e-4,
    }
    ids = [id(p) for _, parameters in groups.values() for p in parameters]
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in learning.values()}
    assert not any("closed_form" in name or "encoders" in name for name in learning)
    names = [n for n in learning if n.startswith("language_model.")]
    assert names and all("lora_" in name for name in names)


def test_projectors_of_some_instances_learn_and_the_others_stay_frozen(model: Any) -> None:
    learn = Learn(projectors={"vector": 1e-3}, projector_biases=1e-2)
    select_parameters(model, learn)
    groups = {name: (rate, parameters) for name, rate, parameters in parameter_groups(model, learn)}
    rates = {name: rate for name, (rate, _) in groups.items()}
    assert rates == {"projector_biases": 1e-2, "projector vector": 1e-3}
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    every = {f"projectors.vector.{n}" for n, _ in model.projectors["vector"].named_parameters()}
    assert learning == every
    assert sum(len(parameters) for _, parameters in groups.values()) == len(every)


def test_lora_attaches_to_the_language_model_only(recipe_fields: Any, tmp_path: Path) -> None:
    from multi_token.checkpoint import compose
    from multi_token.language_model import attach_adapter
    from multi_token.recipe import Recipe

    model = compose(Recipe.model_validate(recipe_fields(tmp_path)).model)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A")]
    assert adapted and all(name.startswith("language_model.") for name in adapted)


def test_a_stage_that_would_learn_nothing_is_refused(model: Any) -> None:
    with pytest.raises(MultiTokenError, match="nothing to learn under 'adapter'"):
        select_parameters(model, Learn(adapter=1e-3))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_step": 3}, "did you mean 'max_steps'"),
        ({"learning_rate": 1e-3}, "learning rates are under `learn`"),
        ({"remove_unused_columns": True}, "needed as it is"),
        ({"save_strategy": "sometimes"}, "train args"),
    ],
)
def test_training_arguments_are_checked(fields: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=sentence):
        training_arguments(tmp_path, {"use_cpu": True, **fields}, seed=0, learning_rate=1e-3)


def test_rows_of_one_length_come_together_each_once_and_in_another_order_each_epoch() -> None:
    lengths = [10, 50] * 40 + [10]
    sampler = ByLength(lengths, batch_size=8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(81))
    batches = [[lengths[i] for i in first[k : k + 8]] for k in range(0, 80, 8)]
    assert sum(len(set(batch)) == 1 for batch in batches) >= 5  # by chance: none
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
