"""Encodes the items of rows into a feature cache, in any number of processes at once.

rows -> find_missing: items that the cache lacks (data workers parse rows, no file is opened)
     -> distinct items of this process -> encode_missing: data workers read and prepare them,
        this process encodes them in batches and writes shards
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch.utils.data import Dataset

from multi_token.data.feature_cache.cache import FeatureCache, PreparedItem
from multi_token.data.feature_cache.keys import canonical_source, item_key
from multi_token.data.formats import to_conversation
from multi_token.data.parallel import read_parallel
from multi_token.data.row_source import RowSource
from multi_token.data.rows import row_id_of
from multi_token.data.scan import Problem
from multi_token.errors import MediaError, MultiTokenError, RowError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Conversation, Media


@dataclass
class EncodeReport:
    """Result of encoding the items of one share of the rows."""

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
_MISSING = np.dtype(
    [
        ("key", "S32"),  # `item_key`
        ("source", "i4"),
        ("row", "i8"),
        ("item", "i4"),  # number within its row
        ("share", "i4"),
    ]
)


def encode_rows(
    sources: Sequence[RowSource],
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    cache: FeatureCache,
    *,
    share: int = 0,
    num_shares: int = 1,
    num_workers: int = 0,
    console: Console,
) -> EncodeReport:
    """Encode the items of one share that the cache lacks.

    `share` of `num_shares`: items are distributed by their source, so that one process encodes an
    item that many rows name. All shares together are all items.
    """
    cache.register_encoders(modalities, encoders)
    found = find_missing(
        sources,
        modalities,
        cache,
        num_shares=num_shares,
        only=share,
        num_workers=num_workers,
        console=console,
    )
    num_encoded, unread = encode_missing(
        sources,
        modalities,
        encoders,
        cache,
        found.missing,
        num_workers=num_workers,
        console=console,
    )
    problems = sorted([*found.problems, *unread], key=lambda one: (one[0], one[1].index))
    return EncodeReport(
        found.num_rows, found.num_items, num_encoded, [problem for _, problem in problems]
    )


@dataclass
class FoundItems:
    """Items of some rows that a cache lacks."""

    num_rows: int = 0
    num_items: int = 0
    """Items in the cache included."""
    missing: NDArray[Any] = field(default_factory=lambda: np.empty(0, _MISSING))
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    """Rows that are no conversation, with the number of their source."""


def find_missing(
    sources: Sequence[RowSource],
    modalities: Mapping[str, Modality],
    cache: FeatureCache,
    *,
    num_shares: int,
    only: int | None = None,
    choose: Callable[[Sequence[Any]], Sequence[Any]] = lambda parts: parts,
    num_workers: int,
    console: Console,
) -> FoundItems:
    """Find the items that a cache lacks; reads no file.

    Args:
        sources: All rows.
        modalities: Modalities by instance name.
        cache: The cache, with its encoders registered.
        num_shares: Number of the shares that items are distributed to.
        only: Share whose items are looked at; None: all.
        choose: Function that returns the parts of the rows that are looked at.
        num_workers: Data workers.
        console: Console of the bar.
    """
    parts = [
        (at, start)
        for at, source in enumerate(sources)
        for start in range(0, len(source.rows), MissingItems.PART)
    ]
    dataset = MissingItems(sources, modalities, cache, choose(parts), num_shares, only)
    found = FoundItems()
    missing = [found.missing]
    for part in read_parallel(
        dataset,
        num_workers=num_workers,
        console=console,
        description="Looking for features",
        total=len(dataset) * MissingItems.PART,
        size=lambda _: MissingItems.PART,
    ):
        found.num_rows += part.num_rows
        found.num_items += part.num_items
        found.problems += part.problems
        missing.append(part.missing)
    found.missing = np.concatenate(missing)
    return found


def encode_missing(
    sources: Sequence[RowSource],
    modalities: Mapping[str, Modality],
    encoders: Mapping[str, Encoder],
    cache: FeatureCache,
    missing: NDArray[Any],
    *,
    num_workers: int,
    console: Console,
) -> tuple[int, list[tuple[int, Problem]]]:
    """Encode items that were found missing, each once; data workers read and prepare them.

    Returns:
        Number of encoded items; problems of the rows whose items cannot be read, with the number of
        their source.
    """
    missing = missing[np.lexsort([missing[name] for name in ("item", "row", "source")])]
    _, firsts, numbers = np.unique(missing["key"], return_index=True, return_inverse=True)
    # in the order of the rows, which keeps reading sequential
    order = np.argsort(firsts)
    reader = _ItemReader(sources, modalities, cache, missing[firsts[order]])
    unread: dict[int, RowError] = {}

    def items() -> Iterator[PreparedItem]:
        read = read_parallel(
            reader,
            num_workers=num_workers,
            console=console,
            description="Encoding items",
            total=len(reader),
        )
        for number, item in zip(order.tolist(), read, strict=True):
            if isinstance(item, PreparedItem):
                yield item
            elif isinstance(item, RowError) and item.kind in _OF_ITEMS:
                unread[number] = item
            else:
                raise item

    num_encoded = cache.encode(items(), modalities, encoders)
    problems: list[tuple[int, Problem]] = []
    # of every row that names such an item
    for place in np.flatnonzero(np.isin(numbers, list(unread))).tolist():
        at, row, error = *missing[place][["source", "row"]].item(), unread[int(numbers[place])]
        row_id = row_id_of(row, sources[at].rows[row], sources[at].name)
        problems.append((at, Problem(row, row_id, error.kind, error.sentence)))
    return num_encoded, problems


@dataclass
class MissingItems(Dataset[FoundItems]):
    """Parts of the rows -> the items that a cache lacks.

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
    only: int | None
    """Share whose items are looked at; None: all."""

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> FoundItems:
        at, start = self.parts[number]
        source, found = self.sources[at], FoundItems()
        missing: list[tuple[Any, ...]] = []
        for row in range(start, min(start + self.PART, len(source.rows))):
            found.num_rows += 1
            try:
                conversation = _conversation(source, row, self.modalities)
            except RowError as error:
                found.problems.append((at, Problem.of(row, error)))
                continue
            for i, item in enumerate(conversation.media):
                share = share_of(item, row, self.num_shares)
                if self.only not in (None, share):
                    continue
                found.num_items += 1
                modality = self.modalities[item.modality]
                if not self.cache.has(item, modality, source.fetch):
                    key = item_key(item, modality, source.fetch, f"{at} {row} {i}")
                    missing.append((key, at, row, i, share))
        found.missing = np.array(missing, _MISSING)
        return found


@dataclass
class _ItemReader(Dataset["PreparedItem | MultiTokenError"]):
    """Items that a cache lacks -> their key and encoder inputs, or the error of reading them."""

    sources: Sequence[RowSource]
    modalities: Mapping[str, Modality]
    cache: FeatureCache
    items: NDArray[Any]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> PreparedItem | MultiTokenError:
        _, at, row, i, _ = self.items[number].item()
        source, row_id, name = self.sources[at], "", ""
        try:
            conversation = _conversation(source, row, self.modalities)
            row_id, item = conversation.id, conversation.media[i]
            name = item.modality
            return self.cache.prepare(item, self.modalities[name], source.fetch)
        except MediaError as error:
            return RowError(f"{name}: {error}", kind=error.kind, row_id=row_id)
        except MultiTokenError as error:
            return error


def _conversation(
    source: RowSource, index: int, modalities: Mapping[str, Modality]
) -> Conversation:
    row = source.rows[index]
    return to_conversation(row, modalities, row_id=row_id_of(index, row, source.name))


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
                conversation = to_conversation(source.rows[index], modalities, row_id="")
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
