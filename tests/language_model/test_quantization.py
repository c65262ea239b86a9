"""quantization.py: frozen weights in few bits, trained ones in float32, equal after a reload."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from multi_token.errors import LanguageModelError, RecipeError
from multi_token.generate import collate_prompts, single_question
from multi_token.language_model.loading import load_language_model
from multi_token.language_model.quantization import module_bytes, quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec, Quantization
from multi_token.recipe.recipe import Recipe
from multi_token.registry import validate_fields
from multi_token.testing.language_models import tiny_language_model
from multi_token.train.run import train
from multi_token.types import Media

pytestmark = pytest.mark.filterwarnings(
    # bitsandbytes' 8-bit product works in float16, whatever comes in
    "ignore:MatMul8bitLt. inputs will be cast:UserWarning",
    # torchao 0.18 asks torch to do what torch 2.13 does by itself
    "ignore:.*register_constant:FutureWarning",
)

KINDS: dict[str, Any] = {
    "4bit": "4bit",
    "4bit without double_quant": {"kind": "4bit", "double_quant": False},
    "4bit in bfloat16": {"kind": "4bit", "compute_dtype": "bfloat16"},
    "8bit": "8bit",
    "int8": "int8",
}
PACKAGES = {"4bit": "bitsandbytes", "8bit": "bitsandbytes", "int8": "torchao"}
of_each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def need(kind: Any) -> None:
    pytest.importorskip(PACKAGES[kind if isinstance(kind, str) else kind["kind"]])


def logits(model: Any, data: Path) -> torch.Tensor:
    question = single_question("What is this?", [Media("image", str(data / "red.png"))])
    batch = collate_prompts(model.processor, [question])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits


@of_each_kind
def test_quantized_weights_take_fewer_bytes_and_give_nearly_the_same_logits(
    kind: Any, recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    need(kind)
    # bitsandbytes 0.50 reads 4 bits wrongly on a CPU with AVX512 where a layer's inputs are no
    # multiple of its blocks of 64
    wide = tiny_language_model(tmp_path / "wide", hidden_size=64)
    fields = recipe_fields(tmp_path)["model"] | {"language_model": wide}
    torch.manual_seed(0)
    whole = MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields))
    torch.manual_seed(0)
    model = MultiTokenForConditionalGeneration.from_spec(
        ModelSpec.model_validate({**fields, "quantization": kind})
    )
    assert module_bytes(model.language_model) < 0.8 * module_bytes(whole.language_model)
    stored = quantized_parameters(model.language_model)
    assert len(stored) == 14, "seven linear layers in each of two blocks"
    assert model.get_input_embeddings().weight.dtype == torch.float32
    ours, theirs = logits(model, data), logits(whole, data)
    similarity = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    # four bits in layers of 64 inputs are coarse; these weights are random besides
    assert 0.9 < similarity < 1.0


def test_scales_of_quantized_weights_are_counted() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    plain = {}
    for double_quant in (False, True):
        layer = bnb.nn.Linear4bit(
            1024, 1024, bias=False, quant_type="nf4", compress_statistics=double_quant
        ).to("cpu")
        plain[double_quant] = module_bytes(layer) / 1024**2
    # half a byte a weight, and 32 bits in each 64 weights for a scale; 8 and a few in 64 if double
    assert plain[False] == pytest.approx(0.5 + 4 / 64, rel=1e-2)
    assert plain[True] == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-2)


@pytest.mark.parametrize("kind", PACKAGES)
def test_a_quantized_model_is_trained_saved_and_loaded_as_it_was(
    kind: str, recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Train the projector alone, then LoRA; the Trainer of transformers refuses a bare model."""
    need(kind)
    fields = recipe_fields(
        tmp_path / "run",
        stages=[
            {"name": "projector", "learn": {"projectors": 1e-2}, "args": {"max_steps": 2}},
            {
                "name": "adapter",
                "learn": {"projectors": 1e-2, "adapter": 1e-2},
                "args": {"max_steps": 2},
            },
        ],
    )
    fields["model"]["quantization"] = kind
    console = Console(record=True, width=200, file=io.StringIO())
    model = train(Recipe.model_validate(fields), console=console)
    said = console.export_text()
    size = module_bytes(model.language_model.get_base_model())
    assert "language model LlamaForCausalLM: float32 and quantized, 0.1 MB" in said, size
    assert "adapter: " in said and "parameters in float32, learning rate 0.01" in said

    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["model"]["quantization"]["kind"] == kind
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert quantized_parameters(again.language_model)
    assert torch.equal(logits(model, data), logits(again, data))
    row = {"images": ["red.png"], "messages": [{"role": "user", "content": "What is <image>?"}]}
    assert len(again.generate([row], root=str(data), max_new_tokens=3)) == 1


@of_each_kind
def test_gradients_through_quantized_weights_are_the_same_after_an_answer(
    kind: Any, tmp_path: Path
) -> None:
    """On some CPUs, bitsandbytes repacks 4-bit weights for inference, without a backward pass."""
    need(kind)
    fields = kind if isinstance(kind, dict) else {"kind": kind}
    wide = tiny_language_model(tmp_path / "wide", hidden_size=64)  # 32 cannot be packed
    quantization = validate_fields(Quantization, fields, where="")
    language_model = load_language_model(wide, quantization=quantization)
    ids = torch.arange(8)[None]
    given = language_model.get_input_embeddings()(ids).detach()

    def gradient() -> torch.Tensor:
        embeds = given.clone().requires_grad_()
        language_model.train()(inputs_embeds=embeds, labels=ids).loss.backward()
        assert embeds.grad is not None
        return embeds.grad

    before = gradient()
    with torch.no_grad():
        language_model.eval()(inputs_embeds=given)
    torch.testing.assert_close(gradient(), before)
    assert float(before.norm()) > 0


@pytest.mark.parametrize(
    ("kind", "extra"), [("4bit", "qlora"), ("8bit", "qlora"), ("int8", "torchao")]
)
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    kind: str, extra: str, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[kind], None)
    with pytest.raises(LanguageModelError, match=rf'pip install "multi_token\[{extra}\]"'):
        load_language_model(
            str(parts / "language_model"), quantization=Quantization.model_validate(kind)
        )


def test_a_model_that_is_quantized_already_is_not_quantized_again(
    parts: Path, tmp_path: Path
) -> None:
    config = json.loads((parts / "language_model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LanguageModelError, match=r"is quantized already \(bitsandbytes\)"):
        load_language_model(str(tmp_path), quantization=Quantization(kind="8bit"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("3bit", "'4bit', '8bit' or 'int8'"),
        ({"kind": "8bit", "double_quant": True}, "`double_quant` is for 4bit"),
        ({"kind": "int8", "compute_dtype": "bfloat16"}, "`compute_dtype` is for 4bit"),
    ],
)
def test_an_invalid_quantization_is_refused_by_its_field(fields: Any, message: str) -> None:
    vector = {"type": "vector", "dim": 5}
    with pytest.raises(RecipeError, match=message):
        validate_fields(
            ModelSpec,
            {"language_model": "a", "modalities": {"vector": vector}, "quantization": fields},
            where="recipe",
        )
