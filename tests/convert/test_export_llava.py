"""convert/export_llava.py: what transformers loads gives the run's ids, logits and text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from multi_token import MultiTokenForConditionalGeneration
from multi_token.convert.export_llava import export_llava
from multi_token.convert.llava import import_llava
from multi_token.encoders import attach_lora, trainable_parameters
from multi_token.errors import ConvertError
from multi_token.generate import collate_prompts, eos_token_ids, single_question
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.train import AdapterSpec, TrainableEncoder
from multi_token.registry import validate_fields
from multi_token.testing import tiny_image_encoder, tiny_llava
from multi_token.types import Media

NEXT = {
    "tile_grids": [[1, 2], [2, 1], [2, 2]],
    "projector": {"type": "mlp", "line_break": True},
    "layer": [-2, 1],
}
IMAGES: dict[str, dict[str, Any]] = {
    "1.5": {"layer": -2},
    "1.5 padded, all of the last layer": {"features": "all", "pad_to_square": True},
    "next": NEXT,
}


def composed(parts: Path, **image: Any) -> MultiTokenForConditionalGeneration:
    """A model as training leaves it: statistics, biases and LoRA that are not zero."""
    fields = {
        "type": "image",
        "encoder": str(parts / "clip"),
        "projector": {"type": "mlp"},
        **image,
    }
    spec = {"language_model": str(parts / "language_model"), "modalities": {"photo": fields}}
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(
        validate_fields(ModelSpec, spec, where="the recipe")
    )
    model.projector("photo").feature_mean.normal_()
    model.projector("photo").feature_scale.uniform_(0.5, 2.0)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    for parameter in adapter_parameters(model.language_model):
        nn.init.normal_(parameter, std=0.05)  # so that rounding in the merge stays below 1e-5
    return model.eval()


def reloaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def images() -> list[Image.Image]:
    noise = torch.Generator().manual_seed(0)
    sizes = ((30, 50, 3), (64, 20, 3))
    pixels = [torch.randint(0, 256, s, generator=noise, dtype=torch.uint8) for s in sizes]
    return [Image.fromarray(p.numpy()) for p in pixels]


@pytest.mark.parametrize("kind", IMAGES)
@torch.no_grad()
def test_transformers_gives_the_runs_ids_logits_and_text(
    parts: Path, tmp_path: Path, kind: str
) -> None:
    model = composed(parts, **IMAGES[kind])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_llava(model, tmp_path / "out")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    theirs, processor = reloaded(tmp_path / "out")
    assert theirs.config.model_type == ("llava_next" if kind == "next" else "llava")

    two_images = images()
    question = single_question("Which is red?", [Media("photo", image) for image in two_images])
    assert model.processor is not None
    batch = collate_prompts(model.processor, [question])
    turn = {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "\n"},
            {"type": "image"},
            {"type": "text", "text": "\nWhich is red?"},
        ],
    }
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=two_images, text=text, return_tensors="pt")
    ids = batch["input_ids"].clone().view(-1)
    ids[batch["media"]["photo"]["positions"]] = theirs.config.image_token_id
    assert inputs["input_ids"].view(-1).tolist() == ids.tolist()

    ours = model(input_ids=batch["input_ids"], media=batch["media"]).logits
    logits = theirs(**inputs).logits
    num_ids = ours.shape[-1]
    torch.testing.assert_close(logits[..., :num_ids], ours, rtol=1e-5, atol=2e-5)
    # <image> is new in this vocabulary, and never the likeliest
    assert logits.shape[-1] == num_ids + 1
    assert (logits[..., num_ids] < logits.max(-1).values).all()

    stop = eos_token_ids(model)
    new = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=stop)
    (answer,) = processor.batch_decode(new[:, len(ids) :], skip_special_tokens=True)
    assert model.generate([question], max_new_tokens=8) == [answer.strip()]


@pytest.mark.parametrize("learned", [{"lr": 1e-5}, {"lr": 1e-4, "lora": {"r": 2}}], ids=str)
@torch.no_grad()
def test_a_vision_tower_that_was_trained_is_written_as_it_is_now(
    parts: Path, tmp_path: Path, learned: dict[str, Any]
) -> None:
    model = composed(parts, layer=-2)
    spec = TrainableEncoder.model_validate(learned)
    if spec.lora is not None:
        attach_lora("photo", model.encoder("photo"), spec.lora)
    batch = collate_prompts(
        model.require_processor(), [single_question("?", [Media("photo", images()[0])])]
    )
    before = model(input_ids=batch["input_ids"], media=batch["media"]).logits
    for parameter in trainable_parameters("photo", model.encoder("photo"), spec):
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours = model(input_ids=batch["input_ids"], media=batch["media"]).logits
    assert not torch.allclose(ours, before, atol=1e-2)

    export_llava(model, tmp_path / "out")
    theirs, _ = reloaded(tmp_path / "out")
    ids = batch["input_ids"].clone().view(-1)
    ids[batch["media"]["photo"]["positions"]] = theirs.config.image_token_id
    pixels = batch["media"]["photo"]["inputs"]["pixel_values"]
    logits = theirs(input_ids=ids[None], pixel_values=pixels).logits
    torch.testing.assert_close(logits[..., : ours.shape[-1]], ours, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("anyres", [False, True])
def test_what_was_imported_is_exported_to_the_bit(tmp_path: Path, anyres: bool) -> None:
    tiny_llava(tmp_path / "source", anyres=anyres)
    import_llava(tmp_path / "source", tmp_path / "run")
    model = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    export_llava(model, tmp_path / "out")
    (before, asked), (after, asks) = reloaded(tmp_path / "source"), reloaded(tmp_path / "out")
    left, right = before.state_dict(), after.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert asks.chat_template == asked.chat_template
    fields = {"images": images(), "text": "<image> or <image>?", "return_tensors": "pt"}
    theirs, ours = asked(**fields), asks(**fields)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    with torch.no_grad():
        assert torch.equal(before(**theirs).logits, after(**ours).logits)
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"projector": {"type": "expand"}}, "its projector is .*LLaVA's an mlp of 2 layers"),
        ({"projector": {"type": "mlp", "num_layers": 3}}, "LLaVA's an mlp of 2 layers"),
        ({"features": "pooled"}, "it takes `features: pooled`"),
    ],
)
def test_a_run_of_another_shape_is_refused_and_nothing_is_written(
    parts: Path, tmp_path: Path, image: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConvertError, match=reason):
        export_llava(composed(parts, **image), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_closed_form_part_and_a_second_modality_are_refused(
    parts: Path, tmp_path: Path, recipe_fields: Callable[..., dict[str, Any]], model: Any
) -> None:
    fitted = composed(parts)
    fitted.projector("photo").add_closed_form()
    with pytest.raises(ConvertError, match="closed-form part .*closed_form: null"):
        export_llava(fitted, tmp_path / "out")
    with pytest.raises(ConvertError, match=r"has image \(image\), vector \(vector\)"):
        export_llava(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "image", "reason"),
    [
        ("siglip", {}, "has a norm after its last layer"),
        ("dinov2_with_registers", {"layer": -2}, "5 tokens before its patches"),
        ("efficientnet", {"layer": -2}, "one image size, such as CLIP and SigLIP"),
    ],
)
def test_a_vision_tower_that_llava_has_no_place_for_is_refused(
    parts: Path, tmp_path: Path, kind: str, image: dict[str, Any], reason: str
) -> None:
    tower = tiny_image_encoder(tmp_path / kind, kind)
    with pytest.raises(ConvertError, match=reason):
        export_llava(composed(parts, encoder=tower, **image), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_model_that_changes_its_logits_is_refused(parts: Path, tmp_path: Path) -> None:
    """Found by comparing: LLaVA puts a plain linear head over every language model."""
    from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(parts / "language_model")
    config = GraniteConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(tmp_path / "parts" / "language_model")
    tokenizer.save_pretrained(tmp_path / "parts" / "language_model")
    model = composed(tmp_path / "parts", encoder=str(parts / "clip"), layer=-2)
    with pytest.raises(ConvertError, match="gives other logits than this run"):
        export_llava(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bfloat16_language_model_is_exported_in_its_precision(
    parts: Path, tmp_path: Path
) -> None:
    model = composed(parts, layer=-2)
    model.language_model = copy.deepcopy(model.language_model).to(torch.bfloat16)
    export_llava(model, tmp_path / "out")
    theirs, _ = reloaded(tmp_path / "out")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}


def test_a_vision_tower_in_bfloat16_is_exported_with_its_rounded_weights(
    parts: Path, tmp_path: Path
) -> None:
    model = composed(parts, layer=-2, dtype="bfloat16")
    export_llava(model, tmp_path / "out")
    tower: Any = model.encoder("photo").tower
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}, "the run is as it was"
    theirs, _ = reloaded(tmp_path / "out")
    written = dict(theirs.model.vision_tower.named_parameters())
    for name, parameter in tower.named_parameters():
        assert torch.equal(written[name], parameter.float()), name
