"""Rows of .csv and .tsv files: records located once and parsed on access."""

from __future__ import annotations

import codecs
import csv
import io
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from multi_token.data.files.folder import media_column
from multi_token.data.files.index import stored_index
from multi_token.data.files.json import line_error
from multi_token.data.parallel import pass_console, progress_bar
from multi_token.data.rows import IndexedRows, Row, row_id_of
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.archive import Index

_MAX_FIELD = 1 << 28
"""Bytes of a field: a quote without an end would otherwise take the file into memory."""
_LARGE = 1 << 26
"""Bytes of a file whose index is stored, and whose opening shows a bar."""
_BLOCK = 1 << 20
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}


class CsvRows(IndexedRows):
    """Records of a .csv or .tsv file, each parsed on access; blank lines are no rows.

    The first record names the columns. A field in quotes may hold line breaks and delimiters (RFC
    4180). A .tsv whose quotes are plain letters (Common Voice) is read without quoting. An empty
    field is None. A column whose values all are numbers is read as numbers, if writing them gives
    the same letters: `007` and `0.10` stay texts.

    Memory holds two numbers for each record, so a file may be larger than memory. A record with
    another number of fields, or that is not UTF-8, is a bad row.
    """

    def __init__(self, path: Path) -> None:
        """Raises MultiTokenError for a file without header, RowError for a quote without end."""
        self.path = path.absolute()
        self.delimiter = "\t" if self.path.suffix.lower() == ".tsv" else ","
        large = self.path.stat().st_size >= _LARGE
        index = stored_index(self.path, "csv2", self._index) if large else self._index(self.path)
        self.starts, self.lines = index["starts"], index["lines"]
        self.quoting = int(index["quoting"][0])
        self.columns = self._columns(self.path)
        self.numeric = index["numeric"].tolist()

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        # opened for each row: forked workers would share the file position of one handle
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            data = file.read(int(self.starts[index + 1] - self.starts[index]))
        line, row_id = int(self.lines[index]), row_id_of(index, None, str(self.path))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line += data.count(b"\n", 0, error.start)
            fault = f"is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
            raise line_error(line, self.path, fault, row_id) from error
        fields = next(self._reader(io.StringIO(text, newline=""), self.quoting))
        if len(fields) != len(self.columns):
            raise line_error(line, self.path, self._ragged(len(fields)), row_id)
        return {
            name: None if text == "" else _number(text) if numeric else text
            for name, text, numeric in zip(self.columns, fields, self.numeric, strict=True)
        }

    def _reader(self, lines: Iterator[str] | io.StringIO, quoting: int) -> Any:
        csv.field_size_limit(_MAX_FIELD)
        # strict: a quote without its end is an error, and does not swallow the records after it
        kind: Any = quoting
        return csv.reader(lines, delimiter=self.delimiter, quoting=kind, strict=True)

    def _columns(self, path: Path) -> list[str]:
        """Read the names of the columns. Raises MultiTokenError where the header is none."""
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise MultiTokenError(f"{path} is UTF-16; save the file as UTF-8")
            file.seek(0)
            try:
                lines = (line.decode("utf-8-sig") for line in file)
                columns: list[str] = next(self._reader(lines, csv.QUOTE_MINIMAL), [])
            except UnicodeDecodeError as error:
                raise MultiTokenError(
                    f"line 1 of {path} is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            except csv.Error as error:
                raise MultiTokenError(
                    f"line 1 of {path} is no header of columns: {error}"
                ) from error
        self._check_header(path, columns)
        return ["Unnamed: 0", *columns[1:]] if columns[0] == "" else columns

    def _check_header(self, path: Path, columns: list[str]) -> None:
        if not columns:
            raise MultiTokenError(f"{path} is empty; write the names of the columns in line 1")
        others = [d for d in _DELIMITERS if d != self.delimiter and d in columns[0]]
        if len(columns) == 1 and others:
            raise MultiTokenError(
                f"line 1 of {path} has no {_DELIMITERS[self.delimiter]}, but a "
                f"{_DELIMITERS[others[0]]}: write {_DELIMITERS[self.delimiter]}s between fields"
                + (", or name the file .tsv" if others[0] == "\t" else "")
            )
        # pandas writes its index as a first column without a name
        no_name = [i for i, name in enumerate(columns) if i and not name.strip()]
        # a number or the name of an image is a value: the file has no header
        no_name += [i for i, n in enumerate(columns) if _number(n) is not n or media_column(n)]
        doubled = [name for name in columns if columns.count(name) > 1]
        if doubled or no_name or columns == [""]:
            found = doubled[0] if doubled else columns[no_name[0] if no_name else 0]
            raise MultiTokenError(
                f"line 1 of {path} names no columns, or not each one: {found!r} is "
                f"{'there twice' if doubled else 'no name'}; write a name for each column there"
            )

    def _ragged(self, num_fields: int) -> str:
        delimiter = _DELIMITERS[self.delimiter]
        return (
            f"has {num_fields} field{'' if num_fields == 1 else 's'}, but line 1 names "
            f"{len(self.columns)} columns; write a {delimiter} between fields, and a field that "
            f"holds a {delimiter} in quotes"
        )

    def _index(self, path: Path) -> Index:
        """Locate the records of a file."""
        self.columns = self._columns(path)
        try:
            index, is_regular = self._scan(path, csv.QUOTE_MINIMAL)
        except RowError:
            if self.delimiter != "\t":
                raise
            return self._scan(path, csv.QUOTE_NONE)[0]
        if is_regular or self.delimiter != "\t":
            return index
        # two quotes without end look like one long field, and the rows between them like its lines
        plain, is_regular = self._scan(path, csv.QUOTE_NONE)
        return plain if is_regular else index

    def _scan(self, path: Path, quoting: int) -> tuple[Index, bool]:
        """Read a file once -> (index, True if it is regular).

        All records of a regular file have the columns of the header, and no field holds a line
        break or delimiter.
        """
        starts, line_numbers = array("q"), array("q")
        num_columns, at, reported, is_regular = len(self.columns), 0, 0, True
        candidates = list(range(num_columns))
        size = path.stat().st_size
        bar = progress_bar(
            pass_console(quiet=size < _LARGE), f"Opening {path.name} (MiB)", size // _BLOCK
        )

        def lines() -> Iterator[str]:
            nonlocal at
            for line in file:
                at += len(line)
                # a record that is not UTF-8 has its error when it is read
                yield line.decode("utf-8", "surrogateescape")

        with bar as step, path.open("rb") as file:
            reader = self._reader(lines(), quoting)
            next(reader)
            while True:
                start, line_number = at, reader.line_num + 1
                try:
                    fields = next(reader)
                except StopIteration:
                    break
                except csv.Error as error:
                    raise line_error(
                        line_number,
                        path,
                        f"begins a record that is not CSV ({error}); write a quote within a "
                        "quoted field twice, and one at its end",
                        path.name,
                    ) from error
                if not fields:
                    continue
                starts.append(start)
                line_numbers.append(line_number)
                if reader.line_num > line_number or self.delimiter in "".join(fields):
                    is_regular = False
                if len(fields) != num_columns:
                    is_regular = False
                elif candidates:
                    texts = [i for i in candidates if fields[i] and _number(fields[i]) is fields[i]]
                    if texts:
                        candidates = [i for i in candidates if i not in texts]
                if at - reported >= _BLOCK:
                    step((at - reported) // _BLOCK)
                    reported += (at - reported) // _BLOCK * _BLOCK
        starts.append(at)
        numeric = np.zeros(num_columns, np.uint8)
        numeric[candidates] = 1
        index = {
            "starts": np.array(starts, np.int64),
            "lines": np.array(line_numbers, np.int64),
            "quoting": np.array([quoting], np.int64),
            "numeric": numeric,
        }
        return index, is_regular


def _number(text: str) -> Any:
    """Return the number that is written with exactly these letters, or else the text itself."""
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # the last letter: inf and nan are numbers to `float`
        if str(number) == text and text[-1].isdigit():
            return number
    return text
