"""Items that an encoder takes in parts (tiles, frames, clips, chunks, windows), in one batch.

The parts of all items are encoded side by side. Two index tensors then lay the features out by
item: `part` is the number of a part in the batch, `feature` the number of a feature in that part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from multi_token.modalities.base import stack_padded
from multi_token.types import Features, Prepared

PADDING = -2
"""Value of `part` after the last feature of a shorter item."""
_INDEX = ("part", "feature")


def index_features(counts: Sequence[int]) -> dict[str, Tensor]:
    """Return `part` and `feature`, int64 [length], of an item; `counts`: features of each part."""
    return {
        "part": torch.cat([torch.full((n,), part) for part, n in enumerate(counts)]),
        "feature": torch.cat([torch.arange(n) for n in counts]),
    }


def collate_parts(items: Sequence[Prepared]) -> dict[str, Tensor]:
    """Join items whose inputs are [parts, ...], beside `part` and `feature` [length].

    Returns:
        The inputs [parts of all items, ...], shorter ones padded with zeros; `part` and `feature`
        int64 [items, longest], with parts counted through the batch.
    """
    keys = [key for key in items[0].inputs if key not in _INDEX]
    batch = {key: _cat_padded([item.inputs[key] for item in items]) for key in keys}
    parts, num_before = [], 0
    for item in items:
        part = item.inputs["part"]
        # Negative values mark something else than a feature: the end of a line (anyres.py).
        parts.append(torch.where(part >= 0, part + num_before, part))
        num_before += len(item.inputs[keys[0]])
    features = [item.inputs["feature"] for item in items]
    pad = nn.utils.rnn.pad_sequence
    batch["part"] = pad(parts, batch_first=True, padding_value=PADDING)
    batch["feature"] = pad(features, batch_first=True)
    return batch


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return torch.cat(list(tensors))
    return stack_padded([part for tensor in tensors for part in tensor])


def gather_features(values: Tensor, part: Tensor, feature: Tensor) -> Features:
    """Lay the features of all parts [parts, length, dim] out by item, as [items, longest, dim]."""
    # Markers below 0 are clamped to a valid row and zeroed: indexing by a mask would make the shape
    # depend on the values, which costs a host sync.
    index = part.clamp(min=0) * values.shape[1] + feature
    return Features(values.flatten(0, 1)[index] * (part >= 0)[..., None], mask=part != PADDING)


def run_in_micro_batches(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], size: int
) -> Tensor:
    """Return `run(**inputs)` on slices of at most `size` along the first axis, joined along it."""
    num_parts = len(next(iter(inputs.values())))
    if num_parts <= size:
        return run(**inputs)
    return torch.cat(
        [
            run(**{key: value[start : start + size] for key, value in inputs.items()})
            for start in range(0, num_parts, size)
        ]
    )
