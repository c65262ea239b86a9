"""Dataset of a stream: rows that are read while training runs, in one order for all processes.

    position -> source and row number   mixture.py, by arithmetic
             -> row                     row_stream.py
             -> sample                  StreamDataset
    batch number -> positions           PaddedShard, PackedShard: the part of one process
                 -> group of samples    ShardReader, in data workers
    groups -> batches, state            stream_loader.py

No step keeps state that a resume would need: any position can be computed at once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from multi_token.data.dataset import row_to_sample
from multi_token.data.formats import to_conversation
from multi_token.data.mixture import Mixture
from multi_token.data.row_source import adapter_of, first_rows, media_fetch, show_note
from multi_token.data.row_stream import AdaptedStream, RowStream, open_stream
from multi_token.data.rows import Row
from multi_token.data.scan import Problem
from multi_token.data.sources import TrainingSource
from multi_token.errors import MultiTokenError, RowError
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.types import Sample

SampleOrProblem = Sample | Problem
"""A row of a batch, or the reason why it is left out."""

NUM_TRIED_ITEMS = 4
"""Items by which a run finds the parameters of an encoder that features depend on."""
_CHUNK = 8
"""Rows that a data worker reads at a time where they will be packed."""


@dataclass(eq=False)
class StreamDataset(IterableDataset[Sample]):
    """All sources of a recipe as one endless order of rows, the same in every process.

    Picklable, for data workers.
    """

    streams: Sequence[RowStream]
    names: Sequence[str]
    processors: Sequence[MultiTokenProcessor]
    mixture: Mixture
    skip_bad: bool = False
    """Leave bad rows out and count them; without it, they stop the run."""
    max_items: int | None = None
    """A row with more media items is bad (`train.pack_items`)."""

    def __iter__(self) -> Iterator[Sample]:
        """Iterate over the good rows."""
        return (s for s in map(self.read, count()) if not isinstance(s, Problem))

    def first_rows(self, num_rows: int) -> list[TrainingSource]:
        """Read the first `num_rows` positions -> their rows by source, each row once.

        For the work before the first step: feature statistics, the closed-form start, the plan.
        """
        rows: list[list[Row]] = [[] for _ in self.streams]
        for position in range(num_rows):
            ref = self.mixture.row_ref(position)
            try:
                found = self.streams[ref.source].row(ref.number)
            except RowError:
                continue  # reported, or counted, when training reaches it
            # a small source comes several times in these positions
            if found.epoch == 0:
                rows[ref.source].append({**found.row, "id": found.row_id})
        for stream in self.streams:
            stream.close()  # its rows would stay in memory beside those that are returned
        return list(map(TrainingSource, rows, self.processors, self.names))

    def with_sources(self, sources: Sequence[TrainingSource]) -> StreamDataset:
        """Return a copy that reads rows with the processors of these sources."""
        return dataclasses.replace(self, processors=[source.processor for source in sources])

    def raw_rows(self, positions: Iterable[int]) -> dict[int, Any]:
        """Read rows of these positions -> row by position; a RowError in place of a bad one."""
        # in the order of the files: a compressed shard is decompressed once, front to back
        ref = self.mixture.row_ref
        ordered = sorted(positions, key=lambda p: (ref(p).source, ref(p).number))
        return {position: self._row(position) for position in ordered}

    def _row(self, position: int) -> Any:
        ref = self.mixture.row_ref(position)
        try:
            return self.streams[ref.source].row(ref.number)
        except RowError as error:
            return error

    def read(self, position: int, raw: Any = None) -> SampleOrProblem:
        """Return the sample of a position, or the Problem of its row.

        `raw`: the row, where `raw_rows` has read it already.
        """
        found = self._row(position) if raw is None else raw
        if isinstance(found, RowError):
            return Problem.of(position, found)
        processor = self.processors[self.mixture.row_ref(position).source]
        # random preprocessing draws by position, so it is the same with any number of workers
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed((self.mixture.seed * 1_000_003 + position) % 2**63)
            try:
                sample = row_to_sample(
                    found.row,
                    found.row_id,
                    processor=processor,
                    modalities=processor.modalities,
                )
                self._check_num_items(sample)
            except RowError as error:
                return Problem.of(position, error)
        return sample

    def _check_num_items(self, sample: Sample) -> None:
        if self.max_items is not None and len(sample.media) > self.max_items:
            raise RowError(
                f"has {len(sample.media)} media items, but train.pack_items is {self.max_items}; "
                "raise it, or leave the row out",
                kind="too_long",
                row_id=sample.id,
            )


def without_media(source: TrainingSource) -> TrainingSource:
    """Return the first rows of a stream without the bytes of their media, but for a few items.

    After stage zero only their number is needed, and NUM_TRIED_ITEMS of each modality, with which
    trainable encoders are tried.
    """
    found: Counter[str] = Counter()
    good = None if source.good_indices is None else set(source.good_indices)
    rows: list[Row] = []
    for index, row in enumerate(source.rows):
        try:
            media = to_conversation(row, source.processor.modalities, row_id="").media
        except RowError:
            media = ()
        # a bad row has no item to keep
        keep = good is None or index in good
        keep = keep and any(found[item.modality] < NUM_TRIED_ITEMS for item in media)
        found.update(item.modality for item in media if keep)
        rows.append(row if keep else _without_bytes(row))
    return dataclasses.replace(source, rows=rows)


def _without_bytes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_bytes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_bytes(item) for item in value]
    return b"" if isinstance(value, (bytes, bytearray)) else value


def open_streams(processor: MultiTokenProcessor, recipe: Recipe, *, seed: int) -> StreamDataset:
    """Return the training rows of a recipe with `data.stream`. No row is read yet."""
    assert recipe.data.stream is not None
    window, sources = recipe.data.stream.window, recipe.data.train
    streams: list[RowStream] = []
    for i, source in enumerate(sources):
        stream = open_stream(source.rows, split=source.split, seed=seed, number=i, keep=window)
        first = first_rows(lambda number, stream=stream: stream.row(number).row)
        adapter, note = adapter_of(source, processor.modalities, first, seed=recipe.train.seed)
        show_note(note)
        streams.append(stream if adapter is None else AdaptedStream(stream, adapter))
    processors = [dataclasses.replace(processor, fetch=media_fetch(source)) for source in sources]
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
    """Positions of one process for padded batches: a part of each step's rows."""

    batch_size: int
    num_accumulated: int = 1
    num_processes: int = 1
    process: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows of a step, of all processes together."""
        return self.batch_size * self.num_accumulated * self.num_processes

    def positions(self, number: int) -> range:
        """Return the positions of batch `number` of this process, counted from the first step.

        A step takes the same rows with any number of processes.
        """
        # processes take consecutive batches of a step, so a step has the same rows with any number
        step, batch = divmod(number, self.num_accumulated)
        first = step * self.rows_per_step
        first += (batch * self.num_processes + self.process) * self.batch_size
        return range(first, first + self.batch_size)

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a number of each position that is equal within a batch; see Mixture.with_lanes."""
        # by batch, counted over all processes: a lane does not depend on their number
        return positions // self.batch_size


@dataclass(frozen=True)
class PackedShard:
    """Positions of one process for packs: every `num_processes`-th row from `first_window` on."""

    num_processes: int
    process: int
    window: int
    first_window: int = 0
    replay: Sequence[int] = ()
    """Rows that were read before the run was stopped, and are in no batch yet: read first."""

    def positions(self, number: int) -> Sequence[int]:
        """Return the positions of chunk `number`; one worker reads a chunk."""
        # a chunk holds replayed or new rows, never both, so that workers share them evenly
        num_replayed = -(-len(self.replay) // _CHUNK)
        if number < num_replayed:
            return self.replay[number * _CHUNK : (number + 1) * _CHUNK]
        first = -(-(self.first_window * self.window - self.process) // self.num_processes)
        at = first + (number - num_replayed) * _CHUNK
        return [self.process + i * self.num_processes for i in range(at, at + _CHUNK)]

    def lane_of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return a number of each position that is equal within a chunk; see Mixture.with_lanes."""
        chunks, process = np.divmod(positions, self.num_processes)
        return process + self.num_processes * (chunks // _CHUNK)


class ShardReader(IterableDataset[Any]):
    """Reads the rows of a shard, group by group.

    Each of `num_workers` data workers takes every `num_workers`-th group. DataLoader restores the
    order, so the number of workers changes nothing.
    """

    def __init__(
        self,
        streams: StreamDataset,
        shard: PaddedShard | PackedShard,
        collate: Callable[[list[Sample]], Any] | None = None,
        *,
        start: int = 0,
    ) -> None:
        """`collate`: yields (batch or None, problems) for each group. Without it, groups are
        yielded: the main process packs their rows. `start`: number of the first group.
        """
        num_lanes = [stream.num_lanes for stream in streams.streams]
        # a reader takes every n-th group, so that with n lanes it fetches the files of one
        mixture = streams.mixture.with_lanes(num_lanes, shard.lane_of)
        self.streams = dataclasses.replace(streams, mixture=mixture)
        self.shard = shard
        self.collate = collate
        self.start = start

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        waiting: dict[int, Any] = {}
        for number in count(self.start + worker, num_workers):
            group: dict[int, SampleOrProblem] = {}
            try:
                for position in self.shard.positions(number):
                    # read ahead up to the end of the window, in the order of the files
                    if position not in waiting:
                        waiting |= self.streams.raw_rows(
                            self._in_window(number, position, num_workers)
                        )
                    group[position] = self.streams.read(position, waiting.pop(position))
                yield group if self.collate is None else self._batch(self.collate, group)
            except MultiTokenError as error:
                # raised by the main process: torch would wrap it in a worker's traceback
                yield error
                return

    def _in_window(self, number: int, position: int, num_workers: int) -> list[int]:
        """Return the positions from `position` on that this worker needs of its window."""
        window = self.streams.mixture.window
        found: list[int] = []
        for later in count(number, num_workers):
            mine = list(self.shard.positions(later))
            if later == number:
                mine = mine[mine.index(position) :]
            inside = [p for p in mine if p // window == position // window]
            found += inside
            if len(inside) < len(mine):
                break
        return found

    def _batch(
        self, collate: Callable[[list[Sample]], Any], group: dict[int, SampleOrProblem]
    ) -> tuple[Any, list[Problem]]:
        """Collate a group -> (batch, problems). The batch is None if its window has no good row."""
        samples = [read for read in group.values() if not isinstance(read, Problem)]
        problems = [read for read in group.values() if isinstance(read, Problem)]
        if not samples:
            # without a batch, this process would leave the others waiting in a collective call
            samples = self._replacement_sample(max(group))
        return collate(samples) if samples else None, problems

    def _replacement_sample(self, last: int) -> list[Sample]:
        """Return the next good row of the window of a position, or [] where there is none."""
        window = self.streams.mixture.window
        start = last - last % window
        for i in range(1, window):
            read = self.streams.read(start + (last - start + i) % window)
            if not isinstance(read, Problem):
                return [read]
        return []
