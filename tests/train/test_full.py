"""The whole language model learns: the result is complete, exact after a stop, and goes on."""

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

from multi_token.checkpoint.save import save
from multi_token.convert.export import export
from multi_token.convert.push import push
from multi_token.errors import CheckpointError, LanguageModelError, MultiTokenError
from multi_token.generate import collate_prompts, single_question
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import Trainable
from multi_token.testing import tiny_language_model
from multi_token.train.parameter_groups import freeze_and_unfreeze
from multi_token.train.resume import LOCK
from multi_token.train.run import train
from multi_token.types import Media

Fields = Callable[..., dict[str, Any]]
FULL = {"name": "full", "learn": {"projectors": 1e-2, "language_model": 1e-2}}


def trained(fields: dict[str, Any]) -> Any:
    return train(Recipe.model_validate(fields), console=Console(quiet=True))


def logits(model: Any, data: Path) -> torch.Tensor:
    question = single_question("What is this?", [Media("image", str(data / "red.png"))])
    batch = collate_prompts(model.processor, [question])
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "language_model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first and first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def base(tied_language_model: str, tmp_path_factory: Any) -> Path:
    return Path(
        shutil.copytree(tied_language_model, tmp_path_factory.mktemp("base") / "language_model")
    )


@pytest.fixture(scope="module")
def run(recipe_fields: Fields, base: Path, tmp_path_factory: Any) -> Path:
    """A run in bfloat16 whose language model was trained; what it was made of is gone."""
    out = tmp_path_factory.mktemp("runs") / "full"
    before = {path: path.read_bytes() for path in base.iterdir()}
    args = {"use_cpu": True, "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2}
    fields = recipe_fields(out, stages=[FULL], args=args)
    fields["model"] |= {"language_model": str(base), "dtype": "bfloat16"}
    trained(fields)
    assert {path: path.read_bytes() for path in base.iterdir()} == before, "the base was changed"
    return out


def test_the_result_is_whole_tied_and_answers_as_the_model_in_memory_to_the_bit(
    recipe_fields: Fields, tied_language_model: str, data: Path, tmp_path: Path
) -> None:
    gone = Path(shutil.copytree(tied_language_model, tmp_path / "gone"))
    fields = recipe_fields(tmp_path / "run", stages=[{**FULL, "args": {"max_steps": 2}}])
    fields["model"] |= {"language_model": str(gone), "dtype": "bfloat16"}
    model = trained(fields)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    shutil.rmtree(gone)
    written = json.loads((moved / "config.json").read_text())
    assert written["model"]["language_model"] == "./language_model"
    again = MultiTokenForConditionalGeneration.from_pretrained(moved)
    inner = again.language_model
    assert inner.lm_head.weight is inner.get_input_embeddings().weight
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(logits(again, data), logits(model, data))
    assert "lm_head.weight" not in weights(moved)
    moved_far = [
        not torch.equal(weights(moved)[key], tensor.float())
        for key, tensor in load_file(Path(tied_language_model) / "model.safetensors").items()
    ]
    assert all(moved_far), "all of it learns, embeddings and norms too"


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_to_the_bit(
    recipe_fields: Fields, run: Path, base: Path, tmp_path: Path
) -> None:
    cut = Path(shutil.copytree(run, tmp_path / "cut"))
    (cut / "config.json").unlink()
    for gone in ("done.json", "result", "checkpoint-6"):
        path = cut / "stages" / "1-full" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not same(weights(cut / "stages" / "1-full" / "checkpoint-3"), weights(run))
    shutil.rmtree(cut / "language_model")
    fields = json.loads(json.dumps(recipe_fields(cut, stages=[FULL])))
    fields["model"] |= {"language_model": str(base), "dtype": "bfloat16"}
    fields["train"]["args"] = {
        "use_cpu": True,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 2,
    }
    (cut / "recipe.yaml").unlink()
    trained(fields)
    assert same(weights(cut), weights(run))
    name = "projectors.safetensors"
    assert same(load_file(cut / name), load_file(run / name))


def test_saved_again_it_stays_whole_even_over_itself(run: Path, data: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(run, tmp_path / "own", ignore=shutil.ignore_patterns("stages")))
    model = MultiTokenForConditionalGeneration.from_pretrained(own)
    before = logits(model, data)
    save(model, own)
    assert torch.equal(logits(model, data), before)
    save(model, tmp_path / "again")
    for folder in (own, tmp_path / "again"):
        assert same(weights(folder), weights(run))
        assert torch.equal(
            logits(MultiTokenForConditionalGeneration.from_pretrained(folder), data), before
        )
    left = {p.name for p in own.iterdir() if p.name.startswith(".")}
    assert left <= {LOCK}, "temporary files"


def test_an_adapter_goes_on_the_trained_language_model_and_both_are_saved(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    stages = [
        {**FULL, "args": {"max_steps": 2}},
        {"name": "adapter", "learn": {"adapter": 1e-2}, "args": {"max_steps": 2, "save_steps": 1}},
    ]
    out = tmp_path / "run"
    model = trained(recipe_fields(out, stages=stages))
    assert same(weights(out), weights(out / "stages" / "1-full" / "result"))
    again = MultiTokenForConditionalGeneration.from_pretrained(out)
    assert hasattr(again.language_model, "peft_config")
    assert torch.equal(logits(again, data), logits(model, data))
    # and it is known again where it goes on in the second stage
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    (out / "config.json").unlink()
    for gone in ("done.json", "result", "checkpoint-2"):
        path = out / "stages" / "2-adapter" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained(recipe_fields(out, stages=stages))
    assert same(load_file(out / "adapter" / "adapter_model.safetensors"), adapter)


def test_another_run_takes_it_over_and_needs_no_first_run(
    mixed_fields: Fields, run: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("stages")))
    new = [{"name": "new", "learn": {"projectors": {"pulse": 1e-2}}, "args": {"max_steps": 1}}]
    fields = mixed_fields(tmp_path / "new", init_from=str(old), stages=new)
    fields["model"] |= {"language_model": str(base), "dtype": "bfloat16"}
    trained(fields)
    shutil.rmtree(old)
    assert same(weights(tmp_path / "new"), weights(run))
    assert torch.equal(
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "new"), data),
        logits(MultiTokenForConditionalGeneration.from_pretrained(run), data),
    )


def test_another_run_may_name_it_as_its_own_frozen_language_model(
    recipe_fields: Fields, run: Path, tmp_path: Path
) -> None:
    new = [{"name": "new", "learn": {"projectors": 1e-2}, "args": {"max_steps": 1}}]
    fields = recipe_fields(tmp_path / "new", init_from=str(run), stages=new)
    fields["model"] |= {"language_model": str(run / "language_model"), "dtype": "bfloat16"}
    model = trained(fields)
    assert {p.dtype for p in model.language_model.parameters()} == {torch.bfloat16}
    assert not (tmp_path / "new" / "language_model").exists()


def test_a_run_of_another_language_model_is_not_taken_over(
    recipe_fields: Fields, run: Path, tmp_path: Path
) -> None:
    fields = recipe_fields(tmp_path / "new", init_from=str(run))
    fields["model"]["language_model"] = tiny_language_model(tmp_path / "other", seed=5)
    fields["model"]["dtype"] = "bfloat16"
    with pytest.raises(CheckpointError, match="belongs to another language model"):
        trained(fields)


@pytest.mark.parametrize("to", ["merged", "language-model"])
def test_it_is_exported_whole(run: Path, data: Path, tmp_path: Path, to: Any) -> None:
    export(run, tmp_path / "out", to=to)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["model"]["language_model"] == "./language_model"
    assert torch.equal(
        logits(MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "out"), data),
        logits(MultiTokenForConditionalGeneration.from_pretrained(run), data),
    )


def test_it_is_exported_to_llava(recipe_fields: Fields, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    fields = recipe_fields(tmp_path / "run")
    fields["model"]["modalities"]["image"] |= {"features": "patches", "projector": {"type": "mlp"}}
    model = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    freeze_and_unfreeze(model, Trainable.model_validate({"language_model": 1e-3}))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(1.1)
    save(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "llava", to="llava")
    exported: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    weight = weights(tmp_path / "run")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(exported.model.language_model.layers[0].mlp.up_proj.weight, weight)


def test_it_is_pushed_with_its_language_model_and_a_card_that_says_so(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(tmp_path)).model
    )
    export_of_parts = tmp_path / "parts"
    save(model, tmp_path / "plain")
    export(tmp_path / "plain", export_of_parts, to="merged")
    model = MultiTokenForConditionalGeneration.from_pretrained(export_of_parts)
    freeze_and_unfreeze(model, Trainable.model_validate({"language_model": 1e-3}))
    save(model, export_of_parts)
    files = push(export_of_parts, "ada/seer", dry_run=True)
    size = (export_of_parts / "language_model" / "model.safetensors").stat().st_size
    assert files["language_model/model.safetensors"] == size > 100_000
    card = (export_of_parts / "README.md").read_text()
    assert "projectors and the fully trained language model" in card
    assert "base_model_relation: finetune" in card
    for path in (export_of_parts / "language_model").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name


def test_weights_that_were_changed_or_cut_off_are_refused(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("stages")))
    path = copy / "language_model" / "model.safetensors"
    tensors = load_file(path)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(MultiTokenError, match="other weights"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)
    save_file({**tensors, "model.layers.1.mlp.up_proj.weight": gone + 1}, path, {"format": "pt"})
    with pytest.raises(MultiTokenError, match="other weights"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LanguageModelError, match="no language model could be loaded"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_quantized_language_model_does_not_take_it_over(
    recipe_fields: Fields, run: Path, base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    fields = recipe_fields(tmp_path / "new", init_from=str(run))
    fields["model"] |= {"language_model": str(base), "dtype": "bfloat16", "quantization": "4bit"}
    with pytest.raises(CheckpointError, match="set model.language_model to .* and quantize that"):
        trained(fields)
    fields["model"]["language_model"] = str(run / "language_model")
    fields["train"]["output_dir"] = str(tmp_path / "other")
    fields["train"]["stages"][0]["args"]["max_steps"] = 1
    trained(fields)
