"""Rows of a `[N, dim]` .npy file: a vector each, with the labels of a file beside it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from multi_token.data.files.json import line_error
from multi_token.data.rows import IndexedRows, Row, row_id_of
from multi_token.errors import MultiTokenError

_BESIDE = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
"""Suffixes of a file with the labels, under the same stem."""


def with_labels(path: Path) -> list[Path]:
    """List a file of rows and, for a .npy, the files with its labels beside it."""
    if path.suffix.lower() != ".npy":
        return [path]
    return [path, *(file for s in _BESIDE if (file := path.with_suffix(s)).is_file())]


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
        _, *beside = with_labels(self.path)
        if len(beside) > 1:
            raise MultiTokenError(
                f"{path} has {' and '.join(file.name for file in beside)} beside it, expected one "
                "file with its labels; rename the others"
            )
        self._labels: Sequence[Row] | None = None
        if beside:
            is_text = beside[0].suffix == ".txt"
            self._labels = _Lines(beside[0]) if is_text else open_file(beside[0])
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
        others = self._labels[index] if self._labels is not None else {}
        # a copy, so that the row does not hold on to the mapped file
        return {**others, "vector": np.array(self._array[index])}


class _Lines(IndexedRows):
    """Lines of a .txt as the column `label`; memory holds its bytes, and no text per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        # not `splitlines`, which also cuts at signs within a label, such as U+2028
        self._data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        ends = np.flatnonzero(np.frombuffer(self._data, np.uint8) == ord("\n"))
        is_open = self._data and not self._data.endswith(b"\n")
        self._ends = np.append(ends, len(self._data)) if is_open else ends

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        start = int(self._ends[index - 1]) + 1 if index else 0
        line = self._data[start : int(self._ends[index])]
        try:
            return {"label": line.decode("utf-8")}
        except UnicodeDecodeError as error:
            fault = f"is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
            row_id = row_id_of(index, None, str(self.path))
            raise line_error(index + 1, self.path, fault, row_id) from error
