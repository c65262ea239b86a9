"""load.py: what was trained comes back bit for bit; the rest is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from multi_token import MultiTokenForConditionalGeneration
from multi_token.checkpoint.save import save
from multi_token.errors import CheckpointError
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.recipe.recipe import Recipe
from multi_token.recipe.train import AdapterSpec
from multi_token.testing import tiny_language_model


@pytest.fixture(scope="module")
def run(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    """A checkpoint with a closed-form part and an adapter that is not zero."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    model = MultiTokenForConditionalGeneration.from_spec(
        Recipe.model_validate(recipe_fields(folder)).model
    )
    model.language_model = attach_adapter(model.language_model, AdapterSpec(r=2))
    model.projector("image").add_closed_form()
    with torch.no_grad():
        for parameter in [
            *model.projectors.parameters(),
            *adapter_parameters(model.language_model),
        ]:
            parameter.normal_(std=0.1)
    save(model, folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def logits(model: Any, data: Path) -> torch.Tensor:
    from multi_token.generate import collate_prompts, single_question
    from multi_token.types import Media

    batch = collate_prompts(
        model.processor, [single_question("What is this?", [Media("image", str(data / "red.png"))])]
    )
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], media=batch["media"]).logits


def test_saving_and_loading_gives_the_same_logits_to_the_bit(
    run: Path, data: Path, tmp_path: Path
) -> None:
    first = MultiTokenForConditionalGeneration.from_pretrained(run)
    first.save_pretrained(tmp_path / "again")
    second = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(first, data), logits(second, data))


def test_the_adapter_and_the_closed_form_change_the_logits_of_what_is_loaded(
    run: Path, copy: Path, data: Path
) -> None:
    whole = logits(MultiTokenForConditionalGeneration.from_pretrained(run), data)
    tensors = load_file(copy / "projectors.safetensors")
    tensors["image.closed_form.weight"] *= 0
    save_file(tensors, copy / "projectors.safetensors")
    assert not torch.equal(
        whole, logits(MultiTokenForConditionalGeneration.from_pretrained(copy), data)
    )
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({k: v * 0 for k, v in adapter.items()}, copy / "adapter/adapter_model.safetensors")
    shutil.copy(run / "projectors.safetensors", copy)
    assert not torch.equal(
        whole, logits(MultiTokenForConditionalGeneration.from_pretrained(copy), data)
    )


def test_a_checkpoint_holds_only_what_was_trained_and_no_pickle(run: Path) -> None:
    files = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert files == {
        "config.json",
        "projectors.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    names = load_file(run / "projectors.safetensors")
    assert all(name.startswith("image.") for name in names)


@pytest.mark.parametrize("file", ["projectors.safetensors", "adapter/adapter_model.safetensors"])
def test_a_missing_tensor_is_named(copy: Path, file: str) -> None:
    tensors = load_file(copy / file)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, copy / file)
    with pytest.raises(CheckpointError, match=f"lacks .*{gone}"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


@pytest.mark.parametrize("file", ["projectors.safetensors", "adapter/adapter_model.safetensors"])
def test_an_extra_tensor_is_named(copy: Path, file: str) -> None:
    tensors = load_file(copy / file)
    tensors["image.other"] = torch.zeros(2)
    save_file(tensors, copy / file)
    with pytest.raises(CheckpointError, match="has unknown image.other"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    tensors = load_file(copy / "projectors.safetensors")
    tensors["image.feature_mean"] = torch.zeros(3)
    save_file(tensors, copy / "projectors.safetensors")
    with pytest.raises(CheckpointError, match=r"image.feature_mean is \(3,\) instead of \(32,\)"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_file_cut_off_while_written_is_refused(copy: Path) -> None:
    path = copy / "projectors.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_model_folder_made_by_something_else_is_refused(parts: Path) -> None:
    with pytest.raises(CheckpointError, match="type 'llama'; expected one of type"):
        MultiTokenForConditionalGeneration.from_pretrained(parts / "language_model")


def test_a_folder_without_a_checkpoint_and_no_folder_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        MultiTokenForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing at"):
        MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "nowhere")


def test_a_checkpoint_of_another_schema_is_refused_with_its_version(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, "schema": 99}))
    with pytest.raises(CheckpointError, match="schema 99, this version"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_language_model_that_moved_can_be_named(
    copy: Path, parts: Path, data: Path, tmp_path: Path
) -> None:
    before = logits(MultiTokenForConditionalGeneration.from_pretrained(copy), data)
    moved = shutil.copytree(parts / "language_model", tmp_path / "moved")
    fields = json.loads((copy / "config.json").read_text())
    fields["model"]["language_model"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(fields))
    assert torch.equal(
        before,
        logits(
            MultiTokenForConditionalGeneration.from_pretrained(copy, language_model=str(moved)),
            data,
        ),
    )


def test_another_language_model_than_the_checkpoint_s_is_refused(
    copy: Path, tmp_path: Path
) -> None:
    other = tiny_language_model(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="another language model .* other weights"):
        MultiTokenForConditionalGeneration.from_pretrained(copy, language_model=other)


def test_a_checkpoint_from_before_identities_were_kept_still_loads(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    del fields["identity"], fields["base_model"]
    (copy / "config.json").write_text(json.dumps(fields))
    MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_a_language_model_inside_the_run_that_is_gone_is_half_written(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    fields["model"]["language_model"] = "./language_model"
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="half-written or was copied in part"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)


def test_an_adapter_that_is_gone_is_named(copy: Path) -> None:
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter cannot be read"):
        MultiTokenForConditionalGeneration.from_pretrained(copy)
