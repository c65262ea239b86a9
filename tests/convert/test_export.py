"""convert/export.py and merge.py: what is written answers as the run did, and is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from multi_token.checkpoint.save import save
from multi_token.convert.export import export
from multi_token.convert.merge import merge
from multi_token.errors import MultiTokenError
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec


def with_adapter(fields: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    with torch.no_grad():
        for parameter in [*model.projectors.parameters(), *adapter_parameters(model)]:
            parameter.normal_(std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def run(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(with_adapter(recipe_fields(folder)), folder)
    return folder


@pytest.fixture(scope="module")
def for_engines(run: Path, tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("exported")
    export(run, out, to="language-model")
    return out


def logits(model: Any, data: Path) -> Tensor:
    from multi_token.generate import collate_prompts, single_question
    from multi_token.types import Media

    question = single_question("What is this?", [Media("image", str(data / "red.png"))])
    batch = collate_prompts(model.processor, [question])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits.float()


def close(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32: the logits' deviation is about 1."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_merged_run_is_whole_wherever_it_lies_and_gives_the_same_logits(
    run: Path, data: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / "merged", to="merged")
    moved = (tmp_path / "merged").rename(tmp_path / "moved")
    fields = json.loads((moved / "config.json").read_text())
    assert not fields["adapter"] and not (moved / "adapter").exists()
    assert fields["model"]["language_model"] == "./language_model"
    assert fields["model"]["modalities"]["image"]["encoder"] == "./encoders/image"
    assert str(run.parent) not in (moved / "config.json").read_text()
    model = MultiTokenForConditionalGeneration.from_pretrained(moved)
    close(
        logits(model, data), logits(MultiTokenForConditionalGeneration.from_pretrained(run), data)
    )
    # it names its parts where they are when it is saved elsewhere, and copies none of them
    save(model, tmp_path / "elsewhere")
    again = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    assert again["model"]["language_model"] == str(moved / "language_model")
    assert torch.equal(
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "elsewhere"), data),
        logits(model, data),
    )
    save(model, moved)
    assert json.loads((moved / "config.json").read_text()) == fields


def test_the_language_model_s_folder_is_complete_and_its_manifest_has_the_serve_command(
    run: Path, for_engines: Path, data: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    alone = AutoModelForCausalLM.from_pretrained(for_engines / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(for_engines / "language_model")
    manifest = json.loads((for_engines / "manifest.json").read_text())
    with torch.no_grad():
        ids = torch.tensor([manifest["golden"]["input_ids"]])
        expected = (
            MultiTokenForConditionalGeneration.from_pretrained(run)
            .language_model(input_ids=ids)
            .logits
        )
        close(alone(input_ids=ids).logits, expected)
        new = alone.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert new.tolist() == manifest["golden"]["greedy_ids"]
    assert tokenizer(manifest["golden"]["text"]).input_ids == ids[0].tolist()
    image = manifest["modalities"]["image"]
    assert image["num_tokens"] == 3 and image["placeholder"] == "<image>"
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " hi"}]}]
    text = tokenizer.apply_chat_template(parts, tokenize=False)
    assert "<image> hi" in text
    # and the folder around it is a run of ours, which makes the tokens for the engine
    close(
        logits(MultiTokenForConditionalGeneration.from_pretrained(for_engines), data),
        logits(MultiTokenForConditionalGeneration.from_pretrained(run), data),
    )


def test_nothing_but_weights_lies_where_an_engine_looks_for_them(for_engines: Path) -> None:
    names = {p.name for p in (for_engines / "language_model").glob("*.safetensors")}
    assert names == {"model.safetensors"}


def test_a_full_folder_is_refused_and_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for to in ("merged", "language-model", "llava"):
        with pytest.raises(MultiTokenError, match="not empty; choose another --out"):
            export(run, tmp_path, to=to)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_a_run_of_another_shape_than_llava_s_is_refused_with_the_reason(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(MultiTokenError, match="expand"):
        export(run, tmp_path / "out", to="llava")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_leaves_no_files(run: Path, tmp_path: Path, parts: Path) -> None:
    broken = Path(shutil.copytree(run, tmp_path / "broken"))
    fields = json.loads((broken / "config.json").read_text())
    # this template renders parts differently from their joined text
    template = "{% if messages[0]['content'] is string %}{{ range(3) | random }}{% endif %}"
    fields["model"]["chat_template"] = (
        template + "{{ cycler('a', 'b').next() }}{{ lipsum(n=1, min=2, max=5) }}"
    )
    (broken / "config.json").write_text(json.dumps(fields))
    with pytest.raises(MultiTokenError, match="renders content parts differently"):
        export(broken, tmp_path / "out", to="language-model")
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def plain(layer: Any) -> Tensor:
    """The weight of a quantized layer, by its own package."""
    if hasattr(layer.weight, "__tensor_flatten__"):
        return layer.weight.dequantize()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))


@pytest.mark.parametrize(("kind", "package"), [("4bit", "bnb"), ("8bit", "bnb"), ("int8", "ao")])
def test_a_quantized_base_is_dequantized_before_it_is_merged(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, kind: str, package: str
) -> None:
    pytest.importorskip({"bnb": "bitsandbytes", "ao": "torchao"}[package])
    fields = recipe_fields(tmp_path)
    fields["model"]["quantization"] = kind
    model = with_adapter(fields)
    layer = model.language_model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        learned = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = plain(layer.base_layer).float() + learned * layer.scaling["default"]
        before = model.language_model(input_ids=ids).logits.float()
        merge(model)
        after = model.language_model(input_ids=ids).logits.float()
    merged = model.language_model.model.layers[1].mlp.up_proj.weight.float()
    # bitsandbytes gives 8-bit weights back in half precision
    torch.testing.assert_close(merged, expected, atol=2e-3 if kind == "8bit" else 1e-6, rtol=0)
    assert not hasattr(model.language_model, "peft_config")
    assert getattr(model.language_model.config, "quantization_config", None) is None
    if kind != "8bit":  # its layers round what goes through them too, which the merged ones do not
        torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


def test_a_run_on_a_quantized_base_is_exported_as_a_plain_one(
    recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    fields = recipe_fields(tmp_path)
    fields["model"]["quantization"] = "4bit"
    save(with_adapter(fields), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", to="merged")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model"]["quantization"] is None
    close(
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "out"), data),
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run"), data),
    )
