"""Trained tensors of encoders are saved with the run and come back to the bit, and nothing else."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from multi_token.checkpoint.save import save
from multi_token.convert.export import export
from multi_token.data.formats import to_conversation
from multi_token.encoders import attach_lora
from multi_token.errors import CheckpointError, Interrupted
from multi_token.generate import collate_prompts, drop_last_answer
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import Trainable
from multi_token.train import stage as stage_module
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
FILE = "encoders.safetensors"
LORA = {"lr": 1e-3, "lora": {"r": 2, "lora_dropout": 0.1}}
CHOICES: dict[str, dict[str, Any]] = {
    "all": {"encoders": {"image": 1e-3}},
    "last 2": {"encoders": {"image": {"lr": 1e-3, "last_layers": 2}}},
    "lora": {"encoders": {"image": LORA}},
    "from scratch": {"projectors": {"pulse": 1e-3}},
}


def changed(fields: dict[str, Any], choice: str) -> Any:
    """A model whose chosen encoder weights are other than those it was composed with."""
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    learn = Trainable.model_validate(CHOICES[choice])
    for name, spec in learn.encoders.items():
        if spec.lora is not None:
            attach_lora(name, model.encoder(name), spec.lora)
    freeze_and_unfreeze(model, learn)
    with torch.no_grad():
        for parameter in model.encoders.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def logits(model: Any, fields: dict[str, Any]) -> torch.Tensor:
    rows = Path(fields["data"]["train"][0]["rows"]).read_text().splitlines()
    row = next(row for row in map(json.loads, rows) if row["id"] == "blue")
    conversation = to_conversation(row, list(model.modalities), row_id="blue")
    batch = collate_prompts(model.processor, [drop_last_answer(conversation, model)])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits


def same(first: Path, second: Path, *files: str) -> bool:
    pairs = [(load_file(first / file), load_file(second / file)) for file in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_was_trained_comes_back_to_the_bit(
    mixed_fields: Fields, tmp_path: Path, choice: str
) -> None:
    fields = mixed_fields(tmp_path)
    model = changed(fields, choice)
    save(model, tmp_path / "run")
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(model, fields), logits(again, fields))
    assert again.trained_encoders == model.trained_encoders
    save(again, tmp_path / "again")
    assert same(tmp_path / "run", tmp_path / "again", FILE, "projectors.safetensors")
    tensors = load_file(tmp_path / "run" / FILE)
    tensors = {k: v.roll(1) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "again" / FILE)
    assert not torch.equal(
        logits(model, fields),
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "again"), fields),
    )


@pytest.mark.parametrize("choice", CHOICES)
def test_the_file_holds_exactly_what_was_ever_trained(
    mixed_fields: Fields, tmp_path: Path, choice: str
) -> None:
    model = changed(mixed_fields(tmp_path), choice)
    save(model, tmp_path / "run")
    learned = {n for n, p in model.encoders.named_parameters() if p.requires_grad}
    scratch = {f"pulse.{key}" for key in model.encoder("pulse").state_dict()}
    tensors = load_file(tmp_path / "run" / FILE)
    if choice == "all":
        learned = {f"image.{key}" for key in model.encoder("image").state_dict()}
    assert tensors.keys() == learned | scratch
    assert all(t.dtype == torch.float32 for t in tensors.values() if t.is_floating_point())


def test_layers_that_learned_in_different_stages_are_all_saved(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    for last in (2, 1):
        learn = {"encoders": {"image": {"lr": 1e-3, "last_layers": last}}}
        freeze_and_unfreeze(model, Trainable.model_validate(learn))
    save(model, tmp_path)
    layers = {name.split(".")[4] for name in load_file(tmp_path / FILE)}
    assert layers == {"1", "2"}


def test_nothing_is_written_of_frozen_encoders(recipe_fields: Fields, tmp_path: Path) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    freeze_and_unfreeze(model, Trainable.model_validate(CHOICES["all"]))
    save(model, tmp_path)
    assert (tmp_path / FILE).is_file()
    frozen = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    save(frozen, tmp_path)
    assert not (tmp_path / FILE).exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoders"] == {}
    del config["encoders"]  # as one that was written before encoders could learn
    (tmp_path / "config.json").write_text(json.dumps(config))
    MultiTokenForConditionalGeneration.from_pretrained(tmp_path)


def test_a_missing_an_unknown_and_a_forgotten_tensor_are_refused(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    for choice in ("last 2", "lora"):
        run = tmp_path / choice
        save(changed(mixed_fields(tmp_path), choice), run)
        tensors = load_file(run / FILE)
        name = next(n for n in sorted(tensors) if n.startswith("image."))
        save_file({k: v for k, v in tensors.items() if k != name}, run / FILE)
        with pytest.raises(CheckpointError, match=rf"encoders\.safetensors .* lacks {name}"):
            MultiTokenForConditionalGeneration.from_pretrained(run)
        save_file({**tensors, "image.tower.new": torch.zeros(2)}, run / FILE)
        with pytest.raises(CheckpointError, match=r"has unknown image\.tower\.new"):
            MultiTokenForConditionalGeneration.from_pretrained(run)
    (run / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"encoders\.safetensors cannot be read"):
        MultiTokenForConditionalGeneration.from_pretrained(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "encoders": {}}))
    with pytest.raises(CheckpointError, match="lacks the weights of the encoder of 'pulse'"):
        MultiTokenForConditionalGeneration.from_pretrained(run)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_merged_export_keeps_trained_encoders(
    mixed_fields: Fields, tmp_path: Path, choice: str
) -> None:
    fields = mixed_fields(tmp_path)
    model = changed(fields, choice)
    save(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", to="merged")
    assert torch.equal(
        logits(model, fields),
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "out"), fields),
    )
    assert same(tmp_path / "run", tmp_path / "out", FILE)


class _InterruptAt(TrainerCallback):
    """Sends this process the signal that Ctrl-C sends, at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("image", [LORA, 1e-3, {"lr": 1e-3, "last_layers": 1}], ids=str)
def test_interrupted_and_resumed_equals_uninterrupted(
    mixed_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: Any
) -> None:
    args = {"max_steps": 5}
    stages = [
        {"name": "a", "learn": {"projectors": 1e-2, "encoders": {"image": image}}, "args": args},
        {"name": "b", "learn": {"projectors": 1e-2, "adapter": 1e-2}, "args": args},
    ]
    train(Recipe.model_validate(mixed_fields(tmp_path / "whole", stages=stages)), console=QUIET)
    cut = Recipe.model_validate(mixed_fields(tmp_path / "cut", stages=stages))
    bar = stage_module.ProgressBarCallback

    def bar_and_signal(trainer: Any, console: Any, title: str) -> Any:
        trainer.add_callback(_InterruptAt(2))
        return bar(trainer, console, title)

    # the second command goes on with stage a, and is stopped in stage b
    for num_steps, stage in ((3, "a"), (3, "b")):
        with monkeypatch.context() as patch:
            patch.setattr(stage_module, "ProgressBarCallback", bar_and_signal)
            with pytest.raises(
                Interrupted, match=f"stopped at step {num_steps} of 5 of stage {stage}"
            ):
                train(cut, console=QUIET)
    train(cut, console=QUIET)
    files = (FILE, "projectors.safetensors", "adapter/adapter_model.safetensors")
    assert same(tmp_path / "whole", tmp_path / "cut", *files)
    start, end = (load_file(tmp_path / "cut" / p / FILE) for p in ("stages/0-closed-form", "."))
    assert {n.split(".")[0] for n in start} == {"pulse"}
    assert not torch.equal(start["pulse.blocks.0.weight"], end["pulse.blocks.0.weight"])
