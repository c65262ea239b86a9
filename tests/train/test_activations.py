"""train.args.activation_checkpointing: layers that run again learn the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from multi_token.recipe.recipe import Recipe
from multi_token.train import stage as stage_module
from multi_token.train.run import train

pytestmark = pytest.mark.slow

EVERY = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}


class Forwards(TrainerCallback):
    """How often each layer of the language model ran in the first step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.counts:
            return
        layers = [
            module
            for name, module in given["model"].language_model.named_modules()
            if name.rpartition(".")[0].endswith("layers")
        ]
        self.counts = [0] * len(layers)
        for i, layer in enumerate(layers):
            layer.input_layernorm.register_forward_hook(lambda *_, i=i: self._count(i))

    def _count(self, i: int) -> None:
        self.counts[i] += 1


@pytest.mark.parametrize("learn", [{"projectors": 1e-2}, {"projectors": 1e-2, "adapter": 1e-2}])
def test_every_second_layer_runs_again_and_the_weights_are_the_same(
    learn: Any,
    recipe_fields: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: dict[str, Forwards] = {}
    learned: dict[str, dict[str, torch.Tensor]] = {}
    for name, args in (("kept", {}), ("again", EVERY)):
        forwards = counted[name] = Forwards()

        class Watched(stage_module.MultiTokenTrainer):
            def __init__(self, *given: Any, forwards: Forwards = forwards, **more: Any) -> None:
                super().__init__(*given, **more)
                self.add_callback(forwards)

        monkeypatch.setattr(stage_module, "MultiTokenTrainer", Watched)
        common = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 2}
        fields = recipe_fields(
            tmp_path / name, stages=[{"name": "s", "learn": learn}], args={**common, **args}
        )
        model = train(Recipe.model_validate(fields), console=Console(quiet=True))
        learned[name] = {
            key: value
            for key, value in model.state_dict().items()
            if "project" in key or "lora" in key
        }
    once, again = counted["kept"].counts, counted["again"].counts
    assert len(once) == 2 and once[0] == once[1]
    assert sorted(again) == [once[0], 2 * once[0]]
    for key, value in learned["kept"].items():
        torch.testing.assert_close(learned["again"][key], value, atol=1e-6, rtol=1e-5, msg=key)
