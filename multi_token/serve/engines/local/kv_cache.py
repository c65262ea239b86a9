"""Rows of a language model's cache of keys and values: fewer of them, or those of two as one.

Border: the cache object and its tensors. Which rows there are, and who may join, stepping.py says.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SEEN_TOKENS = "cumulative_length"
"""Under this name transformers' layers count tokens, where they do not keep all of them."""


def is_paddable(cache: Any, num_rows: int, num_tokens: int) -> bool:
    """Whether every layer is keys and values [num_rows, heads, time, dim] of all tokens, or of the
    last ones within a window, and nothing else: then `concat_rows` and `trim_left` may be used.

    A recurrent layer keeps a state, a quantized one hides them: zeros before these would change
    what comes. Layers that hold nothing, since they use those of another, do not matter.
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
    """Only these rows are left, in this order, by the cache's own method, of whatever kind it is.

    Raises what a cache raises that cannot do it.
    """
    cache.reorder_cache(torch.tensor(rows))


def trim_left(cache: Any, num_tokens: int) -> None:
    """Without the first of all tokens but the last `num_tokens`: padding in all rows."""
    for layer in cache.layers:
        if layer.keys is not None:
            first = max(0, layer.keys.shape[2] - _num_cached_positions(layer, num_tokens))
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
            set_seen_tokens(layer, num_tokens)


def concat_rows(cache: Any, other: Any, num_tokens: int) -> None:
    """The rows of `other` behind those of `cache`, all padded on the left to `num_tokens`.

    If it fails on the way, `cache` is as it was.
    """
    joined: list[tuple[Any, Tensor, Tensor]] = []
    for layer, more in zip(cache.layers, other.layers, strict=True):
        if layer.keys is not None:
            time = _num_cached_positions(layer, num_tokens)
            keys = _stack_left_padded((layer.keys, more.keys), time)
            values = _stack_left_padded((layer.values, more.values), time)
            joined.append((layer, keys, values))
    for layer, keys, values in joined:
        layer.keys, layer.values = keys, values
        set_seen_tokens(layer, num_tokens)


def _stack_left_padded(held: Sequence[Tensor], time: int) -> Tensor:
    """Each [rows, heads, up to time, dim] -> [all rows, heads, time, dim], zeros before them."""
    _, num_heads, _, dim = held[0].shape
    stacked = held[0].new_zeros(sum(map(len, held)), num_heads, time, dim)
    for rows, x in zip(stacked.split([len(x) for x in held]), held, strict=True):
        rows[:, :, time - x.shape[2] :] = x
    return stacked


def _layer_state(layer: Any) -> dict[str, Any]:
    """What a layer holds that is more than a setting: tensors, counts, and whatever holds them."""
    settings = (bool, str, torch.dtype, torch.device, type(None))
    return {name: x for name, x in vars(layer).items() if not isinstance(x, settings)}


def _is_plain_kv_layer(layer: Any, num_rows: int, num_tokens: int) -> bool:
    state = _layer_state(layer)
    window = layer.get_max_length()
    for name, x in state.items():
        if name in ("keys", "values"):
            time = _num_cached_positions(layer, num_tokens)
            if x.ndim != 4 or (x.shape[0], x.shape[2]) != (num_rows, time):
                return False
        elif name == _SEEN_TOKENS:
            if x != num_tokens:
                return False
        elif not isinstance(x, (int, Tensor)) or window < 0 or x != window:
            return False
    if layer.get_seq_length() != num_tokens or not {"keys", "values"} <= state.keys():
        return False
    return window < 0 or (_SEEN_TOKENS in state and _keeps_sliding_window(layer, window))


def _keeps_sliding_window(layer: Any, window: int) -> bool:
    """Whether a layer with a window keeps the tokens before the next one that it can see; tried."""
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
    """How many of so many tokens a layer keeps."""
    window = layer.get_max_length()
    return num_tokens if window < 0 else min(num_tokens, window - 1)


def set_seen_tokens(layer: Any, num_tokens: int) -> None:
    """Tell a layer that counts its tokens how many it has."""
    if hasattr(layer, _SEEN_TOKENS):
        setattr(layer, _SEEN_TOKENS, num_tokens)
