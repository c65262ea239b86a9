"""Fingerprint of a language model: is this the one that a checkpoint was trained on?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multi_token.errors import CheckpointError

_NUM_ROWS = 64
"""Number of rows of the input embeddings in a fingerprint, evenly spread."""
_NUM_COLUMNS = 256
"""Number of columns of each matrix in a fingerprint."""
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_ids")


def fingerprint(language_model: Any) -> dict[str, Any]:
    """Fingerprint of a language model: its shape, and hashes of a few weights.

    `weights`: hash of some rows of the input embeddings and of all vectors (norms, biases), which
    quantization does not change. `layers`: hash of the first and last row of every matrix, which a
    merged adapter changes and an attached one does not. A hash is None on the meta device, for
    quantized layers, and for layers that are not loaded.
    """
    config = language_model.config.get_text_config()
    embeddings = language_model.get_input_embeddings().weight
    rows = embeddings[:: max(1, len(embeddings) // _NUM_ROWS)][:_NUM_ROWS]
    parameters = [
        p for _, p in sorted(base_model_tensors(language_model.named_parameters()).items())
    ]
    vectors = [p for p in parameters if p.ndim == 1 and p.is_floating_point()]
    # an embeddings-only model has rows of the embeddings, but no norms to hash with them
    is_complete = not getattr(language_model, "embeddings_only", False)
    return {
        "model_type": config.model_type,
        "hidden_size": int(embeddings.shape[1]),
        "num_hidden_layers": getattr(config, "num_hidden_layers", None),
        "num_ids": int(embeddings.shape[0]),
        "dtype": str(embeddings.dtype).removeprefix("torch."),
        "weights": _hash([rows, *vectors]) if is_complete else None,
        "layers": _hash(_first_and_last_rows(parameters)) if is_complete else None,
    }


def base_model_tensors(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the language model itself under its own names, with or without PEFT's wrapper."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in named
        if ".lora_" not in name
    }


def _first_and_last_rows(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The first and last row of every matrix; an empty list if some are quantized."""
    matrices = [p for p in parameters if p.ndim > 1]
    if not all(m.is_floating_point() and type(m.data) is Tensor for m in matrices):
        return []
    # rows at both ends: a few kilobytes per matrix, even of a large model on a device
    return [m.flatten(0, -2)[[0, -1], :_NUM_COLUMNS] for m in matrices]


@torch.no_grad()
def _hash(tensors: list[Tensor]) -> str | None:
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return None
    digest = hashlib.sha256()
    for tensor in tensors:
        # bytes, since numpy has no bfloat16
        values = tensor.detach().cpu().contiguous()
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def check_fingerprint(
    expected: Mapping[str, Any], found: Mapping[str, Any], *, folder: Path, name: str
) -> None:
    """Raise CheckpointError if two fingerprints are not of the same language model."""
    remedy = "name the right one (`language_model=`, or --language-model on the command line)"
    if difference := fingerprint_difference(expected, found):
        raise CheckpointError(
            f"{folder} belongs to another language model than {name}, which has {difference}; "
            f"{remedy}"
        )


def fingerprint_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The difference of two fingerprints, to follow "has"; None if they are of the same model."""
    differing = [
        f"{key} {found[key]} instead of {expected[key]}"
        for key in _SHAPE
        if found[key] != expected[key]
    ]
    if differing:
        return ", ".join(differing)
    same = all(len({expected[part], found[part]} - {None}) <= 1 for part in ("weights", "layers"))
    # in another precision, rounding alone changes the hashes
    if expected["dtype"] == found["dtype"] and not same:
        return "the same shape but other weights"
    return None
