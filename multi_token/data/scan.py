"""Scan of a data set: reads every row as training does, and reports problems and lengths.

A bad row never ends a scan. Bugs do: only errors about rows are caught.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from multi_token.data.dataset import RowReader
from multi_token.data.formats import to_conversation
from multi_token.data.lengths import Lengths, LengthStore
from multi_token.data.parallel import pass_console, read_parallel
from multi_token.data.rows import Row, row_id_of
from multi_token.errors import RowError, RowKind
from multi_token.processor import Measured
from multi_token.types import Conversation, Length, Sample

if TYPE_CHECKING:
    from multi_token.modalities.base import Modality


_MAX_PART = 64
"""Rows that a data worker reads at a time."""
_NO_REFERENCE = bytes(32)
_PARTS_PER_WORKER = 16
"""Parts of each worker, at least: the last one leaves the others waiting."""


@dataclass(frozen=True)
class Problem:
    """A row that cannot become a sample."""

    index: int
    row_id: str
    kind: RowKind
    message: str
    """The fault, without the row's id."""

    @classmethod
    def of(cls, index: int, error: RowError) -> Problem:
        """Return the problem that an error is about."""
        # a line that is not JSON has no id of its own, and only the error knows its file
        return cls(index, error.row_id, error.kind, error.sentence)

    def error(self, message: str) -> RowError:
        """Return an error on this row with another message."""
        return RowError(message, kind=self.kind, row_id=self.row_id)


@dataclass
class ScanReport:
    """Result of `scan`; `good_indices` and `lengths` run in parallel, in the order of the rows."""

    num_rows: int
    good_indices: array[int] = field(default_factory=lambda: array("q"))
    lengths: Lengths = field(default_factory=Lengths)
    modalities: array[int] = field(default_factory=lambda: array("q"), compare=False)
    """Modalities that each good row has an item of: a bit for each, in the order of the RowReader;
    0 with another reader."""
    references: bytearray = field(default_factory=bytearray, compare=False)
    """If asked for, 32 bytes of each good row: digest of its first media item, digest of the row.
    Zero for a row without media, or with an item that has no name and no content."""
    problems: list[Problem] = field(default_factory=list)
    num_decoded: int = field(default=0, compare=False)
    """Good rows with an item that was decoded, or came from a feature cache."""
    num_known_before: int = field(default=0, compare=False)
    """Good rows that were not opened, since their lengths were stored."""

    @property
    def by_kind(self) -> dict[RowKind, list[Problem]]:
        """The problems by kind, in the order of `RowKind`; kinds without a problem are absent."""
        found = {kind: [p for p in self.problems if p.kind == kind] for kind in get_args(RowKind)}
        return {kind: problems for kind, problems in found.items() if problems}

    @property
    def reference_table(self) -> NDArray[np.uint8]:
        """The references, uint8 [rows, 32]; no row if they were not asked for."""
        return np.frombuffer(self.references, np.uint8).reshape(-1, len(_NO_REFERENCE))

    @property
    def total(self) -> Length:
        """Sums over the good rows."""
        return Length(*self.lengths.table.sum(0).tolist())


def scan(
    rows: Sequence[Row],
    read: Callable[[Row, str], Sample],
    *,
    source: str = "rows",
    num_workers: int = 0,
    progress: bool = True,
    indices: Sequence[int] | None = None,
    known: LengthStore | None = None,
    references: bool = False,
) -> ScanReport:
    """Read every row as training does, and report problems and lengths.

    Args:
        rows: The rows, by index.
        read: Row and row id -> sample. A RowReader tokenizes several rows together. Must be
            picklable if `num_workers` is not 0.
        source: Name of the rows, for messages.
        num_workers: Processes that read rows; 0 reads in this one.
        progress: Show a bar on a terminal.
        indices: Rows to scan, ascending; None for all. `merge_reports` joins several shares.
        known: Stored lengths. Rows in it are not opened; the others are added to it.
        references: Fill `ScanReport.references`. Needs `known`.

    Returns:
        The report on these rows.

    Raises:
        MultiTokenError: an error that is not about one row, such as a full disk.
    """
    indices = range(len(rows)) if indices is None else indices
    # Rows differ much in cost, so parts are small enough that workers end at about the same time;
    # one row at a time would cost more to send than to read.
    size = min(_MAX_PART, len(indices) // (_PARTS_PER_WORKER * max(1, num_workers)))
    size = max(1, size) if isinstance(read, RowReader) else 1
    parts = read_parallel(
        _ScanDataset(rows, read, source, indices, known, size, references),
        num_workers=num_workers,
        console=pass_console(quiet=not progress),
        description="Reading rows",
        total=len(indices),
        size=len,
    )
    report = ScanReport(num_rows=len(indices))
    try:
        for index, one in zip(indices, chain.from_iterable(parts), strict=True):
            key, result, how, modalities, first = one
            if isinstance(result, Problem):
                report.problems.append(result)
                continue
            report.num_decoded += how == "decoded"
            report.num_known_before += how == "remembered"
            report.good_indices.append(index)
            report.lengths.append(result)
            report.modalities.append(modalities)
            if references:
                both = bytes.fromhex(first + key) if key and first else _NO_REFERENCE
                report.references += both
            if known is not None and key is not None and how != "remembered":
                # in the main process: data workers would write a file each
                known.add(key, result)
    finally:
        # an interrupted scan continues after the rows that were read
        if known is not None:
            known.save()
    return report


def merge_reports(reports: Sequence[ScanReport]) -> ScanReport:
    """Join the reports on shares of the same rows, as if one process had scanned them all."""
    indices = np.concatenate([np.array(r.good_indices, np.int64) for r in reports])
    # by row, so that the number of processes does not change the order of training
    order = np.argsort(indices, kind="stable")
    lengths = np.concatenate([r.lengths.table for r in reports])
    modalities = np.concatenate([np.array(r.modalities, np.int64) for r in reports])
    references = np.concatenate([r.reference_table for r in reports])
    references = references[order] if len(references) else references
    return ScanReport(
        num_rows=sum(report.num_rows for report in reports),
        good_indices=array("q", indices[order].tobytes()),
        lengths=Lengths.of_table(lengths[order]),
        modalities=array("q", modalities[order].tobytes()),
        references=bytearray(references.tobytes()),
        problems=sorted((p for report in reports for p in report.problems), key=lambda p: p.index),
        num_decoded=sum(report.num_decoded for report in reports),
        num_known_before=sum(report.num_known_before for report in reports),
    )


class _Result(NamedTuple):
    """Result of one row: its key in the length store, length or problem, origin, and media."""

    key: str | None
    found: Length | Problem
    how: Literal["read", "decoded", "remembered"] = "read"
    modalities: int = 0
    first: str = ""
    """Digest of the first media item, if it is asked for."""


@dataclass
class _ScanDataset(Dataset[list[_Result]]):
    """Parts of the rows, `size` rows each."""

    rows: Sequence[Row]
    read: Callable[[Row, str], Sample]
    source: str
    indices: Sequence[int]
    known: LengthStore | None
    size: int
    references: bool

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __getitem__(self, number: int) -> list[_Result]:
        indices = self.indices[number * self.size : (number + 1) * self.size]
        if not isinstance(self.read, RowReader):
            return [self._result(index, self.read) for index in indices]
        results: list[_Result] = []
        unknown: list[tuple[int, Conversation]] = []
        for at, index in enumerate(indices):
            try:
                row = self.rows[index]
                conversation = self.read.conversation(row, row_id_of(index, row, self.source))
            except RowError as error:
                results.append(_Result(None, Problem.of(index, error)))
                continue
            key, length, first = None, None, ""
            if self.known is not None and (key := self.known.key_of(conversation)) is not None:
                length = self.known.get(key)
                first = self.known.first_item_of(conversation) if self.references else ""
            found = {item.modality for item in conversation.media}
            bits = sum(1 << i for i, name in enumerate(self.read.modalities) if name in found)
            results.append(_Result(key, length or Length(0, 0, 0), "remembered", bits, first))
            if length is None:
                unknown.append((at, conversation))
        measured = self.read.measure([conversation for _, conversation in unknown])
        for (at, _), row in zip(unknown, measured, strict=True):
            results[at] = _measured(indices[at], results[at], row)
        return results

    def _result(self, index: int, read: Callable[[Row, str], Sample]) -> _Result:
        try:
            row = self.rows[index]
            row_id = row_id_of(index, row, self.source)
            key = None if self.known is None else self.known.key(row, row_id)
            if self.known is not None and key is not None:
                length = self.known.get(key)
                if length is not None:
                    return _Result(key, length, "remembered")
            found = Measured.of(read(row, row_id))
            return _measured(index, _Result(key, found.length), found)
        except RowError as error:
            return _Result(None, Problem.of(index, error))


def _measured(index: int, result: _Result, row: Measured | RowError) -> _Result:
    if isinstance(row, RowError):
        return _Result(None, Problem.of(index, row))
    return result._replace(found=row.length, how="decoded" if row.is_decoded else "read")


@dataclass(frozen=True)
class Bin:
    """Number of rows with `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


def histogram(lengths: Sequence[int], *, num_bins: int = 10) -> list[Bin]:
    """Count lengths in up to `num_bins` bins of equal width, from the shortest to the longest."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    # whole tokens: fewer bins than asked where lengths hardly differ
    width = math.ceil((high - low + 1) / num_bins)
    counts = Counter((length - low) // width for length in lengths)
    return [
        Bin(start, min(start + width - 1, high), counts[i])
        for i, start in enumerate(range(low, high + 1, width))
    ]


def first_relative_path(
    rows: Sequence[Row], good_indices: Sequence[int], *, modalities: Mapping[str, Modality]
) -> str | None:
    """Return the first relative media path of the good rows; it breaks in another folder."""
    for index in good_indices:
        for media in to_conversation(rows[index], modalities, row_id="").media:
            name = modalities[media.modality].named_file(media.source)
            text = "" if name is None else os.fspath(name)
            # addresses and data URIs do not depend on a folder
            if not text or "://" in text or text[:5].lower() == "data:":
                continue
            if not os.path.isabs(os.path.expanduser(text)):
                return text
    return None
