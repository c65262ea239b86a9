"""Stage zero: which items of the rows the projectors are fitted to, and reading each of them once.

    rows, evenly spread -> occurrences of items (parsed, not decoded) -> distinct items
        -> share of this process -> data workers decode -> fit_projector (closed_form.py)

An item counts as often as rows name it, so the fit is that of all these rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from multi_token.data.feature_cache.keys import item_key
from multi_token.data.parallel import read_parallel, share_of, spread_rows
from multi_token.data.sources import TrainingSource, num_readers
from multi_token.distributed import all_gather, num_processes, rank
from multi_token.errors import MultiTokenError
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.train import ClosedFormSpec
from multi_token.train.closed_form import caption_of, target_ids
from multi_token.train.item_sums import FitItem
from multi_token.train.prepare import Run
from multi_token.types import Media

_BLOCK = 64
"""Rows that a data worker parses at a time."""
_OCCURRENCE = np.dtype(
    [
        ("key", "S32"),  # of the item: its name, or its content where it has none
        ("place", "i8"),  # of its row in the order of reading
        ("source", "i4"),
        ("row", "i8"),
        ("item", "i4"),  # number within its row
        ("name", "i4"),  # number of its modality
        ("captioned", "?"),
        ("calibrated", "?"),
    ]
)


@dataclass(frozen=True)
class DistinctItems:
    """Items of one modality that a projector is fitted to, each once, in the order of the rows."""

    sources: Sequence[TrainingSource]
    occurrences: NDArray[Any]
    """The first occurrence of each item."""
    counts: NDArray[np.int64]
    """Occurrences of each item that the statistics count."""
    captioned: NDArray[Any]
    """Occurrences with a caption, sorted by item."""
    starts: NDArray[np.int64]
    """Item i has the captions `captioned[starts[i] : starts[i + 1]]`."""

    def __len__(self) -> int:
        return len(self.occurrences)

    def item(self, number: int) -> tuple[Media, MultiTokenProcessor]:
        """Return an item by its number, and the processor that loads it."""
        first = self.occurrences[number]
        conversation, processor = self.sources[first["source"]].conversation(int(first["row"]))
        return conversation.media[first["item"]], processor


def find_items(
    run: Run, captioned: Sequence[TrainingSource] | None, names: Sequence[str]
) -> dict[str, DistinctItems]:
    """Find the items that projectors are fitted to; no item is opened.

    Rows are read in an order that spreads evenly, until there are enough items of each modality.
    Processes of a run share them.

    Args:
        run: The run. Its training rows are those of the statistics.
        captioned: Rows for the closed form; None: the training rows.
        names: Instance names of the modalities.

    Returns:
        Items by instance name.
    """
    train = run.recipe.train
    wanted = {name: [train.calibration_items, 0] for name in names}
    others = {name: [0, 0] for name in names}
    for name in names:
        if train.closed_form is not None and run.model.encoder(name).pretrained:
            (wanted if captioned is None else others)[name][1] = train.closed_form.max_items
    found = _occurrences(run, run.sources, 0, wanted)
    if captioned is not None:
        found = np.concatenate([found, _occurrences(run, captioned, len(run.sources), others)])
    found = np.sort(found, order=["source", "row", "item"])
    every = [*run.sources, *(captioned or ())]
    return {name: _distinct(every, found[found["name"] == i]) for i, name in enumerate(names)}


def _distinct(sources: Sequence[TrainingSource], found: NDArray[Any]) -> DistinctItems:
    _, firsts, items = np.unique(found["key"], return_index=True, return_inverse=True)
    # numpy orders them by key; the rows' order keeps reading sequential
    order = np.argsort(firsts)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    items = places[items]
    counts = np.bincount(items[found["calibrated"]], minlength=len(order))
    with_caption = np.flatnonzero(found["captioned"])
    with_caption = with_caption[np.argsort(items[with_caption], kind="stable")]
    starts = np.searchsorted(items[with_caption], np.arange(len(order) + 1))
    return DistinctItems(sources, found[firsts[order]], counts, found[with_caption], starts)


def _occurrences(
    run: Run, sources: Sequence[TrainingSource], first_source: int, wanted: Mapping[str, list[int]]
) -> NDArray[Any]:
    """Read rows until there are enough occurrences of each modality, or no rows are left.

    `wanted`: by modality, the numbers for the statistics and for the closed form. They are counted
    down.
    """
    borders = np.cumsum([0, *(source.num_rows for source in sources)])
    num_rows = int(borders[-1])
    kept = [np.empty(0, _OCCURRENCE)]
    # rows without an item of these modalities are known from the scan, and not read
    may_hold = np.zeros(num_rows, bool)
    for border, source in zip(borders.tolist(), sources, strict=False):
        may_hold[border + source.rows_with(wanted)] = True
    start, end = 0, 1 << max(1, (num_rows - 1).bit_length())
    while start < end and any(map(any, wanted.values())):
        # in steps of what is missing: a row may hold its media, and is read with them
        stop = start + max(1024, start // 4, *map(max, wanted.values()))
        rows = spread_rows(num_rows, start, stop)
        places = start + np.flatnonzero(may_hold[rows])
        looking = _Rows(sources, borders, rows[may_hold[rows]], places, list(wanted))
        read = read_parallel(
            looking,
            num_workers=num_readers(run.recipe, len(looking.mine)),
            console=run.console,
            description="Finding items",
            total=len(looking.mine),
            size=lambda block: block[0],
        )
        mine = [found for _, found in read]
        part = np.concatenate([*kept[:1], *(one for some in all_gather(mine) for one in some)])
        part = np.sort(part, order=["place", "item"])
        for number, counts in enumerate(wanted.values()):
            of_name = part["name"] == number
            for kind, field in enumerate(("calibrated", "captioned")):
                chosen = np.flatnonzero(of_name & part[field])
                part[field][chosen[counts[kind] :]] = False
                counts[kind] -= len(chosen[: counts[kind]])
        part["source"] += first_source
        kept.append(part[part["calibrated"] | part["captioned"]])
        start = stop
    return np.concatenate(kept)


class _Rows(Dataset[tuple[int, NDArray[Any]]]):
    """Blocks of rows -> number of rows, occurrences of items; for this process' share."""

    def __init__(
        self,
        sources: Sequence[TrainingSource],
        borders: NDArray[np.int64],
        rows: NDArray[np.int64],
        places: NDArray[np.int64],
        names: Sequence[str],
    ) -> None:
        self.sources = sources
        self.borders = borders
        self.numbers = {name: number for number, name in enumerate(names)}
        # by row and not by place, since files are fastest read in their order
        order = np.argsort(rows)
        self.mine = np.stack([rows[order], places[order]], axis=1)[rank() :: num_processes()]

    def __len__(self) -> int:
        return -(-len(self.mine) // _BLOCK)

    def __getitem__(self, number: int) -> tuple[int, NDArray[Any]]:
        block = self.mine[number * _BLOCK : (number + 1) * _BLOCK]
        found = [one for row, place in block.tolist() for one in self._items(row, place)]
        return len(block), np.array(found, _OCCURRENCE)

    def _items(self, number: int, place: int) -> Iterator[tuple[Any, ...]]:
        source = int(np.searchsorted(self.borders, number, side="right")) - 1
        row = number - int(self.borders[source])
        try:
            conversation, processor = self.sources[source].conversation(row)
        except MultiTokenError:
            return  # of a stream, whose rows are reported when training reaches them
        captioned = caption_of(conversation) is not None
        for i, item in enumerate(conversation.media):
            if item.modality in self.numbers:
                modality = processor.modalities[item.modality]
                key = item_key(item, modality, processor.fetch, f"{source} {row} {i}")
                name = self.numbers[item.modality]
                yield key, place, source, row, i, name, captioned, True


class ItemReader(Dataset["FitItem | MultiTokenError"]):
    """Reads this process' share of the distinct items: decodes each, and tokenizes its captions.

    An item that cannot be read is returned as its error.
    """

    def __init__(self, items: DistinctItems, spec: ClosedFormSpec | None, run: Run) -> None:
        self.items = items
        self.spec = spec
        self.run: Run | None = run
        self.numbers = share_of(range(len(items)))
        self.calibrated = np.cumsum(items.counts > 0) - 1

    def __getstate__(self) -> dict[str, Any]:
        # spawned workers read rows: no model, no open console
        return {**self.__dict__, "run": None}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> FitItem | MultiTokenError:
        number = self.numbers[index]
        items = self.items
        try:
            item, processor = items.item(number)
            # random preprocessing draws by item, so it is the same with any number of workers
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(number)
                prepared = processor.prepare(item)
            captions: Counter[tuple[int, ...]] = Counter()
            for one in items.captioned[items.starts[number] : items.starts[number + 1]]:
                conversation, processor = items.sources[one["source"]].conversation(int(one["row"]))
                caption = caption_of(conversation)
                if caption is not None and self.spec is not None:
                    captions[tuple(target_ids(caption, processor, self.spec))] += 1
        except MultiTokenError as error:
            return error
        count, among_calibrated = int(items.counts[number]), int(self.calibrated[number])
        return FitItem(prepared, count, list(captions.items()), among_calibrated)

    def __iter__(self) -> Iterator[FitItem]:
        """Read the share with data workers, from the beginning."""
        assert self.run is not None
        for item in read_parallel(
            self,
            num_workers=num_readers(self.run.recipe, len(self)),
            console=self.run.console,
            description="Fitting projectors",
            total=len(self),
        ):
            if isinstance(item, MultiTokenError):
                raise item
            yield item
