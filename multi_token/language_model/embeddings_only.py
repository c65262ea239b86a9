"""Input embeddings of a language model without its layers, for a gateway before vLLM."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from multi_token.errors import LanguageModelError
from multi_token.hub import hub_arguments
from multi_token.language_model.loading import LOAD_FAULTS, gguf_arguments, load_language_model


class EmbeddingsOnly(nn.Module):
    """A language model without layers: its embeddings make prompts, vLLM generates from them."""

    embeddings_only = True
    name_or_path = ""

    def __init__(self, embedding: nn.Module, config: Any, generation_config: Any) -> None:
        super().__init__()
        self.embedding = embedding
        self.config = config
        self.generation_config = generation_config

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, *_: Any, **__: Any) -> Any:
        raise LanguageModelError(
            "only the embeddings of this language model were loaded, so it cannot generate here"
        )


def load_embeddings(
    name: str, *, revision: str | None = None, dtype: str = "auto", **options: Any
) -> EmbeddingsOnly:
    """Load the input embeddings of a language model; arguments as in `load_language_model`.

    Raises LanguageModelError.
    """
    # A model of zero layers reads only embeddings and head from the files. Where a class cannot be
    # built so, or misses its embeddings, the complete model is loaded and the rest freed.
    is_quantized = options.get("quantization") is not None
    less = None if is_quantized else _load_without_layers(name, revision, dtype)
    if less is None:
        complete: Any = load_language_model(name, revision=revision, dtype=dtype, **options)
        less = (complete, complete.config)
    model, config = less
    found = EmbeddingsOnly(model.get_input_embeddings(), config, model.generation_config)
    return found.requires_grad_(False).eval()


def _load_without_layers(name: str, revision: str | None, dtype: str) -> tuple[Any, Any] | None:
    """Return a model of zero layers and the config of the complete one, or None."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if gguf_arguments(name)[1]:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # else every layer is reported as an unused weight
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **hub_arguments())
        fewer = copy.deepcopy(config)
        text = fewer.get_text_config()
        # One entry per layer, checked against num_hidden_layers by transformers.
        for field in ("layer_types", "mlp_layer_types"):
            if getattr(text, field, None) is not None:
                setattr(text, field, [])
        text.num_hidden_layers = 0
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=fewer,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            **hub_arguments(of_weights=True),
        )
    except (*LOAD_FAULTS, AttributeError, IndexError, TypeError, ZeroDivisionError):
        return None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    return None if report["missing_keys"] or report["mismatched_keys"] else (model, config)
