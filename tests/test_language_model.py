"""language_model.py: what can be driven by embeddings is, and what cannot is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.errors import LanguageModelError
from multi_token.language_model import embedding_rms, load_language_model, load_tokenizer


def test_a_loaded_language_model_is_frozen_and_in_eval_mode(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_precision_of_the_recipe_is_that_of_the_weights(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"), dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_is_no_language_model_is_refused_with_what_was_expected(
    tmp_path: Path, parts: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", parts / "clip"):
        with pytest.raises(LanguageModelError, match="a decoder-only model is expected"):
            load_language_model(str(folder))
    with pytest.raises(LanguageModelError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path / "empty"))


def test_a_model_that_needs_ids_in_its_layers_is_refused_by_trying(tmp_path: Path) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    config: Any = Gemma3nTextConfig(
        vocab_size=64,
        vocab_size_per_layer_input=64,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config)
    for parameter in model.parameters():  # its scales start at zero: nothing would differ
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match="gives other logits for embeddings"):
        load_language_model(str(tmp_path))


def test_the_size_of_embeddings_is_taken_behind_the_module(parts: Path) -> None:
    model = load_language_model(str(parts / "language_model"))
    weight: Any = model.get_input_embeddings().weight
    assert embedding_rms(model) == pytest.approx(float(weight.square().mean().sqrt()), rel=1e-5)
