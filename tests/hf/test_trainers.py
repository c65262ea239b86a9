"""transformers' Trainer and TRL's trainers train a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import multi_token
from multi_token.hf import RowCollator
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

# TRL sets an argument of transformers that has another name now
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")

Fields = Callable[..., dict[str, Any]]
ARGS: dict[str, Any] = {
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    # six rows: each step is an epoch, since Trainer accumulates over no border of epochs
    "gradient_accumulation_steps": 3,
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
    # the defaults of `train` are others: cosine, after a warmup
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "use_cpu": True,
    "report_to": [],
}


@pytest.fixture(scope="module")
def run(mixed_fields: Fields, tmp_path_factory: Any) -> Path:
    """A run with `image` and `pulse`, whose encoder was trained too."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    args = {**ARGS, "max_steps": 2}
    train(Recipe.model_validate(mixed_fields(folder, args=args)), console=Console(quiet=True))
    return folder


@pytest.fixture(scope="module")
def expected(run: Path, mixed_fields: Fields, tmp_path_factory: Any) -> list[float]:
    """Losses of `multi-token train` that goes on from the run, with all projectors."""
    folder = tmp_path_factory.mktemp("further") / "run"
    stage = {"name": "projector", "learn": {"projectors": 1e-2}}
    fields = mixed_fields(folder, stages=[stage], init_from=str(run), args=ARGS)
    train(Recipe.model_validate(fields), console=Console(quiet=True))
    done = json.loads((folder / "stages" / "1-projector" / "done.json").read_text())
    return [entry["loss"] for entry in done["log_history"] if "loss" in entry]


def rows_of(fields: dict[str, Any]) -> list[dict[str, Any]]:
    path = Path(fields["data"]["train"][0]["rows"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    columns = dict.fromkeys(("messages", "images", "pulse"))
    return [{**columns, **row} for row in rows]


def loaded(run: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    model = AutoModelForMultimodalLM.from_pretrained(str(run))
    # it starts from random weights, so `train` trains it with its projector
    model.encoders["pulse"].requires_grad_(True)
    return AutoProcessor.from_pretrained(str(run)), model


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_plain_trainer_has_the_losses_of_train_and_saves_runs(
    run: Path, expected: list[float], mixed_fields: Fields, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments

    processor, model = loaded(run)
    args: Any = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, remove_unused_columns=False, save_steps=5, **ARGS
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows_of(mixed_fields(tmp_path)),  # type: ignore[arg-type]
        data_collator=RowCollator(processor),
        processing_class=processor,
    )
    found = losses(trainer)
    assert len(found) == 5
    assert found == pytest.approx(expected, rel=1e-5)
    # its checkpoint is a run
    again = multi_token.MultiTokenForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint-5"
    )
    for name, tensor in again.projectors.state_dict().items():
        assert torch.equal(tensor, model.projectors.state_dict()[name])


def test_sft_trains_on_conversations(
    run: Path, expected: list[float], mixed_fields: Fields, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer  # type: ignore[reportPrivateImportUsage]

    processor, model = loaded(run)
    args = SFTConfig(
        str(tmp_path),
        learning_rate=1e-2,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_strategy="no",
        bf16=False,
        **ARGS,
    )
    from datasets import Dataset

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows_of(mixed_fields(tmp_path))),
        data_collator=RowCollator(processor),
        processing_class=processor,
    )
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_grpo_raises_the_reward_of_answers_about_media(
    run: Path, mixed_fields: Fields, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import GRPOConfig  # type: ignore[reportPrivateImportUsage]

    from multi_token.hf.grpo import MediaGRPOTrainer

    processor, model = loaded(run)
    prompts = [
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "pulse", "pulse": [float(number == i) for i in range(5)]},
                        {"type": "text", "text": "What is it?"},
                    ],
                }
            ]
        }
        for number in range(4)
    ]
    before = {name: p.clone() for name, p in model.projectors.named_parameters()}

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(one[0]["content"])) for one in completions]

    args = GRPOConfig(
        str(tmp_path),
        learning_rate=1e-2,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        # completions of another step: the log-probabilities of before are computed too
        num_iterations=2,
        max_completion_length=4,
        remove_unused_columns=False,
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = MediaGRPOTrainer(
        model,
        args=args,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        processing_class=processor,
    )
    assert len(losses(trainer)) == 2
    changed = [n for n, p in model.projectors.named_parameters() if not torch.equal(p, before[n])]
    assert changed and all(name.startswith("pulse") for name in changed)
    # the first log-probabilities are those of the policy itself, with its media
    ratios = [e["clip_ratio/region_mean"] for e in trainer.state.log_history if "loss" in e]
    assert ratios[0] == 0.0
