"""Rows of a `[N, dim]` .npy file: a vector each, with the labels of a file beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError

_BESIDE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
"""Suffixes of a file with the labels, under the same stem."""


class NpyRows(IndexedRows):
    """Vectors of a memory-mapped array as the column `vector`, one a row.

    `vectors.csv` (or .tsv, .jsonl, .json, .parquet) beside `vectors.npy` has the other columns, a
    row for each vector in the same order; `vectors.txt` has a `label` on each line.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], Sequence[Row]]) -> None:
        """Raises MultiTokenError: not such an array, several label files, or other numbers."""
        self.path = path.absolute()
        self._open_file = open_file
        try:
            # as a number of bytes and never pickled objects
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise MultiTokenError(f"{path} cannot be read as .npy: {error}") from error
        if self._array.ndim != 2 or self._array.dtype.kind not in "fiu":
            raise MultiTokenError(
                f"{path} is an array of shape {list(self._array.shape)} and type "
                f"{self._array.dtype}, expected numbers of shape [rows, dim]"
            )
        beside = [file for s in _BESIDE if (file := self.path.with_suffix(s)).is_file()]
        if len(beside) > 1:
            raise MultiTokenError(
                f"{path} has {' and '.join(file.name for file in beside)} beside it, expected one "
                "file with its labels; rename the others"
            )
        self._labels: Sequence[Any] | None = None
        if beside and beside[0].suffix == ".txt":
            self._labels = beside[0].read_text(encoding="utf-8-sig").splitlines()
        elif beside:
            self._labels = open_file(beside[0])
        if self._labels is not None and len(self._labels) != len(self._array):
            raise MultiTokenError(
                f"{path} has {len(self._array):,} vectors, but {beside[0].name} beside it has "
                f"{len(self._labels):,} rows; expected one for each vector, in the same order"
            )

    def __reduce__(self) -> tuple[object, ...]:
        return NpyRows, (self.path, self._open_file)  # a worker maps the file by itself

    def __len__(self) -> int:
        return len(self._array)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        labels = self._labels[index] if self._labels is not None else {}
        others = {"label": labels} if isinstance(labels, str) else labels
        # a copy, so that the row does not hold on to the mapped file
        return {**others, "vector": np.array(self._array[index])}
