"""Encodes the items of rows into a feature cache, in any number of processes at once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.data.feature_cache.keys import canonical_source
from multi_token.data.formats import to_conversation
from multi_token.data.rows import row_id_of
from multi_token.data.scan import Problem
from multi_token.errors import MediaError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Media


@dataclass(frozen=True)
class RowSource:
    """Rows of one source, with the access to their media."""

    rows: Sequence[Any]
    fetch: Fetch
    name: str


@dataclass
class EncodeReport:
    """Result of encoding the items of one shard of the rows."""

    num_rows: int = 0
    num_items: int = 0
    """Items of this share; an item counts once for each row that names it."""
    num_encoded: int = 0
    problems: list[Problem] = field(default_factory=list)
    """Rows that are no conversation (in all shares), and items that cannot be read."""

    @property
    def num_already_cached(self) -> int:
        """Items that needed no encoding: in the cache already, or the same as another."""
        num_unread = sum(problem.kind in _OF_ITEMS for problem in self.problems)
        return self.num_items - self.num_encoded - num_unread


_OF_ITEMS = ("missing_file", "undecodable")


def encode_rows(
    sources: Sequence[RowSource],
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    cache: FeatureCache,
    *,
    share: int = 0,
    num_shares: int = 1,
    chosen: Sequence[Sequence[int]] | None = None,
    on_row: Callable[[], None] | None = None,
) -> EncodeReport:
    """Encode the items of one share that the cache lacks.

    `share` of `num_shares`: items are distributed by their source, so that one process encodes an
    item that many rows name. All shares together are all items. `chosen`: rows of each source that
    are read; None for all.
    """
    report = EncodeReport()
    # the row that is being read, for messages about its items
    at: tuple[int, str] = (0, "")

    def items() -> Iterator[tuple[Media, Fetch]]:
        nonlocal at
        for number, source in enumerate(sources):
            for index in range(len(source.rows)) if chosen is None else chosen[number]:
                report.num_rows += 1
                at = (index, row_id_of(index, None, source.name))
                try:
                    row = source.rows[index]
                    at = (index, row_id_of(index, row, source.name))
                    conversation = to_conversation(row, list(modalities), row_id=at[1])
                except RowError as error:
                    report.problems.append(Problem.of(index, error))
                    continue
                finally:
                    if on_row is not None:
                        on_row()
                for item in conversation.media:
                    if share_of(item, index, num_shares) == share:
                        report.num_items += 1
                        yield item, source.fetch

    def on_bad(item: Media, error: MediaError) -> None:
        # `fill` opens an item before it takes the next one, so `at` is the item's row
        report.problems.append(Problem(*at, error.kind, f"{item.modality}: {error}"))

    report.num_encoded = cache.fill(items(), modalities, encoders, on_bad=on_bad)
    return report


@dataclass
class MissingItems(Dataset["NDArray[np.int64]"]):
    """Parts of the rows -> int64 [items, 3] of the items that a cache lacks: source, row, share.

    No file is read. An item is known by path, size and time of change of its file, or its URL.
    """

    PART: ClassVar[int] = 64
    """Rows of a part."""

    sources: Sequence[RowSource]
    modalities: Mapping[str, Modality]
    cache: FeatureCache
    parts: Sequence[tuple[int, int]]
    """Source and first row of each part."""
    num_shares: int

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> NDArray[np.int64]:
        at, start = self.parts[number]
        source, names = self.sources[at], list(self.modalities)
        found: list[tuple[int, int, int]] = []
        for row in range(start, min(start + self.PART, len(source.rows))):
            try:
                conversation = to_conversation(source.rows[row], names, row_id="")
            except RowError:  # the scan names it
                continue
            found += [
                (at, row, share_of(item, row, self.num_shares))
                for item in conversation.media
                if not self.cache.has(item, self.modalities[item.modality], source.fetch)
            ]
        return np.array(found, np.int64).reshape(-1, 3)


def sample_items(
    sources: Sequence[RowSource], modalities: Mapping[str, Modality], num: int = 8
) -> tuple[list[tuple[Media, Fetch]], int]:
    """Return the first items of the rows, and the number of rows that were read for them."""
    found: list[tuple[Media, Fetch]] = []
    num_rows = 0
    for source in sources:
        for index in range(len(source.rows)):
            num_rows += 1
            try:
                conversation = to_conversation(source.rows[index], list(modalities), row_id="")
            except RowError:  # the scan names it
                continue
            found += [(item, source.fetch) for item in conversation.media]
            if len(found) >= num:
                return found[:num], num_rows
    return found, num_rows


def share_of(item: Media, row: int, num_shares: int) -> int:
    """Return the share of an item: by the name of its source, or else by its row."""
    text = canonical_source(item.source)
    if text is None:
        return row % num_shares
    # not `hash`, which Python seeds differently in each process
    return zlib.crc32(f"{item.modality}\0{text}".encode(errors="surrogatepass")) % num_shares


def random_preprocessing(
    items: Sequence[tuple[Media, Fetch]], modalities: Mapping[str, Modality]
) -> str | None:
    """Return the reason not to cache features where preprocessing is random, or None.

    Each item is prepared twice: with random preprocessing, the cache would repeat one draw for
    ever.
    """
    for item, fetch in items:
        modality = modalities[item.modality]
        try:
            one, two = (modality.prepare(modality.load(item.source, fetch)) for _ in range(2))
        except MediaError:  # reading its row names it
            continue
        same = one.inputs.keys() == two.inputs.keys() and all(
            torch.equal(value, two.inputs[key]) for key, value in one.inputs.items()
        )
        if not same:
            return (
                f"`feature_cache` keeps one set of features for each item, but the preprocessing "
                f"of {item.modality!r} is random: an item, prepared twice, gave different inputs"
            )
    return None
