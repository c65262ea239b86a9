"""Rows of .jsonl files (one object a line) and .json files (one list)."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

from multi_token.data.rows import Row, row_id_of
from multi_token.errors import MultiTokenError, RowError


class JsonLines(Sequence[Row]):
    """Lines of a .jsonl file, each parsed on access; blank lines are no rows.

    Memory holds only the offset of each line, so a file may be larger than memory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
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

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        # opened for each row: forked workers would share the file position of one handle
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        number = self.line_numbers[index]
        try:
            # editors on Windows put a byte order mark before the first line
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            # json counts lines in this one line; its "line 1" would read as the file's
            reason = str(error).replace("line 1 ", "")
            raise RowError(
                f"line {number} of {self.path} is not JSON ({reason}); "
                "write one object on each line",
                kind="format",
                row_id=row_id_of(index % len(self), None, str(self.path)),
            ) from error
        if not isinstance(row, Mapping):
            raise RowError(
                f"line {number} of {self.path} is a {type(row).__name__}, "
                "expected an object with fields",
                kind="format",
                row_id=row_id_of(index % len(self), None, str(self.path)),
            )
        return cast("Row", row)


def load_json(path: Path) -> Sequence[Row]:
    """Read a .json file: a list of rows, or an object with that list under `data` or `rows`.

    Raises:
        RowError: the file is not JSON.
        MultiTokenError: the file holds no list of rows.
    """
    text = path.read_bytes()
    try:
        content: Any = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = ""
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            hint = "; if there is a row on each line, name the file .jsonl"
        raise RowError(
            f"the file is not JSON ({error}){hint}", kind="format", row_id=str(path)
        ) from error
    if isinstance(content, Mapping):
        found = [key for key in ("data", "rows") if isinstance(content.get(key), list)]
        if not found:
            raise MultiTokenError(
                f"{path} is an object with the fields {', '.join(map(str, content)) or 'none'}; "
                "expected a list of rows, or that list under `data` or `rows`"
            )
        content = content[found[0]]
    if not isinstance(content, list):
        raise MultiTokenError(f"{path} holds a {type(content).__name__}; expected a list of rows")
    return content
