"""Rows of .jsonl files, one object a line, read and written."""

from __future__ import annotations

import base64
import codecs
import io
import json
import os
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from multi_token.checkpoint.atomic import atomic_file
from multi_token.data.files.json import parse_row
from multi_token.data.rows import IndexedRows, Row, row_id_of
from multi_token.errors import RowError


class JsonLines(IndexedRows):
    """Lines of a .jsonl file, each parsed on access; blank lines are no rows.

    Memory holds only the offset of each line, so a file may be larger than memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.starts = array("q")
        self.line_numbers = array("q")
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(start)
                    self.line_numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        # opened for each row: forked workers would share the file position of one handle
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline().rstrip()  # a fault at its end belongs to this line
        number = self.line_numbers[index]
        return parse_row(
            # editors on Windows put a byte order mark before the first line
            line.removeprefix(codecs.BOM_UTF8) if number == 1 else line,
            self.path,
            first_line=lambda: number,
            row_id=row_id_of(index, None, str(self.path)),
        )


def write_jsonl(rows: Sequence[Row], indices: Sequence[int], path: str | os.PathLike[str]) -> None:
    """Write some rows as .jsonl; bytes and images become data URIs, arrays become lists.

    The file is replaced atomically, so it may be the one that `rows` come from. Relative media
    paths stay as they are. Raises RowError for a value that JSON cannot hold.
    """
    # row by row, since `rows` may be larger than memory
    with atomic_file(Path(path)) as partial_path, partial_path.open("w", encoding="utf-8") as file:
        for index in indices:
            row = rows[index]
            default = partial(_jsonable, row_id=row_id_of(index, row, "rows"))
            json.dump(row, file, ensure_ascii=False, default=default)
            file.write("\n")


def _jsonable(value: Any, *, row_id: str) -> Any:
    """Convert a value so that `to_conversation` and `Fetch` read it as the original."""
    from PIL import Image

    if isinstance(value, (bytes, bytearray, memoryview)):
        return "data:application/octet-stream;base64," + base64.b64encode(value).decode("ascii")
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")  # lossless
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "isoformat"):  # Arrow tables hold dates and times
        return value.isoformat()
    raise RowError(
        f"holds a {type(value).__name__}, which a .jsonl file cannot; "
        "leave that field out before cleaning",
        kind="format",
        row_id=row_id,
    )
