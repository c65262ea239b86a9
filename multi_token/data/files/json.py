"""Rows of a .json file: one list, whose elements are located once and parsed on access."""

from __future__ import annotations

import json
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from multi_token.data.parallel import pass_console, progress_bar
from multi_token.data.rows import IndexedRows, Row, row_id_of
from multi_token.errors import MultiTokenError, RowError

_LISTS = ("data", "rows")
"""Keys of an object around the list, in order of preference."""
_BLOCK = 1 << 20
"""Bytes that are scanned at once."""
_LARGE = 1 << 28
"""Bytes of a file that takes seconds to open."""
_MAX_BROKEN = 1 << 24
"""Bytes that are read to explain a broken element: after a fault it may reach the file's end."""
_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPEN, _CLOSE = b"[{", b"]}"
_BLANK = ord(" ")
_MARKS = bytes(b if b in b'"[]{},:' else 0 for b in range(256))
"""Table for `bytes.translate` that leaves only these characters."""
_STEPS = np.zeros(256, np.int8)
_STEPS[list(_OPEN)], _STEPS[list(_CLOSE)] = 1, -1
_MAX_KEY = 1 << 16
"""Bytes of a key that are read."""
_MAX_FIELDS = 20
"""Keys of an object that a message names."""
Quotes = tuple[int, int]
"""Offsets of a string's opening and closing quote."""


class JsonRows(IndexedRows):
    """Elements of the list in a .json file, each parsed on access.

    The file holds the list, or an object with it under `data` or `rows`. Memory holds an offset for
    each element, so a file may be larger than memory. Opening reads the file once, in blocks. It
    checks brackets and strings; an element that is not JSON is a bad row, as a line of .jsonl.
    """

    def __init__(self, path: Path) -> None:
        """Raises RowError for a file that is not JSON, MultiTokenError for one without a list."""
        self.path = path.absolute()
        size = self.path.stat().st_size
        console = pass_console(quiet=size < _LARGE)
        bar = progress_bar(console, f"Opening {path.name} (MiB)", size // _BLOCK)
        with bar as step, self.path.open("rb") as file:
            found = _Structure(file, step)
            self.line_breaks = found.line_breaks
            lists = {_key(file, where): borders for where, borders in found.lists}
            fields = [_key(file, where) for where in found.fields]
        # borders: the opening bracket, each comma between elements, the closing bracket
        self.borders = next((lists[k] for k in (None, *_LISTS) if k in lists), array("q"))
        if found.fault is not None:
            self._raise_first_fault(*found.fault)
        if not self.borders:
            raise MultiTokenError(
                f"{path} is an object with the fields {', '.join(map(str, fields)) or 'none'}; "
                "expected a list of rows, or that list under `data` or `rows`"
            )
        if len(self.borders) == 2 and not self._text(0).strip():
            del self.borders[1]  # an empty list has no element

    def __len__(self) -> int:
        return max(0, len(self.borders) - 1)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        return self._parse(index, self._text(index))

    def _text(self, index: int, max_bytes: int | None = None) -> bytes:
        start, end = self.borders[index] + 1, self.borders[index + 1]
        # opened for each row: forked workers would share the file position of one handle
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start if max_bytes is None else min(end - start, max_bytes))

    def _parse(self, index: int, text: bytes) -> Row:
        return parse_row(
            text,
            self.path,
            first_line=lambda: self._line(self.borders[index] + 1),
            row_id=row_id_of(index, None, str(self.path)),
        )

    def _line(self, offset: int) -> int:
        """Return the number of the line at an offset of the file, from 1."""
        block = offset // _BLOCK
        with self.path.open("rb") as file:
            file.seek(block * _BLOCK)
            rest = file.read(offset - block * _BLOCK).count(b"\n")
        return self.line_breaks[block] + rest + 1

    def _raise_first_fault(self, fault: str, offset: int) -> None:
        """Raise RowError for the first element that is not JSON, or for the file."""
        # brackets and strings of all later elements may be off, so only the first fault counts
        for index in range(len(self)):
            self._parse(index, self._text(index, _MAX_BROKEN))
        raise RowError(
            f"the file is not JSON: {fault} (line {self._line(offset)})",
            kind="format",
            row_id=str(self.path),
        )


def parse_row(text: bytes, path: Path, *, first_line: Callable[[], int], row_id: str) -> Row:
    """Parse one row of a file. Raises RowError with the line of the fault.

    `first_line`: returns the number of the line in which `text` begins.
    """
    try:
        row = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = first_line() + text.count(b"\n", 0, error.start)
        fault = f"is not UTF-8 (byte 0x{text[error.start]:02x}); save the file as UTF-8"
        raise line_error(line, path, fault, row_id) from error
    except json.JSONDecodeError as error:
        fault = f"is not JSON ({error.msg}, column {error.colno}); write an object for each row"
        raise line_error(first_line() + error.lineno - 1, path, fault, row_id) from error
    if not isinstance(row, Mapping):
        blank = len(text) - len(text.lstrip())
        line = first_line() + text.count(b"\n", 0, blank)
        fault = f"is a {type(row).__name__}, expected an object with fields"
        raise line_error(line, path, fault, row_id)
    return cast("Row", row)


def line_error(line: int, path: Path, fault: str, row_id: str) -> RowError:
    return RowError(f"line {line} of {path} {fault}", kind="format", row_id=row_id)


def _key(file: BinaryIO, where: Quotes | None) -> str | None:
    """Read the string between two quotes; None for the list that is the file."""
    if where is None:
        return None
    file.seek(where[0])
    text = file.read(min(where[1] + 1 - where[0], _MAX_KEY)).decode("utf-8", "replace")
    try:
        return str(json.loads(text))
    except json.JSONDecodeError:
        return text


class _Structure:
    """Positions of a file's lists and their elements, found by brackets and quotes alone.

    A mark with an odd number of quotes before it is part of a string. UTF-8 has no byte of a mark
    inside of another character, so bytes need no decoding.
    """

    def __init__(self, file: BinaryIO, step: Callable[[int], None]) -> None:
        """Read a file once, block by block, up to its end or its first fault.

        `step`: called with 1 after each block.
        """
        self.lists: list[tuple[Quotes | None, array[int]]] = []
        """Quotes of a list's key (None: the list is the file), and its borders."""
        self.fields: list[Quotes] = []
        """Quotes of the first keys of the object that is the file."""
        self.line_breaks = array("q")
        """Line breaks before each block."""
        self.fault: tuple[str, int] | None = None
        """A fault of the file and its offset."""
        self._level = 0  # depth inside of a list of rows: 1, or 2 where an object is around it
        self._depth = 0
        self._ended = self._in_string = self._escaped = self._in_list = False
        self._tail = np.zeros(2, np.int64)  # the last two quotes before a block
        self._name: Quotes = (0, 0)  # quotes of the last key
        start = num_breaks = 0
        while self.fault is None and (block := file.read(_BLOCK)):
            self.line_breaks.append(num_breaks)
            num_breaks += block.count(b"\n")
            # editors on Windows put a byte order mark before the first bracket
            has_mark = start == 0 and block.startswith(BOM_UTF8)
            self._read(block.replace(BOM_UTF8, b"   ", 1) if has_mark else block, start)
            start += len(block)
            step(1)
        self.line_breaks.append(num_breaks)
        if not self._level:
            self.fault = self.fault or ("it is empty", 0)
        elif self.fault is None and not self._ended:
            self.fault = ("it is cut short, or a string or bracket in it has no end", start)
        # an element that reaches the fault cannot be parsed either, and then says why
        if self.fault is not None and self._in_list:
            self.lists[-1][1].append(self.fault[1])

    def _read(self, block: bytes, start: int) -> None:
        if self._ended:
            return self._check_rest(block, 0, start)
        if not self._level:
            blank = len(block) - len(block.lstrip())
            if blank == len(block):
                return None
            self._level = {_OPEN[0]: 1, _OPEN[1]: 2}.get(block[blank], 0)
            if not self._level:
                self.fault = ("it begins with neither [ nor {", start + blank)
                return None
        at, marks = self._marks(block, start)
        is_quote = marks == _QUOTE
        quotes = np.concatenate([self._tail, at[is_quote]])
        outside = np.cumsum(is_quote) + self._in_string
        self._in_string = bool(outside[-1] % 2) if len(outside) else self._in_string
        outside = (outside % 2 == 0) & ~is_quote
        at, marks = at[outside], marks[outside]
        steps = _STEPS[marks]
        depths = np.cumsum(steps) + self._depth
        commas = (marks == _COMMA) & (depths == self._level)
        # a list begins and ends at few marks: the commas between two of them are its borders
        turns = ((steps > 0) & (depths == self._level)) | ((steps < 0) & (depths < self._level))
        turns |= (marks == _COLON) & (depths == 1) & (self._level == 2)
        done = 0
        for i in np.flatnonzero(turns).tolist():
            self._add_borders(at[done:i][commas[done:i]])
            done, here, depth = i, int(at[i]), int(depths[i])
            if marks[i] == _COLON:
                last = int(np.searchsorted(quotes, here))
                self._name = (int(quotes[last - 2]), int(quotes[last - 1]))
                self.fields += [self._name] if len(self.fields) < _MAX_FIELDS else []
            elif steps[i] > 0:
                self._in_list = marks[i] == _OPEN[0]
                if self._in_list:
                    key = self._name if self._level == 2 else None
                    self.lists.append((key, array("q", [here])))
            elif (marks[i] == _CLOSE[0]) != (self._in_list if depth == self._level - 1 else False):
                self.fault = ("a bracket is closed by one of another kind", here)
                return None
            else:
                self._add_borders(at[i : i + 1])
                self._in_list = False
                if depth == 0:
                    self._ended = True
                    return self._check_rest(block, here - start + 1, start)
        self._add_borders(at[done:][commas[done:]])
        self._depth = int(depths[-1]) if len(depths) else self._depth
        self._tail = quotes[-2:]
        return None

    def _marks(self, block: bytes, start: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return offsets and characters of brackets, quotes, commas and colons of a block."""
        if self._escaped or _BACKSLASH in block:
            text = np.frombuffer(bytearray(block), np.uint8)
            text[0] = _BLANK if self._escaped else text[0]
            slashes = np.flatnonzero(text == _BACKSLASH)
            # backslashes of a run escape each other in pairs, and the last of an odd run a mark
            numbers = np.arange(len(slashes))
            is_first = np.diff(slashes, prepend=-2) > 1
            number_in_run = numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
            escaped = slashes[number_in_run % 2 == 0] + 1
            self._escaped = bool(len(escaped)) and int(escaped[-1]) == len(text)
            text[escaped[escaped < len(text)]] = _BLANK
            block = text.tobytes()
        marks = np.frombuffer(block.translate(_MARKS), np.uint8)
        at = np.flatnonzero(marks != 0)  # three times as fast on truth values as on bytes
        return at + start, marks[at]

    def _add_borders(self, places: NDArray[np.int64]) -> None:
        if self._in_list:
            self.lists[-1][1].frombytes(places.astype(np.int64).tobytes())

    def _check_rest(self, block: bytes, begin: int, start: int) -> None:
        rest = block[begin:]
        if rest.strip():
            offset = start + begin + len(rest) - len(rest.lstrip())
            hint = "if there is a row on each line, name the file .jsonl"
            self.fault = (f"more follows after its value; {hint}", offset)
