"""The plan of a run is right, and trying steps leaves no trace (train/plan/)."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from multi_token.cli import app
from multi_token.collate import Collator
from multi_token.data.dataset import ConversationDataset
from multi_token.data.files.open import load_rows
from multi_token.language_model.lora import attach_adapter
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec, Trainable
from multi_token.train import plan_run, train
from multi_token.train.batch_plan import PaddedBatches
from multi_token.train.plan.estimate import (
    dry_run,
    estimate_memory,
    format_bytes,
    format_duration,
    largest_batch,
    logits_bytes,
    optimizer_bytes,
    plan_stage,
    plan_warnings,
)
from multi_token.train.plan.oom import OomFacts, memory_suggestions
from multi_token.train.trainer import MultiTokenTrainer
from multi_token.train.training_args import training_arguments

Fields = Callable[..., dict[str, Any]]


def of_numpy() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def learning(**rates: float) -> Trainable:
    return Trainable.model_validate(rates)


@pytest.fixture
def trainer_of(recipe_fields: Fields, data: Path, tmp_path: Path) -> Callable[..., Any]:
    """A trainer that is ready to go; keyword arguments are TrainingArguments."""

    def build(learn: Trainable, **fields: Any) -> MultiTokenTrainer:
        model = MultiTokenForConditionalGeneration.from_spec(
            Recipe.model_validate(recipe_fields(tmp_path)).model
        )
        if learn.adapter is not None:
            model.language_model = attach_adapter(model.language_model, AdapterSpec(r=4))
        assert model.processor is not None
        processor = replace(model.processor, fetch=Fetch(root=str(data)))
        dataset = ConversationDataset(
            load_rows(str(data / "rows.jsonl")), processor, modalities=["image"]
        )
        args = {"use_cpu": True, "max_steps": 6, "per_device_train_batch_size": 2, **fields}
        return MultiTokenTrainer(
            model,
            learn=learn,
            batches=PaddedBatches([len(dataset[i].input_ids) for i in range(len(dataset))]),
            args=training_arguments(tmp_path, args, seed=0, learning_rate=1e-3),
            train_dataset=dataset,
            data_collator=Collator(model.modalities, 0),
        )

    return build


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize(
    "learn",
    [learning(projectors=1e-3, adapter=1e-3), learning(projectors=1e-3, language_model=1e-3)],
    ids=["adapter", "language model"],
)
def test_memory_is_that_of_the_tensors_after_a_step(
    trainer_of: Callable[..., Any], learn: Trainable, optim: str
) -> None:
    trainer = trainer_of(learn, optim=optim, max_steps=1)
    memory = estimate_memory(trainer)
    learned = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    states = trainer.optimizer.state_dict()["state"]
    kept = sum(t.nbytes for s in states.values() for t in s.values() if isinstance(t, torch.Tensor))
    assert memory.optimizer == pytest.approx(kept, rel=0.2, abs=4 * len(learned)), optim
    assert memory.gradients == sum(p.nbytes for p in learned)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    stored = sum(t.nbytes for t in {id(t): t for t in tensors}.values())
    assert sum(memory.weights.values()) == pytest.approx(stored, rel=0.01)


def test_trying_steps_leaves_no_trace(trainer_of: Callable[..., Any]) -> None:
    trainer = trainer_of(learning(projectors=1e-3, adapter=1e-3), weight_decay=0.1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    numbers = torch.get_rng_state(), random.getstate(), of_numpy()
    trial = dry_run(trainer)
    assert trial.seconds_per_token > 0 and trial.num_bytes > 0 and trial.seconds_per_update > 0
    after = trainer.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), of_numpy()) == numbers[1:]
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.optimizer is None and trainer.step_metrics.total("tokens") == 0


def test_a_planned_run_has_the_steps_tokens_and_flops_that_it_then_measures(
    trainer_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(
        learning(projectors=1e-3), max_steps=-1, num_train_epochs=3, logging_steps=1
    )
    planned = plan_stage(trainer, "projector", try_steps=True)
    assert planned.dry_run is not None
    trainer.train()
    assert planned.num_steps == trainer.state.max_steps == 6
    tokens = trainer.step_metrics.total("tokens") / 6
    assert planned.tokens_per_step == pytest.approx(tokens, rel=0.01)
    flops = planned.dry_run.flops_per_token * planned.tokens_per_step * planned.num_steps
    assert flops == pytest.approx(trainer.step_metrics.total("flops"), rel=0.1)
    assert planned.num_rows == 4 and planned.num_tokens == sum(trainer.batches.lengths)
    assert largest_batch(trainer) == 2 * max(trainer.batches.lengths)


def test_activations_grow_with_the_trainable_parts(trainer_of: Callable[..., Any]) -> None:
    some = dry_run(trainer_of(learning(projectors=1e-3)))
    every = dry_run(trainer_of(learning(projectors=1e-3, language_model=1e-3)))
    assert every.num_bytes > some.num_bytes > 0


def test_a_stage_that_does_not_fit_is_warned_of_with_the_lines_to_change(
    trainer_of: Callable[..., Any],
) -> None:
    trainer = trainer_of(learning(projectors=1e-3))
    planned = plan_stage(trainer, "projector", try_steps=True)
    memory = planned.memory
    assert plan_warnings(planned, trainer, capacity=2 * memory.total) == []
    (tight,) = plan_warnings(planned, trainer, capacity=memory.total)
    for key in (
        "model.dtype: bfloat16",
        "model.modalities.image.dtype: bfloat16",
        "model.quantization: 4bit",
        "activation_checkpointing",
    ):
        assert key in tight
    just_one = memory.fixed + 0.6 * (memory.activations or 0)
    (batch,) = plan_warnings(planned, trainer, capacity=round(just_one / 0.9))
    assert "train.args.per_device_train_batch_size: 1 (it is 2" in batch
    (full,) = plan_warnings(
        plan_stage(trainer_of(whole := learning(language_model=1e-3)), "all", try_steps=False),
        trainer_of(whole),
        capacity=1000,
    )
    assert "`adapter` instead of `language_model`" in full and "quantization" not in full


def test_the_plan_is_printed_and_nothing_is_written(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    fields = recipe_fields(tmp_path / "run")
    adapter = {"name": "adapter", "learn": {"adapter": 1e-3}, "args": {"num_train_epochs": 2}}
    fields["train"]["stages"].append(adapter)
    console = Console(record=True, width=300, file=io.StringIO())
    plan_run(Recipe.model_validate(fields), console=console)
    said = console.export_text()
    assert "4 steps of about" in said and "FLOP a step" in said and "s a step" in said
    assert "encoder of image: " in said and "activations of the largest batch: about" in said
    assert said.count("memory per device: ") == 2, "one for each stage"
    assert not (tmp_path / "run").exists()


def test_the_plan_counts_encodings_before_the_first_step(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    many, few = tmp_path / "many.jsonl", tmp_path / "few.jsonl"
    root = {"images": [str(data / "red.png")]}
    many.write_text("".join(json.dumps({**row, **root}) + "\n" for row in 3 * rows))
    few.write_text("".join(json.dumps({**row, **root}) + "\n" for row in rows[:2]))
    others = {"rows": [{"rows": str(few)}]}

    def said(**train: Any) -> str:
        fields = recipe_fields(tmp_path / "run", **train)
        fields["data"]["train"] = [{"rows": str(many)}, {"rows": str(data / "rows.jsonl")}]
        console = Console(record=True, width=300, file=io.StringIO())
        plan_run(Recipe.model_validate(fields), console=console)
        return console.export_text()

    # four names and one more for a file of theirs; 16 rows
    line = "encodings before the first step (for the closed form, each item once), about "
    assert f"image: 5 {line}" in said()
    assert "image: 5 encodings" in said(closed_form=others), "encoded once for both uses"
    assert "image: 5 encodings" in said(closed_form=None)
    few_items = re.search(r"image: (\d) encodings", said(closed_form=None, calibration_items=2))
    assert few_items is not None and int(few_items[1]) <= 2
    cached = said(feature_cache=True)
    line = "image: 5 encodings before the first step (for the feature cache, each item once)"
    assert line in cached and "(5 were tried)" in cached


def test_a_run_after_its_plan_is_as_without_and_begins_with_a_short_one(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    train(Recipe.model_validate(recipe_fields(tmp_path / "run")), console=console)
    said = console.export_text()
    assert "4 steps of about" in said and "memory per device: " in said
    assert "FLOP a step" not in said, "nothing is tried before a run"


def test_the_command_plans(recipe_fields: Fields, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(recipe_fields(tmp_path / "run"))
    recipe.save(tmp_path / "recipe.yaml")
    said = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--plan"])
    assert said.exit_code == 0, said.output
    assert "in all without evaluation and saving" in said.output
    assert not (tmp_path / "run").exists()


def test_numbers_are_printed_with_their_units() -> None:
    assert [format_bytes(n) for n in (12, 2048, 3 * 2**20, 5.5 * 2**30, 2**41)] == [
        "12 bytes",
        "2.0 KiB",
        "3.0 MiB",
        "5.5 GiB",
        "2,048.0 GiB",
    ]
    assert [format_duration(s) for s in (5, 150, 7500)] == ["5 s", "2 min", "2 h 5 min"]
    ones = [torch.ones(4, 3), torch.ones(5)]
    assert optimizer_bytes("adamw_8bit", ones) == 34
    assert optimizer_bytes("lion_32bit", ones) == 68


def test_logits_of_a_larger_batch_are_planned_up_to_the_bound_of_a_chunk(
    trainer_of: Callable[..., Any],
) -> None:
    model = trainer_of(learning(projectors=1e-2)).multi_token_model
    of_token = 3 * 4 * model.language_model.config.vocab_size
    model.logits_bytes = 100 * of_token // 3
    assert [logits_bytes(model, num) for num in (0, 7, 500)] == [
        (num * of_token, 100 * of_token) for num in (0, 7, 500)
    ]
    model.capabilities.supports_chunked_logits = False
    assert logits_bytes(model, 7) == (7 * of_token, math.inf)


def test_fewer_logits_at_a_time_are_suggested_where_a_batch_has_more() -> None:
    facts = OomFacts(
        device=torch.device("cpu"),
        step=1,
        frozen_language_model=True,
        frozen_dtypes=frozenset({torch.uint8}),
        float32_encoders=(),
        batch_size=4,
        longest_row=1000,
        pack_tokens=None,
        activation_checkpointing=True,
        logits_budget=256 * 2**20,
        logits_of_token=4 * 50_000,
    )
    budget = "train.logits_megabytes: 64 (it is 256, and a loss holds up to four times as much)"
    assert memory_suggestions(facts, None) == [budget]
    assert memory_suggestions(replace(facts, longest_row=80), None) == []
    assert memory_suggestions(replace(facts, logits_budget=None), None) == []
