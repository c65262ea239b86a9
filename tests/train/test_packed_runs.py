"""Runs with packed rows: the losses of padded ones, interrupted or not, shared or not."""

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
from safetensors.torch import load_file
from transformers import TrainerCallback

from multi_token.errors import Interrupted, LanguageModelError
from multi_token.language_model.segment_attention import SEGMENT_ATTENTION
from multi_token.recipe.recipe import Recipe
from multi_token.train import stage as stage_module
from multi_token.train.resume import last_checkpoint
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=QUIET)


def losses(out: Path) -> list[float]:
    (done,) = (out / "stages").glob("1-*/done.json")
    return [e["loss"] for e in json.loads(done.read_text())["log_history"] if "loss" in e]


ADAPTER = {"name": "adapter", "learn": {"projectors": 1e-2, "adapter": 1e-2}}


def test_a_pack_of_all_rows_trains_as_their_batch_does(
    mixed_fields: Fields, tmp_path: Path
) -> None:
    stages = [{**ADAPTER, "args": {"max_steps": 4, "per_device_train_batch_size": 6}}]
    trained(mixed_fields(tmp_path / "padded", stages=stages))
    model = trained(mixed_fields(tmp_path / "packed", stages=stages, packing=True))
    found, expected = losses(tmp_path / "packed"), losses(tmp_path / "padded")
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-4)
    assert model.language_model.get_base_model().config._attn_implementation == "sdpa"


def test_accumulated_packs_train_as_one_batch_does(mixed_fields: Fields, tmp_path: Path) -> None:
    """Each epoch is one step, however its rows are packed."""
    whole = {"max_steps": 4, "per_device_train_batch_size": 6}
    trained(mixed_fields(tmp_path / "padded", stages=[{**ADAPTER, "args": whole}]))
    parts = {"max_steps": 4, "gradient_accumulation_steps": 8}
    trained(
        mixed_fields(
            tmp_path / "packed", stages=[{**ADAPTER, "args": parts}], packing=True, pack_tokens=64
        )
    )
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-4)


class _InterruptAt(TrainerCallback):
    """Sends this process the signal that Ctrl-C sends, at one step."""

    def __init__(self, trainer: Any, step: int, seen: list[str]) -> None:
        self.trainer, self.step, self.seen = trainer, step, seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        model = self.trainer.multi_token_model.language_model
        self.seen.append(
            getattr(model, "get_base_model", lambda: model)().config._attn_implementation
        )
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [1, 4])
def test_interrupted_and_resumed_equals_uninterrupted(
    mixed_fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """In the first epoch, and in a later one, which is packed otherwise."""
    stages = [{**ADAPTER, "args": {"max_steps": 7}}]
    packing: dict[str, Any] = {"stages": stages, "packing": True, "pack_tokens": 64}
    trained(mixed_fields(tmp_path / "whole", **packing, pack_items=3))

    bar, seen = stage_module.ProgressBarCallback, []

    def bar_and_signal(trainer: Any, console: Any, title: str) -> Any:
        trainer.add_callback(_InterruptAt(trainer, step, seen))
        assert len(trainer.get_train_dataloader()) in (3, 4)
        return bar(trainer, console, title)

    fields = mixed_fields(tmp_path / "cut", **packing, pack_items=3)
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "ProgressBarCallback", bar_and_signal)
        with pytest.raises(Interrupted, match=f"stopped at step {step + 1} of 7"):
            trained(fields)
    assert set(seen) == {SEGMENT_ATTENTION}
    checkpoint = last_checkpoint(tmp_path / "cut" / "stages" / "1-adapter")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{step + 1}"
    trained(fields)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name in ("projectors.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(tmp_path / run / name) for run in ("cut", "whole"))
        assert ours and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_packing_on_a_model_that_leaks_is_refused_before_rows_are_read(
    recipe_fields: Fields, families: Any, tmp_path: Path
) -> None:
    families.save_tiny_model("Mamba2", tmp_path / "mamba2")
    fields = recipe_fields(tmp_path / "run", packing=True)
    fields["model"]["language_model"] = str(tmp_path / "mamba2")
    with pytest.raises(LanguageModelError, match="Mamba2ForCausalLM cannot take packed rows"):
        trained(fields)


@pytest.mark.parametrize("system", [None, "You are a helpful assistant of few words."])
def test_rows_that_share_a_prefix_train_as_rows_on_their_own_do(
    recipe_fields: Fields, data: Path, tmp_path: Path, system: str | None
) -> None:
    first = [] if system is None else [{"role": "system", "content": system}]
    rows = [
        {
            "images": [str(data / f"{colour}.png")],
            "messages": [
                *first,
                {"role": "user", "content": f"Here is <image>. {text}"},
                {"role": "assistant", "content": answer},
            ],
        }
        for colour in ("red", "blue")
        for text, answer in (("Is it red?", "yes"), ("What is it?", colour), ("One?", "no"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"max_steps": 4, "per_device_train_batch_size": 6, "use_cpu": True, "logging_steps": 1}
    for name, share in (("rows", False), ("shared", True)):
        fields = recipe_fields(
            tmp_path / name, stages=[ADAPTER], args=args, packing={"share": share}
        )
        fields["data"]["train"] = [{"rows": str(path)}]
        trained(fields)
    assert len(losses(tmp_path / "rows")) == 4
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "rows"), rel=1e-4)
