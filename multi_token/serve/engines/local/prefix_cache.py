"""What prompts begin with, read already: keys and values that the next prompt need not compute.

Border: which prompt shares how much with what is kept, and the tensors of that. stepping.py reads
prompts behind it, and way.py finds whether a language model can be read so.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multi_token.data.feature_cache.keys import digest
from multi_token.serve.engines.base import Prompt
from multi_token.serve.engines.local.kv_cache import set_seen_tokens
from multi_token.serve.engines.prefix_hits import PrefixCacheStats

_MIN_PREFIX_TOKENS = 4
"""Fewer tokens than these are not worth a copy."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """The first tokens of one prompt, and of what was answered."""

    tenant: str
    key: Tensor
    """int64 [time]: see `marks_of`."""
    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    """Of each layer keys and values [heads, time, dim]; None for one that uses another's."""


class PrefixCache:
    """Those used last, up to `max_tokens` in all. Each tenant finds only its own.

    Every method may be called from any thread.
    """

    def __init__(self, max_tokens: int, stats: PrefixCacheStats) -> None:
        self.max_tokens = max_tokens
        self.stats = stats
        self._entries: list[CachedPrefix] = []
        """The one used last is the last."""
        self._lock = threading.Lock()
        self._layer_template: Any = None
        """A cache whose layers hold nothing that matters."""

    @property
    def num_tokens(self) -> int:
        """Of all that are kept."""
        return sum(len(one.key) for one in self._entries)

    def find(self, prompt: Prompt) -> tuple[CachedPrefix | None, int]:
        """What shares most with a prompt, and how many tokens; never the last one of the prompt,
        which has to be read for what follows it.
        """
        marks = prefix_key(prompt)[:-1]
        best: CachedPrefix | None = None
        most = 0
        with self._lock:
            for one in reversed(self._entries):
                num = common_prefix_length(one.key, marks) if one.tenant == prompt.tenant else 0
                if num > most:
                    best, most = one, num
            if best is None or most < _MIN_PREFIX_TOKENS:
                return None, 0
            self._entries = [one for one in self._entries if one is not best] + [best]
            return best, most

    def add(
        self, prompt: Prompt, output_ids: Sequence[int], cache: Any, row: int, num_tokens: int
    ) -> None:
        """Keep a row of a cache: a prompt and the first tokens of its answer, padded on the left,
        `num_tokens` in all.

        Not if a layer has let its first tokens go (a window): they cannot be had again.
        """
        marks = torch.cat([prefix_key(prompt), torch.tensor(output_ids, dtype=torch.long)])
        held = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
        first = max(held) - num_tokens
        if len(marks) != num_tokens or first < 0 or min(held) < max(held):
            return
        marks = marks[: self.max_tokens]
        last = first + len(marks)
        with self._lock:
            mine = [one for one in self._entries if one.tenant == prompt.tenant]
            if any(common_prefix_length(one.key, marks) == len(marks) for one in mine):
                return
            layers = tuple(
                None
                if layer.keys is None
                else tuple(x[row, :, first:last].clone() for x in (layer.keys, layer.values))
                for layer in cache.layers
            )
            if self._layer_template is None:
                self._layer_template = _empty_copy(cache)
            shorter = [one for one in mine if common_prefix_length(one.key, marks) == len(one.key)]
            self._entries = [one for one in self._entries if one not in shorter]
            self._entries.append(CachedPrefix(prompt.tenant, marks, layers))
            while self.num_tokens > self.max_tokens:
                self._entries.pop(0)

    def build_kv_cache(
        self, rows: Sequence[tuple[CachedPrefix | None, int]], num_tokens: int
    ) -> Any:
        """A cache in which each row holds so many first tokens, padded on the left to all."""
        cache = _empty_copy(self._layer_template)
        given = next(one for one, num in rows if one is not None and num)
        for number, layer in enumerate(cache.layers):
            held = given.layers[number]
            if held is None:
                continue
            num_heads, _, dim = held[0].shape
            layer.keys = held[0].new_zeros(len(rows), num_heads, num_tokens, dim)
            layer.values = held[1].new_zeros(
                len(rows), held[1].shape[0], num_tokens, held[1].shape[2]
            )
            for row, (one, num) in enumerate(rows):
                mine = None if one is None or not num else one.layers[number]
                if mine is not None:
                    layer.keys[row, :, num_tokens - num :] = mine[0][:, :num]
                    layer.values[row, :, num_tokens - num :] = mine[1][:, :num]
            set_seen_tokens(layer, num_tokens)
        return cache


def prefix_key(prompt: Prompt) -> Tensor:
    """int64 [time]: ids of text, and in media spans numbers below zero that only the same token of
    the same content has."""
    marks = prompt.input_ids.cpu().clone()
    for place, key in zip(prompt.media_spans, prompt.media_keys, strict=True):
        base = int(digest(key.encode())[:14], 16)  # 56 bits, so that no sum leaves 63
        marks[place.start : place.start + place.length] = -1 - base - torch.arange(place.length)
    return marks


def common_prefix_length(key: Tensor, other: Tensor) -> int:
    """How many numbers are equal from the first one on."""
    num = min(len(key), len(other))
    differ = (key[:num] != other[:num]).nonzero()
    return int(differ[0]) if len(differ) else num


def _empty_copy(cache: Any) -> Any:
    """A copy whose layers are copies, and hold no tensors of the other's."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys[:0], layer.values[:0]
    return copied
