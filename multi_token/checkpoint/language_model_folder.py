"""Folder of a fully trained or merged language model inside a run, as transformers writes it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from multi_token.checkpoint.atomic import atomic_folder
from multi_token.checkpoint.fingerprint import base_model_tensors, check_fingerprint, fingerprint
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.loading import load_language_model

LANGUAGE_MODEL = "language_model"
"""Name of the folder in a run."""


def with_saved_language_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a run that holds its language model."""
    return {
        **fields,
        "language_model": f"./{LANGUAGE_MODEL}",
        "revision": None,
        "quantization": None,
        # in the tokenizer's files, as one text
        "chat_template": None,
        "chat_template_kwargs": {},
    }


def write_language_model(
    language_model: Any, tokenizer: Any, chat_template: str, folder: Path
) -> None:
    """Write the language model without its adapter, its tokenizer and its chat template."""
    # atomic, because the weights may be memory-mapped from the folder that is replaced
    with atomic_folder(folder) as partial:
        tensors = base_model_tensors(language_model.state_dict().items())
        base_language_model(language_model).save_pretrained(partial, state_dict=tensors)
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(partial)


def read_language_model(folder: Path, expected: Mapping[str, Any]) -> dict[str, Tensor]:
    """The folder's tensors in float32.

    Raises LanguageModelError for a folder that cannot be read, and CheckpointError for one with
    another fingerprint than `expected`.
    """
    # loaded as a model, since in the files of some families tensors have other names
    found = load_language_model(str(folder), dtype="float32")
    check_fingerprint(expected, fingerprint(found), folder=folder.parent, name=str(folder))
    return found.state_dict()
