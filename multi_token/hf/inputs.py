"""Batches as flat tensors, the shape that transformers expects of a processor.

    input_ids, attention_mask     [batch, time]
    mm_token_type_ids             [batch, time]: 0 at text, n at media of the n-th modality
    <modality>.<encoder input>    such as `image.pixel_values`, batch axis first

A modality's name has no dot, so the names cannot clash.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from multi_token.errors import SpliceError
from multi_token.types import Batch, MediaBatch

TOKEN_TYPES = "mm_token_type_ids"
_HALF = (torch.float16, torch.bfloat16)


def to_flat(batch: Batch, modalities: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a batch by flat names, without labels."""
    token_types = torch.zeros_like(batch["input_ids"])
    flat = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        TOKEN_TYPES: token_types,
    }
    for number, name in enumerate(modalities, start=1):
        if name in batch["media"]:
            media = batch["media"][name]
            token_types.view(-1)[media["positions"]] = number
            flat |= {f"{name}.{key}": value for key, value in media["inputs"].items()}
    return flat


def take_media(
    inputs: dict[str, Any], modalities: Iterable[str], token_types: Tensor | None
) -> dict[str, MediaBatch]:
    """Remove the media tensors from flat inputs, and return them by modality.

    Args:
        inputs: Flat inputs; tensors of media are removed.
        modalities: Names in the order of the model.
        token_types: `mm_token_type_ids`; None for ids without media.

    Raises:
        SpliceError: If tensors of a modality come without its positions, or the other way round.
    """
    names = list(modalities)
    found: dict[str, dict[str, Tensor]] = {}
    for name in names:
        own = {key: inputs.pop(key) for key in list(inputs) if key.startswith(f"{name}.")}
        if own:
            # a `.to(dtype)` of the caller also casts inputs; encoders cast what they want in half
            found[name] = {
                key.partition(".")[2]: value.float() if value.dtype in _HALF else value
                for key, value in own.items()
            }
    if token_types is None:
        counts = [0] * (len(names) + 1)
    else:
        counts = torch.bincount(token_types.flatten(), minlength=len(names) + 1).tolist()
    if len(counts) > len(names) + 1:
        raise SpliceError(
            f"{TOKEN_TYPES} has the value {len(counts) - 1}, but the model has {len(names)} "
            f"modalities ({', '.join(names)}); take the inputs from this run's own processor"
        )
    media: dict[str, MediaBatch] = {}
    for number, name in enumerate(names, start=1):
        if (name in found) != (counts[number] > 0):
            tensors = ", ".join(f"{name}.{key}" for key in found.get(name, {})) or f"{name}.*"
            raise SpliceError(
                f"{tensors} and {TOKEN_TYPES} belong together: the model got "
                + (
                    f"the tensors and no position of {name}"
                    if name in found
                    else f"{counts[number]} positions of {name} and no tensors"
                )
                + "; pass all that the processor returned (`model.generate(**inputs)`)"
            )
        if name in found and token_types is not None:
            positions = (token_types.flatten() == number).nonzero().flatten()
            media[name] = {"inputs": found[name], "positions": positions}
    return media
