"""Rows for which the `where` of a source holds: read once, shared by processes, remembered.

all rows, columns of `where` alone -> parts -> data workers of all processes -> indices
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset

from multi_token.checkpoint.atomic import atomic_file
from multi_token.data.files.npy import with_labels
from multi_token.data.files.open import PartOfRows, resolve_files
from multi_token.data.parallel import pass_console, read_parallel
from multi_token.data.row_templates import RowCondition, TemplateFault
from multi_token.data.rows import Row, row_id_of
from multi_token.distributed import all_gather, broadcast_from_main, is_main_process, num_processes
from multi_token.distributed import rank as rank_of
from multi_token.errors import MultiTokenError, RowError

_PART = 1024
"""Rows that a data worker looks at together."""
_WORTH_STORING_S = 5.0


def chosen_rows(
    rows: Sequence[Row],
    condition: RowCondition,
    name: str,
    *,
    folder: Path | None = None,
    num_readers: Callable[[int], int] = lambda _: 0,
) -> PartOfRows:
    """Return the rows for which a condition holds. Collective where several processes train.

    Args:
        rows: All rows.
        condition: The condition.
        name: Name of the rows, for messages.
        folder: Folder that remembers a choice that took over 5 s; None: none does. A choice of a
            folder of media files is not remembered.
        num_readers: Number of data workers for a number of rows.

    Raises:
        RowError: a row lacks a column of the condition.
        MultiTokenError: the condition holds for no row.
    """
    place = None if folder is None else _place(rows, condition, name, folder)
    found = None
    if place is not None:
        found = broadcast_from_main(lambda: np.load(place) if place.is_file() else None)
    if found is None:
        start = time.monotonic()
        found = _look(_Parts(_with_columns(rows, condition), condition, name), num_readers)
        worth = time.monotonic() - start > _WORTH_STORING_S
        if place is not None and worth and is_main_process():
            _store(found, place)
    if not len(found):
        raise MultiTokenError(
            f"no row of {name} is left: `where: {condition.text}` holds for none of {len(rows):,}"
        )
    # an array, not a list: reference counts of list items make forked workers copy its pages
    return PartOfRows(rows, array("q", found.tobytes()), name)


def chosen_in_file(
    rows: Sequence[Row], condition: RowCondition, path: Path, folder: Path
) -> PartOfRows:
    """As `chosen_rows`, for a file of a stream: any process looks, and all remember in `folder`.

    `path` may be a folder. The choice may be empty. Raises MultiTokenError.
    """
    # not collective: data workers open files of a stream, each at its own time
    place = _place(rows, condition, str(path), folder)
    if place is not None and place.is_file():
        found = np.load(place)
    else:
        parts = _Parts(_with_columns(rows, condition), condition, str(path))
        each: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        for part in (parts[number] for number in range(len(parts))):
            if isinstance(part, RowError):
                # no fault of a row that could be skipped: the choice of all others would be unknown
                raise MultiTokenError(str(part))
            each.append(part)
        found = np.concatenate(each)
        if place is not None:
            _store(found, place)
    return PartOfRows(rows, array("q", found.tobytes()), str(path))


def _look(parts: _Parts, num_readers: Callable[[int], int]) -> NDArray[np.int64]:
    """Return the chosen rows of all processes, ascending."""
    num_rows = len(parts.rows)
    # every n-th part: neighbours often cost alike, so blocks would end at different times
    mine = _Parts(parts.rows, parts.condition, parts.name, rank_of(), num_processes())
    found: list[NDArray[np.int64]] = []
    error: RowError | None = None
    for part in read_parallel(
        mine,
        num_workers=num_readers(num_rows // num_processes()),
        console=pass_console(),
        description="Choosing rows",
        total=-(-num_rows // num_processes()),
        size=lambda _: _PART,
    ):
        if isinstance(part, RowError):
            error = part
            break
        found.append(part)
    everyone = all_gather((np.concatenate([np.empty(0, np.int64), *found]), error))
    for _, fault in everyone:
        # in all processes, after all have gathered: a process that left would be waited for
        if fault is not None:
            raise fault
    return np.sort(np.concatenate([indices for indices, _ in everyone]))


@dataclass
class _Parts(Dataset["NDArray[np.int64] | RowError"]):
    """Parts of the rows -> the chosen ones, or the error of a row; every `step`-th from `first`."""

    rows: Sequence[Row]
    condition: RowCondition
    name: str
    first: int = 0
    step: int = 1

    def __len__(self) -> int:
        return len(range(self.first, -(-len(self.rows) // _PART), self.step))

    def __getitem__(self, number: int) -> NDArray[np.int64] | RowError:
        start = (self.first + number * self.step) * _PART
        chosen = array("q")
        for index in range(start, min(start + _PART, len(self.rows))):
            try:
                row = self.rows[index]
            except RowError:
                chosen.append(index)  # such as a line that is not JSON, which the scan reports
                continue
            try:
                if self.condition.holds(row):
                    chosen.append(index)
            except TemplateFault as fault:
                row_id = row_id_of(index, row, self.name)
                return RowError(str(fault), kind="format", row_id=row_id)
        return np.frombuffer(chosen.tobytes(), np.int64)


def _with_columns(rows: Sequence[Row], condition: RowCondition) -> Sequence[Row]:
    """Return the rows with the columns of the condition alone, where a table can leave others out.

    Media in the other columns then stay on disk.
    """
    wanted = condition.columns
    if wanted is None:
        return rows
    if isinstance(rows, ConcatDataset):
        parts: Any = rows.datasets
        full: Any = ConcatDataset([cast(Any, _with_columns(part, condition)) for part in parts])
        return full
    if isinstance(rows, PartOfRows):
        return PartOfRows(_with_columns(rows.rows, condition), rows.indices, rows.name)
    names = getattr(rows, "column_names", None)
    # a column that is missing is named by the row's error, with those that it has
    if names is None or not wanted <= set(names):
        return rows
    return cast(Any, rows).select_columns(sorted(wanted))


def _place(rows: Sequence[Row], condition: RowCondition, name: str, folder: Path) -> Path | None:
    """Return the file of a choice, named by all that it depends on; None where that is unknown."""
    parts = []
    while isinstance(rows, PartOfRows):
        parts.append(repr(rows.indices))
        rows = rows.rows
    fingerprint = getattr(rows, "_fingerprint", None)
    files = [file for row_file in resolve_files(name) or [] for file in with_labels(row_file)]
    if fingerprint is None and not files:
        return None  # media and texts of a folder: a stamp of each would cost as much as to look
    stamps = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    facts = (name, condition.text, len(rows), parts, fingerprint, stamps)
    return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"


def _store(found: NDArray[np.int64], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(place) as partial, partial.open("wb") as file:
        np.save(file, found)
