"""Prefix cache: KV cache of earlier prompts, reused by prompts with the same prefix.

An entry is a copy of one KV cache row, under the key of its tokens: ids of text, and in media spans
negative numbers from a digest of the content. A lookup compares keys position by position, so any
common prefix counts, not only complete prompts. The least recently used entry is dropped first, and
no tenant finds the entries of another.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multi_token.media.hashing import digest
from multi_token.serve.engines.base import PrefixCacheStats, Prompt
from multi_token.serve.engines.local.kv_cache import set_seen_tokens

_MIN_PREFIX_TOKENS = 4
"""Shorter prefixes are not worth a copy."""


@dataclass(frozen=True, eq=False)
class CachedPrefix:
    """KV cache of the first tokens of one prompt and its new tokens."""

    tenant: str
    key: Tensor
    """int64 [time]: see `prefix_key`."""
    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    """For each layer two tensors [heads, time, dim]; None for a layer that shares another's."""


class PrefixCache:
    """LRU cache of up to `max_tokens` tokens. Every method is thread-safe."""

    def __init__(self, max_tokens: int, stats: PrefixCacheStats) -> None:
        self.max_tokens = max_tokens
        self.stats = stats
        self._entries: list[CachedPrefix] = []
        """Least recently used first."""
        self._lock = threading.Lock()
        self._layer_template: Any = None
        """Cache object whose layers hold no rows."""

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.key) for entry in self._entries)

    def find(self, prompt: Prompt) -> tuple[CachedPrefix | None, int]:
        """Return the entry with the longest common prefix, and the length of that prefix."""
        # Without the last token: its logits are needed, so prefill must run at least on it.
        key = prefix_key(prompt)[:-1]
        best: CachedPrefix | None = None
        best_length = 0
        with self._lock:
            for entry in reversed(self._entries):
                if entry.tenant != prompt.tenant:
                    continue
                length = common_prefix_length(entry.key, key)
                if length > best_length:
                    best, best_length = entry, length
            if best is None or best_length < _MIN_PREFIX_TOKENS:
                return None, 0
            self._entries = [entry for entry in self._entries if entry is not best] + [best]
            return best, best_length

    def add(
        self, prompt: Prompt, output_ids: Sequence[int], cache: Any, row: int, num_tokens: int
    ) -> None:
        """Copy one row of a KV cache: a prompt and its first new tokens, `num_tokens` in all.

        No effect if a sliding-window layer has dropped positions already: they cannot be restored.
        """
        key = torch.cat([prefix_key(prompt), torch.tensor(output_ids, dtype=torch.long)])
        lengths = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
        first = max(lengths) - num_tokens
        if len(key) != num_tokens or first < 0 or min(lengths) < max(lengths):
            return
        key = key[: self.max_tokens]
        last = first + len(key)
        with self._lock:
            own_entries = [entry for entry in self._entries if entry.tenant == prompt.tenant]
            if any(common_prefix_length(entry.key, key) == len(key) for entry in own_entries):
                return
            layers = tuple(
                None
                if layer.keys is None
                # Clones: a view would keep the complete batch's KV cache in memory.
                else tuple(x[row, :, first:last].clone() for x in (layer.keys, layer.values))
                for layer in cache.layers
            )
            if self._layer_template is None:
                self._layer_template = _empty_copy(cache)
            # Entries that are prefixes of the new one can never be the best match again.
            self._entries = [
                entry
                for entry in self._entries
                if entry.tenant != prompt.tenant
                or common_prefix_length(entry.key, key) < len(entry.key)
            ]
            self._entries.append(CachedPrefix(prompt.tenant, key, layers))
            while self.num_tokens > self.max_tokens:
                self._entries.pop(0)

    def build_kv_cache(
        self, rows: Sequence[tuple[CachedPrefix | None, int]], num_tokens: int
    ) -> Any:
        """Return a KV cache whose rows hold these prefixes, left-padded to `num_tokens`."""
        cache = _empty_copy(self._layer_template)
        given = next(entry for entry, num in rows if entry is not None and num)
        for number, layer in enumerate(cache.layers):
            held = given.layers[number]
            if held is None:
                continue
            # One size for each of the two: some models have another head dim for values.
            layer.keys, layer.values = (
                x.new_zeros(len(rows), x.shape[0], num_tokens, x.shape[2]) for x in held
            )
            for row, (entry, num) in enumerate(rows):
                own = None if entry is None or not num else entry.layers[number]
                if own is not None:
                    layer.keys[row, :, num_tokens - num :] = own[0][:, :num]
                    layer.values[row, :, num_tokens - num :] = own[1][:, :num]
            set_seen_tokens(layer, num_tokens)
        return cache


def prefix_key(prompt: Prompt) -> Tensor:
    """Return int64 [time]: text ids, and in media spans negative numbers from the content's key."""
    key = prompt.input_ids.cpu().clone()
    for span, media_key in zip(prompt.media_spans, prompt.media_keys, strict=True):
        # 56 bits, so that adding the position cannot overflow int64.
        base = int(digest(media_key.encode())[:14], 16)
        key[span.positions()] = -1 - base - torch.arange(span.num_embeds)
    return key


def common_prefix_length(key: Tensor, other: Tensor) -> int:
    """Return the number of equal leading elements."""
    num = min(len(key), len(other))
    differ = (key[:num] != other[:num]).nonzero()
    return int(differ[0]) if len(differ) else num


def _empty_copy(cache: Any) -> Any:
    """Return a copy of a cache object with copied layers that hold no rows."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys[:0], layer.values[:0]
    return copied
