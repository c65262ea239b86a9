"""Input embeddings of a language model without its layers, for a gateway before vLLM."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from multi_token.errors import LanguageModelError
from multi_token.language_model.loading import LOAD_FAULTS, gguf_arguments, load_language_model

if TYPE_CHECKING:
    from multi_token.recipe.recipe import Quantization


class EmbeddingsOnly(nn.Module):
    """Of a language model what looks ids up, and nothing that answers.

    For a gateway whose language model runs elsewhere: prompts are made of this, and the layers
    need no memory.
    """

    has_layers = False
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
            "only the embeddings of this language model were loaded, so it cannot answer here"
        )


def load_embeddings(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> EmbeddingsOnly:
    """What `load_language_model` loads, without its layers. Raises LanguageModelError.

    transformers is asked for a model of no layers, so that of the files only embeddings and head
    are read. Where a family cannot be made so, or its embeddings do not come, all of it is loaded
    and the rest given up again.
    """
    less = _load_without_layers(name, revision, dtype) if quantization is None else None
    if less is None:
        whole: Any = load_language_model(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization=quantization,
        )
        less = (whole, whole.config)
    model, config = less
    found = EmbeddingsOnly(model.get_input_embeddings(), config, model.generation_config)
    return found.requires_grad_(False).eval()


def _load_without_layers(name: str, revision: str | None, dtype: str) -> tuple[Any, Any] | None:
    """A model of no layers and the config of the whole one, or None if there is no such thing."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if gguf_arguments(name)[1]:
        return None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # of every layer it would say that it is left over
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        fewer = copy.deepcopy(config)
        text = fewer.get_text_config()
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
        )
    except (*LOAD_FAULTS, AttributeError, IndexError, TypeError, ZeroDivisionError):
        return None
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    return None if report["missing_keys"] or report["mismatched_keys"] else (model, config)
