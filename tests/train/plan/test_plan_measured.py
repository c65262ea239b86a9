"""The plan of a stage against the run right after: tokens, FLOPs and memory (train/plan/).

The time of a step is measured by benchmarks/plan.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from multi_token.recipe.recipe import Recipe
from multi_token.train import stage as stage_module
from multi_token.train.dpo import PreferenceDataset
from multi_token.train.plan.estimate import StagePlan, peak_memory, plan_stage
from multi_token.train.run import train

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]
ARGS = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "logging_steps": 100,
    "save_steps": 100,
    "report_to": [],
    "train_sampling_strategy": "sequential",
}


class Ran(TrainerCallback):
    """Plans a stage that is ready to go; then counts its steps, or the most memory they take."""

    def __init__(self, trainer: Any, *, memory: bool) -> None:
        self.trainer = trainer
        self.memory = memory
        self.planned: StagePlan = plan_stage(trainer, "s", try_steps=True)
        rows = trainer.train_dataset
        self.planned_lengths = list(rows.lengths) if isinstance(rows, PreferenceDataset) else []
        tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
        self.weights = sum(t.nbytes for t in {id(t): t for t in tensors}.values())
        self.num_steps = 0
        self.peak = [0]
        self.stack = ExitStack()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.memory:  # apart, since watching it takes time
            self.peak = self.stack.enter_context(peak_memory())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.num_steps += 1

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.stack.close()

    @property
    def num_bytes(self) -> int:
        """The most that tensors took, weights included."""
        return self.weights + self.peak[0]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Plans the stage of a recipe and runs it right after, in this process."""
    bar = stage_module.ProgressBarCallback
    torch.set_num_threads(1)

    def run(fields: dict[str, Any], *, memory: bool = False) -> Ran:
        found: list[Ran] = []

        def planned(trainer: Any, *more: Any) -> Any:
            found.append(Ran(trainer, memory=memory))
            trainer.add_callback(found[0])
            return bar(trainer, *more)

        monkeypatch.setattr(stage_module, "ProgressBarCallback", planned)
        train(Recipe.model_validate(fields), console=Console(quiet=True))
        return found[0]

    return run


@pytest.fixture(scope="module")
def language_model(parts: Path, tmp_path_factory: Any) -> str:
    """Four layers, so that a step is more than its overhead."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(parts / "language_model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("four") / "language_model"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fields_of(
    recipe_fields: Fields, data: Path, language_model: str, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Fields of a run on images with answers of different lengths; every four rows are alike."""

    def row(number: int) -> dict[str, Any]:
        words = "red blue green white " * (2 + 2 * (number % 4))
        return {
            "id": str(number),
            "images": [str(data / "red.png")],
            "messages": [{"role": "user", "content": "What is <image>?"}],
            "chosen": words.strip(),
            "rejected": f"{words} {words} no".strip(),
        }

    def fields(
        out: Path, *, learn: Any, args: Any = None, dpo: Any = None, **more: Any
    ) -> dict[str, Any]:
        stage = {"name": "s", "learn": learn, "dpo": dpo}
        made = recipe_fields(
            out, stages=[stage], args={**ARGS, **(args or {})}, adapter={"r": 4}, **more
        )
        made["model"]["language_model"] = language_model
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps(row(i)) + "\n" for i in range(16)))
        made["data"] = {"train": [{"rows": str(rows)}]}
        return made

    return fields


ADAPTER = {"projectors": 1e-3, "adapter": 1e-3}
FULL = {"projectors": 1e-3, "language_model": 1e-3}


@pytest.mark.parametrize(
    "more",
    [
        {"learn": {"projectors": 1e-3}},
        {"learn": ADAPTER},
        {"learn": FULL},
        {"learn": FULL, "args": {"gradient_accumulation_steps": 2}},
        {"learn": FULL, "args": {"optim": "sgd"}},
        {"learn": ADAPTER, "args": {"activation_checkpointing": True}},
        {"learn": ADAPTER, "args": {"train_sampling_strategy": "random"}, "packing": True},
        {"learn": ADAPTER, "dpo": {}},
        {"learn": FULL, "dpo": {}},
    ],
    ids=str,
)
def test_planned_memory_is_within_a_fifth_of_the_most_that_the_run_takes(
    fields_of: Fields, ran: Callable[..., Ran], tmp_path: Path, more: Any
) -> None:
    one = ran(fields_of(tmp_path / "run", **more), memory=True)
    assert one.num_bytes > 1.1 * one.weights, "weights alone would prove nothing"
    assert one.planned.memory.total == pytest.approx(one.num_bytes, rel=0.2)
    beside = one.planned.memory.total - sum(one.planned.memory.weights.values())
    assert beside == pytest.approx(one.peak[0], rel=0.2), "beside the weights, too"


@pytest.mark.parametrize(
    "more",
    [
        {"learn": ADAPTER},
        {"learn": FULL, "args": {"gradient_accumulation_steps": 2}},
        {"learn": ADAPTER, "dpo": {}},
    ],
    ids=str,
)
def test_planned_tokens_and_flops_a_step_are_those_that_the_run_counts(
    fields_of: Fields, ran: Callable[..., Ran], tmp_path: Path, more: Any
) -> None:
    one = ran(fields_of(tmp_path / "run", **more))
    trial, step_metrics = one.planned.dry_run, one.trainer.step_metrics
    assert trial is not None and one.planned.num_steps == one.num_steps == 6
    assert one.planned.tokens_per_step == step_metrics.total("tokens") / 6
    flops = trial.flops_per_token * one.planned.tokens_per_step
    assert flops == pytest.approx(step_metrics.total("flops") / 6, rel=1e-6)


def test_lengths_of_pairs_are_known_before_their_media_are_opened(
    fields_of: Fields, ran: Callable[..., Ran], tmp_path: Path
) -> None:
    one = ran(fields_of(tmp_path / "run", learn=ADAPTER, dpo={}))
    assert one.planned_lengths == one.trainer.train_dataset.lengths, "as the reference found them"
    assert all(rejected > chosen > 10 for chosen, rejected in one.planned_lengths)
