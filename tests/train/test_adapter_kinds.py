"""LoRA, DoRA, rsLoRA and QLoRA: trained, saved, loaded, merged, and exact after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from multi_token.convert.export import export
from multi_token.errors import RecipeError
from multi_token.generate import collate_prompts, single_question
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train
from multi_token.types import Media

Fields = Callable[..., dict[str, Any]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "dora": {"r": 4, "use_dora": True},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
}
LEARN = {"projectors": 1e-2, "adapter": {"lr": 2e-2, "weight_decay": 0.01}}
ADAPTER = "adapter/adapter_model.safetensors"


def fields_of(recipe_fields: Fields, out: Path, adapter: Any, **model: Any) -> dict[str, Any]:
    args = {"use_cpu": True, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    stages = [{"name": "adapter", "learn": LEARN}]
    fields = recipe_fields(out, stages=stages, args=args, adapter=adapter)
    fields["model"] |= model
    return fields


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=Console(quiet=True))


def logits(model: Any, data: Path) -> torch.Tensor:
    question = single_question("What is this?", [Media("image", str(data / "red.png"))])
    batch = collate_prompts(model.processor, [question])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits.float()


def cut_off_after_two_steps(out: Path) -> None:
    (out / "config.json").unlink()
    for gone in ("done.json", "result", "checkpoint-4"):
        path = out / "stages" / "1-adapter" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def same(first: Path, second: Path) -> bool:
    ours, theirs = load_file(first), load_file(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("adapter", KINDS.values(), ids=KINDS)
def test_an_adapter_is_saved_as_its_kind_and_merged_it_answers_the_same(
    recipe_fields: Fields, data: Path, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    model = trained(fields_of(recipe_fields, tmp_path / "run", adapter))
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    for key, value in adapter.items():
        found = written[key]
        assert (sorted(found) if isinstance(found, list) else found) == value
    magnitudes = [k for k in load_file(tmp_path / "run" / ADAPTER) if "magnitude" in k]
    assert bool(magnitudes) == adapter.get("use_dora", False)
    expected = logits(model, data)
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(again, data), expected)
    with again.language_model.disable_adapter():
        assert not torch.allclose(logits(again, data), expected, atol=1e-2), "it does nothing"
    export(tmp_path / "run", tmp_path / "merged", to="merged")
    torch.testing.assert_close(
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "merged"), data),
        expected,
        atol=1e-4,
        rtol=0,
    )


def test_an_adapter_of_another_kind_is_not_taken_over(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    trained(fields_of(recipe_fields, tmp_path / "dora", KINDS["dora"]))
    fields = fields_of(recipe_fields, tmp_path / "lora", {"r": 4})
    fields["train"]["init_from"] = str(tmp_path / "dora")
    with pytest.raises(RecipeError, match=r"train\.adapter\.use_dora is False, but .* has True"):
        trained(fields)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("lora", "auto"),
        ("dora", "bfloat16"),
        pytest.param("lora", "bfloat16", marks=pytest.mark.slow),
        pytest.param("dora", "auto", marks=pytest.mark.slow),
    ],
)
def test_qlora_trains_float32_beside_4_bits_that_stay_and_goes_on_after_a_stop_to_the_bit(
    recipe_fields: Fields, data: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "run"
    fields = fields_of(recipe_fields, out, KINDS[kind], quantization="4bit", dtype=dtype)
    before = base_of(
        MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    )
    model = trained(fields)
    learning = {p.dtype for p in model.parameters() if p.requires_grad}
    assert learning == {torch.float32}
    assert len(quantized_parameters(model.language_model)) == 14, "seven in each of two blocks"
    after = base_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "the base was changed"
    expected = logits(model, data)
    assert torch.equal(
        logits(MultiTokenForConditionalGeneration.from_pretrained(out), data), expected
    )
    with model.language_model.disable_adapter():
        assert not torch.allclose(logits(model, data), expected, atol=1e-2), "it does nothing"

    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    cut_off_after_two_steps(out)
    trained(fields)
    assert same(out / ADAPTER, whole / ADAPTER)
    assert same(out / "projectors.safetensors", whole / "projectors.safetensors")


def base_of(model: Any) -> dict[str, torch.Tensor]:
    """All weights of the language model but the adapter's, as they are stored."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): p.detach().clone()
        for name, p in model.language_model.named_parameters()
        if "lora_" not in name
    }
