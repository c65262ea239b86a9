"""Endless rows of one source: numbered through its files and epochs, read one at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from multi_token.data.adapter import RowAdapter
from multi_token.data.files.hub import stream_hub
from multi_token.data.files.open import (
    check_no_split,
    load_rows,
    open_file,
    resolve_files,
)
from multi_token.data.mixture import permutation
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import MultiTokenError

_NUM_OPEN = 4
"""Files whose index stays in memory."""
_MAX_LANES = 64
"""Lanes of a source, at most: each one is a connection where one process reads them all."""
_MIN_FILES = 8
"""Files of a lane, at least, where some lanes have a file more than others."""
_MIN_KEPT = 16
"""Last rows of a lane that are kept, at least."""
_BATCH = 16
"""Rows that `datasets` converts at a time."""
_SHARDS = 2
"""Purpose of the random numbers that order a source's files; its index is added."""


@dataclass(frozen=True)
class NumberedRow:
    """A row with its id for messages, and the number of complete epochs before it."""

    row: Row
    row_id: str
    epoch: int


class RowStream(Protocol):
    """Protocol: rows of one source by number, from 0 without end."""

    @property
    def num_lanes(self) -> int:
        """Number of lanes: row `number` is the row `number // num_lanes` of one of them.

        Lane `number % num_lanes` has files of its own, and is read without the others. A source
        with random access has one lane.
        """
        ...

    def row(self, number: int) -> NumberedRow:
        """Return a row. Raises RowError for a bad one, MultiTokenError where there are none."""
        ...

    def close(self) -> None:
        """Drop open files and kept rows; the next access opens them again."""
        ...


def open_stream(
    source: str, *, split: str = "train", seed: int = 0, number: int = 0, keep: int = 1024
) -> RowStream:
    """Open a source as a stream. Only the names of its files are read yet.

    | `source`                          | rows                                                   |
    |-----------------------------------|--------------------------------------------------------|
    | a file, `shards/*.parquet`, a     | files of one kind that `load_rows` reads; each epoch   |
    | folder of such files              | goes through them in random order                      |
    | a folder written by `save_to_disk`| as in `load_rows`                                      |
    | a folder of media files           | as in `load_rows`                                      |
    | `owner/name`, `hf://...`          | a data set on the hub, read while it is downloaded     |

    `number`: index of this source, so that each source has its own order of files. `keep`: last
    rows of a hub stream that are kept in memory, since it cannot go back. Raises MultiTokenError.
    """
    files = resolve_files(source)
    if files is not None:
        check_no_split(source, split)
        return ShardedRows(source, files, seed=seed, number=number)
    path = Path(source).expanduser()
    if path.is_dir():
        open_rows = partial(_folder, split=split)
        return ShardedRows(source, [path], open_rows=open_rows)
    return LanedRows(source, partial(stream_hub, source, split=split), keep=keep)


def _folder(path: Path, split: str) -> Sequence[Row]:
    return load_rows(str(path), split=split)


class AdaptedStream:
    """Stream of rows with an adapter between; see RowStream."""

    def __init__(self, stream: RowStream, adapter: RowAdapter) -> None:
        self.stream, self.adapter = stream, adapter

    @property
    def num_lanes(self) -> int:
        """Number of lanes of the stream."""
        return self.stream.num_lanes

    def row(self, number: int) -> NumberedRow:
        """Read and adapt a row. Raises RowError."""
        found = self.stream.row(number)
        return replace(found, row=self.adapter(found.row, found.row_id))

    def close(self) -> None:
        """Drop open files and kept rows."""
        self.stream.close()


class ShardedRows:
    """Rows of files with random access, whose sizes become known on the way.

    The n-th row of an epoch is located by the sizes of the files before it. A size costs the footer
    of a .parquet, the headers of a .tar or the line breaks of a .jsonl, and no row.
    """

    num_lanes = 1

    def __init__(
        self,
        source: str,
        files: Sequence[Path],
        *,
        seed: int = 0,
        number: int = 0,
        open_rows: Callable[[Path], Sequence[Row]] = open_file,
    ) -> None:
        self.source = source
        self.files = list(files)
        self.seed = seed
        self.number = number
        self._open = open_rows
        self._sizes: dict[int, int] = {}
        self._opened: dict[int, Sequence[Row]] = {}
        self._at: tuple[int, list[int], list[int]] = (-1, [], [])

    def row(self, number: int) -> NumberedRow:
        """Return a row; see RowStream."""
        epoch, file, index = self.locate(number)
        rows, name = self._rows(file), str(self.files[file])
        row = rows[index]
        return NumberedRow(row, row_id_of(index, row, name), epoch)

    def locate(self, number: int) -> tuple[int, int, int]:
        """Locate a row -> (epoch, file, index in that file)."""
        # sizes of files that no row was read from are unknown, and so is the length of an epoch
        epoch, rest = 0, number
        if len(self._sizes) == len(self.files):
            epoch, rest = divmod(number, self._num_rows())
        found = self._find(epoch, rest)
        if found is None:  # after the first epoch, whose end made all sizes known
            epoch, rest = divmod(number, self._num_rows())
            found = self._find(epoch, rest)
        assert found is not None
        return epoch, *found

    def _num_rows(self) -> int:
        num_rows = sum(self._sizes.values())
        if not num_rows:
            raise MultiTokenError(f"{self.source} has no rows, expected at least one")
        return num_rows

    def _find(self, epoch: int, rest: int) -> tuple[int, int] | None:
        """Locate a row of an epoch -> (file, index), or None where the epoch has fewer rows."""
        if self._at[0] != epoch:
            order = permutation(len(self.files), self.seed, _SHARDS + self.number, epoch)
            self._at = (epoch, order, [0])
        _, order, starts = self._at
        # opens files only up to the wanted row
        while starts[-1] <= rest and len(starts) <= len(order):
            starts.append(starts[-1] + self._size(order[len(starts) - 1]))
        if starts[-1] <= rest:
            return None
        at = bisect_right(starts, rest) - 1
        return order[at], rest - starts[at]

    def _size(self, file: int) -> int:
        if file not in self._sizes:
            self._sizes[file] = len(self._rows(file))
        return self._sizes[file]

    def _rows(self, file: int) -> Sequence[Row]:
        if file not in self._opened:
            # a dict keeps insertion order: the file opened first is closed
            if len(self._opened) == _NUM_OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[file] = self._open(self.files[file])
        return self._opened[file]

    def close(self) -> None:
        """Drop open files; see RowStream."""
        self._opened.clear()


class LanedRows:
    """Rows of a `datasets.IterableDataset`, such as a hub stream, in lanes of its files.

    Lane i of n has the files i, i + n, i + 2 n, ... A reader that needs rows of some lanes fetches
    the files of those alone. Each lane begins again at its own end.
    """

    def __init__(self, source: str, open_rows: Callable[[], Any], *, keep: int) -> None:
        """`keep`: last rows that are kept in memory, of all lanes together."""
        self.source = source
        self.keep = keep
        self._open_rows = open_rows
        self._dataset: Any = None
        self._lanes: list[SequentialRows] = []

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open data set: each data worker opens its own."""
        return {**self.__dict__, "_dataset": None}

    @property
    def num_lanes(self) -> int:
        """Number of lanes: a power of two, so that 2, 4 or 8 readers share them evenly."""
        if not self._lanes:
            num_files = max(1, int(self._open().n_shards))
            num_lanes = min(_MAX_LANES, 1 << (num_files.bit_length() - 1))
            # all lanes are read alike, so rows of a lane with fewer files come again sooner
            while num_files % num_lanes and num_files < _MIN_FILES * num_lanes:
                num_lanes //= 2
            keep = max(_MIN_KEPT, 2 * self.keep // num_lanes)
            self._lanes = [
                SequentialRows(
                    self.source if num_lanes == 1 else f"{self.source}-{lane}",
                    partial(self._rows, lane, num_lanes),
                    keep=self.keep if num_lanes == 1 else keep,
                )
                for lane in range(num_lanes)
            ]
        return len(self._lanes)

    def row(self, number: int) -> NumberedRow:
        """Return a row; see RowStream."""
        index, lane = divmod(number, self.num_lanes)
        return self._lanes[lane].row(index)

    def close(self) -> None:
        """Drop the connections and the kept rows; see RowStream."""
        self._dataset = None
        for lane in self._lanes:
            lane.close()

    def _open(self) -> Any:
        if self._dataset is None:
            self._dataset = self._open_rows()
        return self._dataset

    def _rows(self, lane: int, num_lanes: int) -> Iterator[Row]:
        rows = self._open()
        if num_lanes > 1:
            rows = rows.shard(num_lanes, lane, contiguous=False)
        # not `iter(rows)`: in a data worker, that gives some files to each worker by itself
        for batch in rows.iter(batch_size=_BATCH):
            yield from (
                dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
            )


class SequentialRows:
    """Rows of a source without random access, read from front to back.

    The last `keep` rows are kept; a row before those restarts the source.
    """

    num_lanes = 1

    def __init__(self, source: str, open_rows: Callable[[], Iterable[Row]], *, keep: int) -> None:
        self.source = source
        self._open_rows = open_rows
        self._kept: deque[NumberedRow] = deque(maxlen=keep)
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open iterator, which cannot be pickled: each data worker opens its own."""
        return {**self.__dict__, "_rows": None}

    def _begin(self) -> None:
        self._rows: Iterator[Row] | None = None
        self._kept.clear()
        self._next = self._epoch = self._first = 0

    def row(self, number: int) -> NumberedRow:
        """Return a row; see RowStream."""
        # a pickled copy keeps the position, but not the iterator: it begins again
        if number < self._next - len(self._kept) or (self._rows is None and self._next):
            self._begin()
        while self._next <= number:
            row = self._read()
            row_id = row_id_of(self._next - self._first, row, self.source)
            self._kept.append(NumberedRow(row, row_id, self._epoch))
            self._next += 1
        return self._kept[number - self._next]

    def close(self) -> None:
        """Drop the kept rows; see RowStream."""
        self._begin()

    def _read(self) -> Row:
        for row in self._rows or ():
            return row
        if self._rows is not None:
            # the end of an epoch: indexes in messages start from 0 again
            self._first, self._epoch = self._next, self._epoch + 1
        self._rows = iter(self._open_rows())
        for row in self._rows:
            return row
        raise MultiTokenError(f"{self.source} has no rows, expected at least one")
