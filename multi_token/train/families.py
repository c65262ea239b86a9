"""Rows about the same media, which a pack can show once: found by content, measured on samples.

Border: which rows begin alike, and by how much; packing.py plans with it, collate.py lays it out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from multi_token.collate import shared_media_prefix_length
from multi_token.data.feature_cache.keys import digest
from multi_token.data.sources import TrainingSource
from multi_token.types import Sample


@dataclass(frozen=True)
class SharedMediaGroup:
    """Rows that begin with the same media, and what of each is the same: tokens and items."""

    rows: tuple[int, ...]
    num_tokens: int
    num_items: int


def find_shared_media_groups(
    keys: Sequence[Hashable | None], read: Callable[[int], Sample]
) -> list[SharedMediaGroup]:
    """Rows of one key that begin alike.

    `keys`: what each row shows first, by name or content, None for nothing; `read` gives the sample
    of a row, which is asked for only where a key comes more than once. What is shared is measured
    on the samples, by ids and encoder inputs.
    """
    by_key: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        if key is not None:
            by_key.setdefault(key, []).append(row)
    found = []
    for rows in by_key.values():
        samples = [read(row) for row in rows] if len(rows) > 1 else []
        shared = shared_media_prefix_length(samples) if samples else 0
        if shared:
            num_items = sum(place.start < shared for place in samples[0].media_spans)
            found.append(SharedMediaGroup(tuple(rows), shared, num_items))
    return found


def shared_media_groups(sources: Sequence[TrainingSource], dataset: Any) -> list[SharedMediaGroup]:
    """Families among the rows of all sources, in the order in which `dataset` has them.

    A row's key is the content of the first item that it shows.
    """
    keys: list[Hashable | None] = []
    for source in sources:
        for conversation, processor in source.conversations():
            if not conversation.media:
                keys.append(None)
                continue
            first = conversation.media[0]
            content = processor.modalities[first.modality].content(first.source, processor.fetch)
            keys.append((first.modality, digest(content)))
    return find_shared_media_groups(keys, dataset.__getitem__)
