"""Rows that are read while training goes on: one order for all processes, and each one's share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from multi_token.data.dataset import row_to_sample
from multi_token.data.mixture import Mixture
from multi_token.data.row_stream import RowStream, open_stream
from multi_token.data.rows import Row
from multi_token.data.scan import Problem
from multi_token.data.sources import TrainingSource
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.fetch import Fetch
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.types import Sample

SampleOrProblem = Sample | Problem
"""A row as it goes into a batch, or what is wrong with it."""

_CHUNK = 8
"""Rows that a data worker reads at a time where they are packed afterwards."""


class StreamDataset(IterableDataset[Sample]):
    """All sources of a recipe as one endless order of rows, the same in every process.

    Position -> source and number by `data/mixture.py`, and from there to the row: nothing is
    remembered, so a run that goes on starts in the middle. Goes into data workers.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        names: Sequence[str],
        processors: Sequence[MultiTokenProcessor],
        mixture: Mixture,
        *,
        skip_bad: bool = False,
        max_items: int | None = None,
    ) -> None:
        """`skip_bad`: bad rows are left out and counted, else they stop the run. `max_items`: a row
        with more media items is a bad one (`train.pack_items`).
        """
        self.streams = list(streams)
        self.names = list(names)
        self.processors = list(processors)
        self.mixture = mixture
        self.skip_bad = skip_bad
        self.max_items = max_items

    def __iter__(self) -> Iterator[Sample]:
        """The good rows, one after the other."""
        return (s for s in map(self.read, count()) if not isinstance(s, Problem))

    def first_rows(self, num_rows: int) -> list[TrainingSource]:
        """The rows of the first positions, by source and each once, for what comes before training:
        statistics of features, the closed-form start, the plan.
        """
        rows: list[list[Row]] = [[] for _ in self.streams]
        for position in range(num_rows):
            place = self.mixture.row_ref(position)
            try:
                found = self.streams[place.source].row(place.number)
            except RowError:
                continue  # said of, or counted, when it comes in its place
            if found.epoch == 0:
                rows[place.source].append({**found.row, "id": found.row_id})
        return [
            TrainingSource(rows_of_source, processor, name)
            for rows_of_source, processor, name in zip(
                rows, self.processors, self.names, strict=True
            )
        ]

    def with_sources(self, sources: Sequence[TrainingSource]) -> StreamDataset:
        """The same rows, read as those of these sources are."""
        same = copy(self)
        same.processors = [source.processor for source in sources]
        return same

    def raw_rows(self, positions: Iterable[int]) -> dict[int, Any]:
        """Rows as they lie in their files, in the order of the files: each is read in one pass."""
        place = self.mixture.row_ref
        ordered = sorted(positions, key=lambda p: (place(p).source, place(p).number))
        return {position: self._row(position) for position in ordered}

    def _row(self, position: int) -> Any:
        place = self.mixture.row_ref(position)
        try:
            return self.streams[place.source].row(place.number)
        except RowError as error:
            return error

    def read(self, position: int, raw: Any = None) -> SampleOrProblem:
        """The sample of a position, or what is wrong with its row (`raw_rows`, if it was read
        before).

        Random preprocessing draws by position, so that it is the same in any worker.
        """
        found = self._row(position) if raw is None else raw
        if isinstance(found, RowError):
            return Problem(position, found.row_id, found.kind, str(found))
        processor = self.processors[self.mixture.row_ref(position).source]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.mixture.seed * 1_000_003 + position) % 2**63)
            try:
                names = list(processor.modalities)
                sample = row_to_sample(
                    found.row, found.row_id, processor=processor, modalities=names
                )
                self._check_num_items(sample)
            except RowError as error:
                return Problem(position, error.row_id, error.kind, str(error))
        return sample

    def _check_num_items(self, sample: Sample) -> None:
        if self.max_items is not None and len(sample.media) > self.max_items:
            raise RowError(
                f"has {len(sample.media)} media items, but train.pack_items is {self.max_items}; "
                "raise it, or leave the row out",
                kind="too_long",
                row_id=sample.id,
            )


def open_streams(
    processor: MultiTokenProcessor | None, recipe: Recipe, *, seed: int
) -> StreamDataset:
    """The training rows of a recipe with `data.stream`. No row is read yet."""
    assert processor is not None and recipe.data.stream is not None
    window, sources = recipe.data.stream.window, recipe.data.train
    streams = [
        open_stream(source.rows, split=source.split, seed=seed, number=i, keep=window)
        for i, source in enumerate(sources)
    ]
    processors = [
        dataclasses.replace(processor, fetch=Fetch(root=stream.root)) for stream in streams
    ]
    weights = [source.weight or 1.0 for source in sources]
    mixture = Mixture(weights, seed=seed, window=window)
    return StreamDataset(
        streams,
        [source.rows for source in sources],
        processors,
        mixture,
        skip_bad=recipe.data.on_bad_row == "skip",
        max_items=recipe.train.pack_items,
    )


@dataclass(frozen=True)
class PaddedShard:
    """Rows of one rank: its share of each step, batch by batch."""

    batch_size: int
    num_accumulated: int = 1
    num_processes: int = 1
    process: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows per step of all processes together."""
        return self.batch_size * self.num_accumulated * self.num_processes

    def positions(self, number: int) -> range:
        """The rows of this process' batch of a number, counted from the first step on.

        A step takes the same rows, whoever takes them.
        """
        step, batch = divmod(number, self.num_accumulated)
        first = step * self.rows_per_step
        first += (batch * self.num_processes + self.process) * self.batch_size
        return range(first, first + self.batch_size)


@dataclass(frozen=True)
class PackedShard:
    """Rows of one rank when packing: every `num_processes`-th row, starting at a window."""

    num_processes: int
    process: int
    window: int
    first_window: int = 0
    replay: Sequence[int] = ()
    """Rows that were read before the run was stopped, and have not come into a batch yet."""

    def positions(self, number: int) -> Sequence[int]:
        """The rows of a chunk of a number; a worker reads all of a chunk."""
        num_again = -(-len(self.replay) // _CHUNK)
        if number < num_again:
            return self.replay[number * _CHUNK : (number + 1) * _CHUNK]
        first = -(-(self.first_window * self.window - self.process) // self.num_processes)
        at = first + (number - num_again) * _CHUNK
        return [self.process + i * self.num_processes for i in range(at, at + _CHUNK)]


class ShardReader(IterableDataset[Any]):
    """Groups of rows, read: with several workers each takes every so many-th group, which the
    loader puts in order again, so that their number makes no difference.
    """

    def __init__(
        self,
        streams: StreamDataset,
        share: PaddedShard | PackedShard,
        finish: Callable[[StreamDataset, dict[int, SampleOrProblem]], Any],
        *,
        start: int = 0,
    ) -> None:
        """`finish`: what becomes of a group. `start`: groups that are passed over unread."""
        self.streams = streams
        self.share = share
        self.finish = finish
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        waiting: dict[int, Any] = {}
        for number in count(self.start + worker, num_workers):
            group: dict[int, SampleOrProblem] = {}
            try:
                for position in self.share.positions(number):
                    if position not in waiting:
                        waiting |= self.streams.raw_rows(
                            self._in_window(number, position, num_workers)
                        )
                    group[position] = self.streams.read(position, waiting.pop(position))
                yield self.finish(self.streams, group)
            except MultiTokenError as error:
                yield error  # to be raised by who asks: torch would make a page of it on its way
                return

    def _in_window(self, number: int, position: int, num_workers: int) -> list[int]:
        """The positions from one on that this worker will need of its window."""
        window = self.streams.mixture.window
        found: list[int] = []
        for later in count(number, num_workers):
            mine = list(self.share.positions(later))
            if later == number:
                mine = mine[mine.index(position) :]
            inside = [p for p in mine if p // window == position // window]
            found += inside
            if len(inside) < len(mine):
                break
        return found


@dataclass(frozen=True)
class CollateGroup:
    """Makes a batch of a group: what is wrong with its rows, and the good ones collated.

    With no good row in it, the next one of its window takes a part, so that no process is without a
    batch in any step; the batch is None if the window has none either.
    """

    collate: Callable[[list[Sample]], Any]

    def __call__(
        self, streams: StreamDataset, group: dict[int, SampleOrProblem]
    ) -> tuple[Any, list[Problem]]:
        """-> (batch or None, problems)."""
        samples = [read for read in group.values() if not isinstance(read, Problem)]
        problems = [read for read in group.values() if isinstance(read, Problem)]
        if not samples:
            samples = self._replacement_sample(streams, max(group))
        return self.collate(samples) if samples else None, problems

    def _replacement_sample(self, streams: StreamDataset, last: int) -> list[Sample]:
        window = streams.mixture.window
        start = last - last % window
        for i in range(1, window):
            read = streams.read(start + (last - start + i) % window)
            if not isinstance(read, Problem):
                return [read]
        return []


def return_group(
    streams: StreamDataset, group: dict[int, SampleOrProblem]
) -> dict[int, SampleOrProblem]:
    """A group as it is."""
    return group
