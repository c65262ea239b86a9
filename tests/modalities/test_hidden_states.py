"""modalities/hidden_states.py: layers after the one that is taken cost nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from multi_token.modalities.hidden_states import HiddenStates
from multi_token.modalities.image import ImageModality
from multi_token.modalities.speech import SpeechModality
from multi_token.testing import tiny_image_encoder
from multi_token.testing.encoders import tiny_whisper

IMAGE = Image.effect_noise((50, 30), 90).convert("RGB")
TONE = np.sin(np.arange(8000) / 9).astype("float32")


def modality_of(kind: str, folder: Path, layer: Any) -> tuple[Any, Any]:
    """A modality that takes this state, and something for it."""
    if kind == "whisper":
        encoder = tiny_whisper(folder / kind)
        return SpeechModality(encoder=encoder, layer=layer), TONE
    return ImageModality(encoder=tiny_image_encoder(folder / kind, kind), layer=layer), IMAGE


def count_runs(layer: nn.Module) -> list[None]:
    """An entry for each time that the layer answers."""
    runs: list[None] = []
    layer.register_forward_hook(lambda *_: runs.append(None))
    return runs


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "whisper"])
def test_layers_after_the_one_taken_are_not_run_and_the_features_are_those_of_all(
    tmp_path: Path, kind: str
) -> None:
    modality, item = modality_of(kind, tmp_path, 1)
    encoder = modality.build_encoder()  # runs it once
    inputs = modality.collate([modality.prepare(item)])
    layers = super(type(encoder), encoder).layers()
    assert len(layers) > 1
    last, needed = count_runs(layers[-1]), count_runs(layers[0])
    with torch.no_grad():
        encoder.states = HiddenStates((1,))
        whole = encoder(**inputs).values
        assert (len(last), len(needed)) == (1, 1)
        again = encoder(**inputs).values
    assert (len(last), len(needed)) == (1, 2)
    assert torch.equal(whole, again)


def test_an_encoder_that_learns_is_run_whole(tmp_path: Path) -> None:
    modality, item = modality_of("clip", tmp_path, -2)
    encoder = modality.build_encoder().requires_grad_(True)
    inputs = modality.collate([modality.prepare(item)])
    last = count_runs(super(type(encoder), encoder).layers()[-1])
    for _ in range(2):
        encoder(**inputs).values.sum().backward()
    assert len(last) == 2


def test_a_tower_whose_states_are_not_its_layers_outputs_is_run_whole() -> None:
    class Doubled(nn.Module):
        """Gives out twice what its layers do."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor, output_hidden_states: bool = False) -> Any:
            states = [x]
            for layer in self.layers:
                x = layer(x)
                states.append(2 * x)
            return type("Output", (), {"hidden_states": states})

    tower, x = Doubled(), torch.ones(1, 4)
    states = HiddenStates((-2,))
    last = count_runs(tower.layers[-1])
    with torch.no_grad():
        found = [
            states(tower, list(tower.layers), lambda **options: tower(x, **options))[0]
            for _ in range(2)
        ]
        expected = 2 * tower.layers[1](tower.layers[0](x))
    assert len(last) == 2
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
