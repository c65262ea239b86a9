"""Frozen encoders in half precision (`dtype` of a modality): their features and training."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.formats import to_conversation
from multi_token.encoders import cast_encoder
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality, PretrainedModality
from multi_token.modalities.image import ImageModality
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.registry import _BUILT_INS, build, resolve
from multi_token.testing.conformance import ClaimFailed, Subject, works_in_bfloat16
from multi_token.testing.encoders import (
    tiny_clap,
    tiny_image_encoder,
    tiny_video_encoder,
    tiny_wav2vec2,
)
from multi_token.train.run import train
from multi_token.types import Features

Fields = Callable[..., dict[str, Any]]

OTHERS: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    **{
        kind: ("image", lambda folder, kind=kind: {"encoder": tiny_image_encoder(folder, kind)})
        for kind in ("siglip", "siglip2", "dinov2", "dinov2_with_registers")
    },
    "wav2vec2": ("speech", lambda folder: {"encoder": tiny_wav2vec2(folder)}),
    "clap, fused": ("sound", lambda folder: {"encoder": tiny_clap(folder, fused=True)}),
    **{
        kind: (
            "video",
            lambda folder, kind=kind: {
                "encoder": tiny_video_encoder(folder, kind),
                "read_as": "clip",
                "features": "patches",
            },
        )
        for kind in ("videomae", "vjepa2", "timesformer", "vivit")
    },
}
"""Kind of encoder -> its modality and the fields of an instance, beyond the kit's examples."""


class Cancelling(Encoder):
    """Add and subtract a large number: half precision keeps little of the value."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.tensor(1e4))

    def forward(self, **inputs: Tensor) -> Features:
        means = inputs["pixel_values"].mean((2, 3))
        return Features((means + self.large - 1e4)[:, None])


class HalfImage(ImageModality):
    """An image, with that encoder."""

    def build_encoder(self) -> Any:
        return Cancelling()


def test_the_conformance_kit_names_an_encoder_that_does_not_bear_bfloat16(parts: Path) -> None:
    images = tuple(Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    trial = Subject(HalfImage(encoder=str(parts / "clip")), images, Fetch())
    with pytest.raises(ClaimFailed, match="source 0 has other features with `dtype: bfloat16`"):
        works_in_bfloat16(trial)


NOT_LOADED = {"timeseries", "vector"}
"""Modalities without the field, whose inputs must not be rounded."""


def example(kind_of_input: str, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    folder.mkdir()
    found = resolve("modality", kind_of_input).example(folder)  # type: ignore[reportAttributeAccessIssue]
    assert found is not None
    return found


@pytest.mark.parametrize("kind", [*sorted(_BUILT_INS["modality"].keys() - NOT_LOADED), *OTHERS])
def test_each_encoder_gives_nearly_the_same_features_in_bfloat16(kind: str, tmp_path: Path) -> None:
    kind_of_input, fields_of = OTHERS.get(kind, (kind, lambda _: {}))
    fields, sources = example(kind_of_input, tmp_path / "example")
    changed = fields_of(tmp_path / "encoder")
    if "read_as" in changed:
        fields = {}
    modality = build("modality", {"type": kind_of_input, **fields, **changed}, Modality)
    assert works_in_bfloat16(Subject(modality, tuple(sources), Fetch())) == "dtype: bfloat16"


def test_only_modalities_of_pretrained_models_have_a_precision() -> None:
    without = {
        name
        for name in _BUILT_INS["modality"]
        if not issubclass(resolve("modality", name), PretrainedModality)
    }
    assert without == NOT_LOADED


def lowered(fields: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    fields["model"]["modalities"]["image"]["dtype"] = dtype
    return fields


def composed(fields: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)


def trained(fields: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=300)
    train(Recipe.model_validate(fields), console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def losses(shown: str) -> list[str]:
    return re.findall(r"loss ([0-9.]+)", shown)


def batch_of(model: Any, data: Path) -> Any:
    row = {
        "id": "red",
        "images": [str(data / "red.png")],
        "messages": [
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": "red"},
        ],
    }
    sample = model.processor(to_conversation(row, ["image"], row_id="red"))
    return Collator(model.modalities, model.processor.chat.filler_id)([sample])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_frozen_encoder_takes_half_the_bytes_and_all_that_learns_stays_float32(
    recipe_fields: Fields, tmp_path: Path, data: Path, dtype: str
) -> None:
    whole, half = (
        composed(recipe_fields(tmp_path)),
        composed(lowered(recipe_fields(tmp_path), dtype)),
    )
    first, second = (sum(p.nbytes for p in m.encoder("image").parameters()) for m in (whole, half))
    assert second == first / 2
    assert {p.dtype for p in half.projectors.parameters()} == {torch.float32}
    inputs = batch_of(half, data)["media"]["image"]["inputs"]
    assert inputs["pixel_values"].dtype == torch.float32, "data workers know nothing of it"
    ours, theirs = half.encode("image", inputs), whole.encode("image", inputs)
    assert ours.values.dtype == torch.float32
    assert 0 < float((ours.values - theirs.values).norm()) < 0.05 * float(theirs.values.norm())
    half.projectors.requires_grad_(True)
    batch = batch_of(half, data)
    half.train()(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.projectors.parameters())


def test_a_run_keeps_the_precision_of_its_encoders(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    shown = trained(lowered(recipe_fields(tmp_path / "run")))
    assert "encoder of image: bfloat16, " in shown
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert {p.dtype for p in model.encoder("image").parameters()} == {torch.bfloat16}
    inputs = batch_of(model, data)["media"]["image"]["inputs"]
    assert torch.equal(model.encode("image", inputs).values, again.encode("image", inputs).values)
    row = {"images": [str(data / "red.png")], "messages": [{"role": "user", "content": "<image>?"}]}
    assert model.generate([row], max_new_tokens=3) == again.generate([row], max_new_tokens=3)


def test_features_of_another_precision_are_not_taken_for_these(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    cache = {"feature_cache": {"path": str(tmp_path / "features")}}
    plain = trained(lowered(recipe_fields(tmp_path / "plain")))
    kept = trained(lowered(recipe_fields(tmp_path / "kept", **cache)))
    assert losses(plain) == losses(kept) != []
    assert len(FeatureCache(tmp_path / "features")) == 4
    trained(recipe_fields(tmp_path / "whole", **cache))
    assert len(FeatureCache(tmp_path / "features")) == 8
    trained(lowered(recipe_fields(tmp_path / "again", **cache)))
    assert len(FeatureCache(tmp_path / "features")) == 8


@pytest.mark.parametrize(
    ("learn", "dtypes"),
    [
        (1e-5, {torch.float32}),
        ({"lr": 1e-5, "last_layers": 1}, {torch.float32}),
        ({"lr": 1e-4, "lora": {"r": 2}}, {torch.float32, torch.bfloat16}),
    ],
)
def test_what_learns_of_an_encoder_is_float32_whatever_it_was(
    recipe_fields: Fields, tmp_path: Path, data: Path, learn: Any, dtypes: set[Any]
) -> None:
    stage = {
        "name": "both",
        "learn": {"projectors": 1e-2, "encoders": {"image": learn}},
        "args": {"max_steps": 3},
    }
    trained(lowered(recipe_fields(tmp_path / "run", stages=[stage])))
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert {p.dtype for p in model.encoder("image").parameters()} == dtypes
    untouched = composed(lowered(recipe_fields(tmp_path / "run")))
    inputs = batch_of(model, data)["media"]["image"]["inputs"]
    ours, before = (m.encode("image", inputs).values for m in (model, untouched))
    assert ours.dtype == torch.float32
    assert not torch.equal(ours, before), "it has learned"


class Rotary(Encoder):
    """A weight, statistics that a file holds, and frequencies that none does."""

    dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("frequencies", torch.rand(2), persistent=False)

    def forward(self, **inputs: Tensor) -> Features:
        assert inputs["mask"].dtype == torch.bool
        return Features(self.norm(inputs["values"]), inputs["mask"])


def test_buffers_that_no_file_holds_keep_their_precision() -> None:
    encoder = Rotary().eval()
    cast_encoder(encoder, torch.bfloat16)
    assert encoder.frequencies.dtype == torch.float32
    assert encoder.norm.running_mean is not None
    assert encoder.norm.running_mean.dtype == encoder.norm.weight.dtype == torch.bfloat16
    values, mask = torch.rand(3, 2), torch.ones(3, dtype=torch.bool)
    features = encoder(values=values, mask=mask)
    assert features.values.dtype == torch.float32
    encoder.float()
    assert torch.equal(encoder(values=values, mask=mask).values, encoder.norm(values))
