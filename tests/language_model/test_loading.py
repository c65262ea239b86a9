"""language_model/loading.py: a named model is loaded unchanged, or refused in a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.errors import LanguageModelError
from multi_token.language_model.loading import embedding_rms, load_language_model, load_tokenizer


def test_a_loaded_language_model_is_frozen_and_in_eval_mode(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_precision_of_the_recipe_is_that_of_the_weights(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_name_without_a_language_model_is_refused_with_the_expected_forms(
    tmp_path: Path, parts: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", parts / "clip"):
        with pytest.raises(LanguageModelError, match="a decoder-only model is expected"):
            load_language_model(str(folder))
    with pytest.raises(LanguageModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "empty"))


def test_truncated_weights_are_refused(parts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(parts / "language_model", tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(LanguageModelError, match="no language model could be loaded from"):
        load_language_model(str(folder))


def test_the_rms_of_embeddings_includes_the_scale_of_their_module(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"))
    weight: Any = model.get_input_embeddings().weight
    assert embedding_rms(model) == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-5)
