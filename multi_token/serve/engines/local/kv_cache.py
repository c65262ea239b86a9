"""KV cache: select, trim, pad and concatenate batch rows of transformers' cache objects.

A layer has two tensors [rows, heads, time, dim]. Padding is on the left, so the newest position of
every row is at the same index and new tokens need no gather. A sliding-window layer keeps the last
`window - 1` positions only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SEEN_TOKENS = "cumulative_length"
"""Attribute under which transformers' sliding-window layers count the tokens they have seen."""


def is_paddable(cache: Any, num_rows: int, num_tokens: int) -> bool:
    """True if `concat_rows` and `trim_left` are valid for this cache.

    Every layer must hold tensors [num_rows, heads, time, dim] of all tokens, or of the last ones
    within a window, and nothing else. A recurrent layer has a state that padding would change, and
    a quantized layer hides its tensors. Layers that share the tensors of others are ignored.
    """
    layers = getattr(cache, "layers", None)
    if not layers or getattr(cache, "offloading", False):
        return False
    held = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    others = [layer for layer in layers if getattr(layer, "keys", None) is None]
    return (
        bool(held)
        and not any(_layer_state(layer) for layer in others)
        and all(_is_plain_kv_layer(layer, num_rows, num_tokens) for layer in held)
    )


def select_rows(cache: Any, rows: Sequence[int]) -> None:
    """Keep only these rows, in this order. Raises what a cache without that operation raises."""
    index = torch.tensor(rows)
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", [])]
    device = next((x.device for x in keys if isinstance(x, Tensor)), index.device)
    # transformers' own method (made for beam search): recurrent states have it too. The index is
    # copied here, since each layer would copy it again, and wait for the device.
    cache.reorder_cache(index.to(device, non_blocking=True))


def trim_left(cache: Any, num_tokens: int) -> None:
    """Keep the last `num_tokens` positions; the others must be padding in all rows."""
    for layer in cache.layers:
        if layer.keys is not None:
            first = max(0, layer.keys.shape[2] - _num_cached_positions(layer, num_tokens))
            # Views: a copy would cost more than the padding it frees, and the next update
            # concatenates into new tensors anyway.
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
            set_seen_tokens(layer, num_tokens)


def concat_rows(cache: Any, other: Any, num_tokens: int) -> None:
    """Append the rows of `other` to `cache`, all left-padded to `num_tokens`.

    If it raises, `cache` is unchanged.
    """
    joined: list[tuple[Any, Tensor, Tensor]] = []
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if layer.keys is not None:
            time = _num_cached_positions(layer, num_tokens)
            keys = _stack_left_padded((layer.keys, more.keys), time)
            values = _stack_left_padded((layer.values, more.values), time)
            joined.append((layer, keys, values))
    # In a second loop: running out of memory at a later layer must not leave layers of two sizes.
    for layer, keys, values in joined:
        layer.keys, layer.values = keys, values
        set_seen_tokens(layer, num_tokens)


def set_seen_tokens(layer: Any, num_tokens: int) -> None:
    """Set a sliding-window layer's token count; no effect on other layers."""
    if hasattr(layer, _SEEN_TOKENS):
        setattr(layer, _SEEN_TOKENS, num_tokens)


def _stack_left_padded(parts: Sequence[Tensor], time: int) -> Tensor:
    """Each [rows, heads, up to time, dim] -> [all rows, heads, time, dim], zeros on the left."""
    _, num_heads, _, dim = parts[0].shape
    # Zeros, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN.
    stacked = parts[0].new_zeros(sum(map(len, parts)), num_heads, time, dim)
    for rows, part in zip(stacked.split([len(part) for part in parts]), parts, strict=True):
        rows[:, :, time - part.shape[2] :] = part
    return stacked


def _layer_state(layer: Any) -> dict[str, Any]:
    """Return a layer's attributes that are more than a setting: tensors, counts, containers."""
    settings = (bool, str, torch.dtype, torch.device, type(None))
    return {name: value for name, value in vars(layer).items() if not isinstance(value, settings)}


def _is_plain_kv_layer(layer: Any, num_rows: int, num_tokens: int) -> bool:
    # By attributes instead of classes: a model's own cache class may add a state to a known one,
    # and an attribute that is unknown here must refuse.
    state = _layer_state(layer)
    window = layer.get_max_length()
    for name, value in state.items():
        if name in ("keys", "values"):
            time = _num_cached_positions(layer, num_tokens)
            if value.ndim != 4 or (value.shape[0], value.shape[2]) != (num_rows, time):
                return False
        elif name == _SEEN_TOKENS:
            if value != num_tokens:
                return False
        elif not isinstance(value, (int, Tensor)) or window < 0 or value != window:
            return False
    if layer.get_seq_length() != num_tokens or not {"keys", "values"} <= state.keys():
        return False
    return window < 0 or (_SEEN_TOKENS in state and _keeps_sliding_window(layer, window))


def _keeps_sliding_window(layer: Any, window: int) -> bool:
    """Probe: True if a window layer keeps exactly the positions that the next token can see."""
    # A shallow copy: `update` assigns new tensors and leaves the original's alone.
    trial = copy.copy(layer)
    seen = layer.get_seq_length()
    shape = (*layer.keys.shape[:2], window + 2, layer.keys.shape[3])
    numbers = (torch.arange(window + 2) % 97).to(layer.keys)  # exact in any precision
    more = numbers[:, None].expand(shape)
    trial.update(more, more)
    kept = numbers[3:]
    return trial.get_seq_length() == seen + window + 2 and all(
        x.shape[2] == window - 1 and bool((x == kept[:, None]).all())
        for x in (trial.keys, trial.values)
    )


def _num_cached_positions(layer: Any, num_tokens: int) -> int:
    """Return how many of the last `num_tokens` positions a layer keeps."""
    window = layer.get_max_length()
    return num_tokens if window < 0 else min(num_tokens, window - 1)
