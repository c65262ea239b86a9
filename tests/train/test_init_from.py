"""A modality is added to a trained model; the old ones stay equal (train/prepare.py)."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from multi_token.errors import CheckpointError, RecipeError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe
from multi_token.testing import tiny_language_model
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)
FILES = ("projectors.safetensors", "encoders.safetensors", "adapter/adapter_model.safetensors")
NEW = [{"name": "new", "learn": {"projectors": {"pulse": 1e-2}}, "args": {"max_steps": 3}}]


@pytest.fixture(scope="module")
def run(recipe_fields: Fields, tmp_path_factory: Any) -> Path:
    """A run that sees images; its projector, encoder (LoRA) and adapter were trained."""
    out = tmp_path_factory.mktemp("runs") / "a"
    lora = {"lr": 1e-2, "lora": {"r": 2}}
    learn = {"projectors": 1e-2, "encoders": {"image": lora}, "adapter": 1e-2}
    stages = [{"name": "all", "learn": learn, "args": {"max_steps": 3}}]
    train(Recipe.model_validate(recipe_fields(out, stages=stages)), console=QUIET)
    return out


def tensors(folder: Path, modality: str) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of a modality, and of the adapter."""
    return {
        key: tensor
        for file in FILES
        for key, tensor in load_file(folder / file).items()
        if key.startswith((f"{modality}.", "base_model."))
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first and first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def test_a_new_modality_trains_and_the_old_ones_stay_equal_to_the_bit(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    console = Console(record=True, width=200, file=io.StringIO())
    recipe = Recipe.model_validate(mixed_fields(out, init_from=str(run), stages=NEW))
    model = train(recipe, console=console)
    said = console.export_text()
    assert f"image: initialized from {run}" in said
    assert "image: closed-form start" not in said and "pulse: no closed-form start" in said
    start = out / "stages" / "0-closed-form"
    assert same(tensors(run, "image"), tensors(start, "image"))
    assert same(tensors(run, "image"), tensors(out, "image"))
    before, after = tensors(start, "pulse"), tensors(out, "pulse")
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert any("projector" not in key and "blocks" in key for key in moved)
    assert any(key.startswith("pulse.network") for key in moved)
    assert not any(key.startswith("base_model.") for key in moved)
    assert set(model.trained_encoders) == {"image", "pulse"}


def test_initialized_projectors_train_further_by_default(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    train(Recipe.model_validate(mixed_fields(out, init_from=str(run))), console=QUIET)
    before, after = (load_file(folder / FILES[0]) for folder in (run, out))
    key = "image.network.branches.0.0.weight"
    assert not torch.equal(before[key], after[key])
    fixed = ("image.feature_mean", "image.closed_form.weight")
    assert all(torch.equal(before[key], after[key]) for key in fixed)


def test_adapter_and_encoder_train_further_where_the_recipe_names_them(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    lora = {"lr": 1e-2, "lora": {"r": 2}}
    stages = [{"name": "on", "learn": {"adapter": 1e-2, "encoders": {"image": lora}}}]
    args = {"use_cpu": True, "max_steps": 2}
    fields = mixed_fields(tmp_path / "b", init_from=str(run), stages=stages, args=args)
    train(Recipe.model_validate(fields), console=QUIET)
    before, after = tensors(run, "image"), tensors(tmp_path / "b", "image")
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "lora_" in key}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"projector": {"type": "expand", "factor": 2}}, r"image\.projector\.factor is 3 in"),
        ({"projector": {"type": "mlp"}}, r"image\.projector\.type is 'expand' in .* and 'mlp' in"),
        ({"features": "mean"}, r"image\.features is 'pooled' in .* and 'mean' in the recipe"),
    ],
)
def test_a_modality_with_other_settings_is_refused_with_the_field(
    mixed_fields: Fields, run: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    fields = mixed_fields(tmp_path / "b", init_from=str(run))
    fields["model"]["modalities"]["image"] |= change
    with pytest.raises(RecipeError, match=sentence):
        train(Recipe.model_validate(fields), console=QUIET)


def test_a_modality_that_the_recipe_lacks_is_named(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    fields = mixed_fields(tmp_path / "b", init_from=str(run))
    del fields["model"]["modalities"]["image"]
    with pytest.raises(RecipeError, match=r"has image, which the recipe lacks"):
        train(Recipe.model_validate(fields), console=QUIET)


def test_another_language_model_another_adapter_and_no_run_are_refused(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    fields = mixed_fields(tmp_path / "b", init_from=str(run))
    fields["model"]["language_model"] = tiny_language_model(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="belongs to another language model"):
        train(Recipe.model_validate(fields), console=QUIET)
    stages = [{"name": "a", "learn": {"adapter": 1e-3}}]
    fields = mixed_fields(tmp_path / "c", init_from=str(run), stages=stages, adapter={"r": 4})
    with pytest.raises(RecipeError, match=r"train\.adapter\.r is 4, but .* has 16"):
        train(Recipe.model_validate(fields), console=QUIET)
    fields = mixed_fields(tmp_path / "d", init_from=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="found nothing at"):
        train(Recipe.model_validate(fields), console=QUIET)


@pytest.mark.slow
def test_a_run_initialized_from_another_resumes_and_needs_it_no_more(
    mixed_fields: Fields, run: Path, tmp_path: Path
) -> None:
    old, out = Path(shutil.copytree(run, tmp_path / "a")), tmp_path / "b"
    recipe = Recipe.model_validate(mixed_fields(out, init_from=str(old), stages=NEW))
    train(recipe, console=QUIET)
    learned = tensors(out, "pulse")
    shutil.rmtree(old)
    MultiTokenForConditionalGeneration.from_pretrained(out)
    (out / "config.json").unlink()
    shutil.rmtree(out / "stages" / "1-new")  # as if it had been stopped after stage zero
    train(recipe, console=QUIET)
    assert same(tensors(run, "image"), tensors(out, "image"))
    assert same(learned, tensors(out, "pulse"))


@pytest.mark.slow
def test_cached_features_are_those_of_the_initialized_encoder(
    recipe_fields: Fields, run: Path, tmp_path: Path
) -> None:
    for name, cached in (("plain", False), ("cached", True)):
        fields = recipe_fields(tmp_path / name, init_from=str(run), feature_cache=cached)
        train(Recipe.model_validate(fields), console=QUIET)
    plain, cached = (load_file(tmp_path / name / FILES[0]) for name in ("plain", "cached"))
    for key, tensor in plain.items():
        torch.testing.assert_close(cached[key], tensor, rtol=1e-3, atol=1e-4)
    key = "image.network.branches.0.2.weight"
    before = load_file(run / FILES[0])[key]
    assert not torch.allclose(plain[key], before, rtol=1e-2, atol=1e-3)
