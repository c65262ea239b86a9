"""modalities/image.py: any vision encoder, and a promise of tokens that is always kept."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.modalities.image import ImageModality
from multi_token.testing import tiny_image_encoder

KINDS = ["clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers", "efficientnet"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: Any) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    return {kind: tiny_image_encoder(folder / kind, kind) for kind in KINDS}


def images() -> list[Image.Image]:
    return [
        Image.effect_noise((50, 30), 90).convert("RGB"),
        Image.new("RGB", (20, 64), "red"),
    ]


def choices(kind: str) -> list[str]:
    with_cls = kind in ("clip", "dinov2", "dinov2_with_registers")
    return ["patches", "pooled", "mean", *(["cls"] if with_cls else [])]


CASES = [(kind, features) for kind in KINDS for features in choices(kind)]


@pytest.mark.parametrize(("kind", "features"), CASES)
def test_an_encoder_gives_the_promised_number_of_features_in_a_batch_as_alone(
    encoders: dict[str, str], kind: str, features: Any
) -> None:
    modality = ImageModality(encoder=encoders[kind], features=features)
    encoder = modality.build_encoder()
    items = [modality.prepare(image) for image in images()]
    with torch.no_grad():
        together = encoder(**modality.collate(items))
        for row, item in enumerate(items):
            alone = encoder(**modality.collate([item]))
            values, single = together.values[row], alone.values[0]
            if together.mask is not None and alone.mask is not None:
                values, single = values[together.mask[row]], single[alone.mask[0]]
            assert values.shape == (item.num_features, encoder.dim)
            torch.testing.assert_close(values, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "num_patches"),
    [("clip", 16), ("siglip", 16), ("dinov2", 16), ("dinov2_with_registers", 16)],
)
def test_patches_leave_out_the_cls_token_and_registers(
    encoders: dict[str, str], kind: str, num_patches: int
) -> None:
    modality = ImageModality(encoder=encoders[kind])
    assert modality.prepare(images()[0]).num_features == num_patches


def test_a_native_aspect_encoder_takes_as_many_features_as_the_image_has_patches(
    encoders: dict[str, str],
) -> None:
    modality = ImageModality(encoder=encoders["siglip2"])
    wide = modality.prepare(Image.new("RGB", (96, 32)))
    square = modality.prepare(Image.new("RGB", (40, 40)))
    assert wide.num_features != square.num_features
    assert wide.num_features == int(wide.inputs["pixel_attention_mask"].sum())


def test_cls_and_patches_are_what_the_model_itself_returns(encoders: dict[str, str]) -> None:
    from transformers import AutoModel

    tower = AutoModel.from_pretrained(encoders["clip"]).vision_model.eval()
    modality = ImageModality(encoder=encoders["clip"], features="patches", layer=-2)
    inputs = modality.collate([modality.prepare(images()[0])])
    with torch.no_grad():
        hidden = tower(**inputs, output_hidden_states=True)
        ours = modality.build_encoder()(**inputs).values
        cls = ImageModality(encoder=encoders["clip"], features="cls").build_encoder()(**inputs)
    assert torch.equal(ours, hidden.hidden_states[-2][:, 1:])
    assert torch.equal(cls.values[:, 0], hidden.last_hidden_state[:, 0])


def test_an_encoder_without_a_cls_token_says_so(encoders: dict[str, str]) -> None:
    with pytest.raises(MultiTokenError, match="has no CLS token"):
        ImageModality(encoder=encoders["siglip"], features="cls").build_encoder()


def test_constructing_and_pickling_load_nothing(tmp_path: Path) -> None:
    modality = ImageModality(encoder=str(tmp_path / "not there yet"))
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
    assert ImageModality.model_validate(modality.model_dump()) == modality


def test_paths_bytes_and_images_are_read_alike(encoders: dict[str, str], data: Path) -> None:
    modality = ImageModality(encoder=encoders["clip"])
    path = data / "red.png"
    with Image.open(path) as image:
        sources = [str(path), path.read_bytes(), image.copy()]
    values = [modality.prepare(modality.load(s, Fetch())).inputs["pixel_values"] for s in sources]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_an_image_object_over_the_pixel_limit_is_refused(encoders: dict[str, str]) -> None:
    modality = ImageModality(encoder=encoders["clip"], max_pixels=100)
    with pytest.raises(MediaError, match="100"):
        modality.load(images()[1], Fetch())


def test_several_layers_stand_side_by_side_in_each_feature(encoders: dict[str, str]) -> None:
    one, two, both = (
        ImageModality(encoder=encoders["clip"], layer=layer) for layer in (-2, 1, (-2, 1))
    )
    inputs = both.collate([both.prepare(image) for image in images()])
    with torch.no_grad():
        values = [m.build_encoder()(**inputs).values for m in (one, two)]
        joined = both.build_encoder()
        assert torch.equal(joined(**inputs).values, torch.cat(values, dim=-1))
    assert joined.dim == 64
    assert ImageModality.model_validate(both.model_dump(mode="json")) == both


@pytest.mark.parametrize("layer", [9, (-2, -9)])
def test_a_layer_that_is_not_there_is_refused(encoders: dict[str, str], layer: Any) -> None:
    with pytest.raises(MultiTokenError, match="has hidden states 0 to 3 .* asks for layer"):
        ImageModality(encoder=encoders["clip"], layer=layer).build_encoder()


@pytest.mark.parametrize(
    ("kind", "num_prefix"), [("clip", 1), ("siglip", 0), ("dinov2_with_registers", 5)]
)
def test_all_features_are_the_prefix_tokens_and_the_patches(
    encoders: dict[str, str], kind: str, num_prefix: int
) -> None:
    every, patches = (
        ImageModality(encoder=encoders[kind], features=features) for features in ("all", "patches")
    )
    prepared = every.prepare(images()[0])
    with torch.no_grad():
        values = every.build_encoder()(**every.collate([prepared])).values
        of_patches = patches.build_encoder()(**every.collate([prepared])).values
    assert prepared.num_features == values.shape[1] == 16 + num_prefix
    assert torch.equal(values[:, num_prefix:], of_patches)


def test_an_image_padded_to_a_square_is_the_one_that_llava_pads(encoders: dict[str, str]) -> None:
    from transformers import LlavaImageProcessorPil

    oracle = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    modality = ImageModality(encoder=encoders["clip"], pad_to_square=True)
    for image in images():
        theirs = oracle(images=[image], return_tensors="pt")["pixel_values"][0]
        assert torch.equal(modality.prepare(image).inputs["pixel_values"], theirs)
