"""checkpoint/references.py: a checkpoint finds its parts again, and knows them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.checkpoint.fingerprint import check_fingerprint, fingerprint
from multi_token.checkpoint.references import absolutize, relativize, resolve_references
from multi_token.errors import CheckpointError
from multi_token.language_model.loading import load_language_model
from multi_token.language_model.lora import adapter_parameters, attach_adapter
from multi_token.recipe.model import Quantization
from multi_token.recipe.train import AdapterSpec
from multi_token.testing import tiny_language_model


def section(language_model: str, encoder: str | None = None) -> dict[str, Any]:
    image = {"type": "image", **({"encoder": encoder} if encoder else {})}
    return {"language_model": language_model, "dtype": "auto", "modalities": {"image": image}}


def test_what_lies_inside_the_folder_is_named_relative_to_it(tmp_path: Path) -> None:
    inside, eye = tmp_path / "language_model", tmp_path / "encoders" / "image"
    inside.mkdir()
    eye.mkdir(parents=True)
    written = relativize(section(str(inside), str(eye)), tmp_path)
    assert written == section("./language_model", "./encoders/image")
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    found = resolve_references(written, moved)
    assert found == section(str(moved / "language_model"), str(moved / "encoders" / "image"))


def test_other_folders_and_hub_names_stay_as_they_are(tmp_path: Path) -> None:
    for fields in (section("lab/model", "lab/eye"), section("/elsewhere/model"), section("gpt2")):
        assert relativize(fields, tmp_path) == fields
        assert resolve_references(fields, tmp_path) == fields


def test_a_relative_folder_of_a_recipe_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eye").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolutize(section("lab/model", "eye")) == section("lab/model", str(tmp_path / "eye"))


def test_a_part_that_is_missing_or_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="half-written or was copied in part"):
        resolve_references(section("./language_model"), tmp_path)
    with pytest.raises(CheckpointError, match="which is outside of it"):
        resolve_references(section("./../other"), tmp_path)


def test_a_copy_is_the_same_model_and_other_weights_are_another(tmp_path: Path) -> None:
    first = load_language_model(tiny_language_model(tmp_path / "a", seed=0))
    same = load_language_model(tiny_language_model(tmp_path / "b", seed=0))
    other = load_language_model(tiny_language_model(tmp_path / "c", seed=1))
    assert fingerprint(first) == fingerprint(same)
    check_fingerprint(fingerprint(first), fingerprint(same), folder=tmp_path, name="b")
    with pytest.raises(CheckpointError, match="than c, which has the same shape but other weights"):
        check_fingerprint(fingerprint(first), fingerprint(other), folder=tmp_path, name="c")


def test_an_adapter_beside_it_does_not_make_it_another_model(tmp_path: Path) -> None:
    model = load_language_model(tiny_language_model(tmp_path / "a"))
    before = fingerprint(model)
    wrapped = attach_adapter(model, AdapterSpec(r=2))
    assert fingerprint(wrapped) == before
    assert fingerprint(wrapped.unload()) == before


def test_a_merged_adapter_makes_it_another_model(tmp_path: Path) -> None:
    model = load_language_model(tiny_language_model(tmp_path / "a"))
    before = fingerprint(model)
    wrapped = attach_adapter(model, AdapterSpec(r=2))
    with torch.no_grad():
        for parameter in adapter_parameters(wrapped):
            parameter.normal_(std=0.1)
    merged = fingerprint(wrapped.merge_and_unload())
    assert merged["weights"] == before["weights"]  # LoRA is on the matrices alone
    with pytest.raises(CheckpointError, match="the same shape but other weights"):
        check_fingerprint(before, merged, folder=tmp_path, name="merged")


def test_a_quantized_copy_is_compared_by_what_quantization_leaves(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    name = tiny_language_model(tmp_path / "a")
    plain = fingerprint(load_language_model(name))
    quantized = fingerprint(load_language_model(name, quantization=Quantization(kind="4bit")))
    assert quantized["layers"] is None and quantized["weights"] == plain["weights"]
    check_fingerprint(plain, quantized, folder=tmp_path, name="a")


def test_another_shape_is_named_field_by_field(tmp_path: Path) -> None:
    expected = fingerprint(load_language_model(tiny_language_model(tmp_path / "a")))
    found = {**expected, "hidden_size": 48, "num_ids": 401}
    with pytest.raises(
        CheckpointError, match="hidden_size 48 instead of 32, num_ids 401 instead of 400"
    ):
        check_fingerprint(expected, found, folder=tmp_path, name="lab/other")


def test_weights_of_another_precision_are_not_compared(tmp_path: Path) -> None:
    model = load_language_model(tiny_language_model(tmp_path / "a"))
    expected = fingerprint(model)
    found = fingerprint(model.to(torch.bfloat16))
    assert found["weights"] != expected["weights"]
    check_fingerprint(expected, found, folder=tmp_path, name="a")
