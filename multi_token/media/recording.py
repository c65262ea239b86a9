"""A series in a file: its channels by header; and readers of tables (CSV, Parquet) and audio."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.audio import STREAMED, declared_size
from multi_token.media.errors import DAMAGE, require_package, undecodable
from multi_token.media.sniff import describe

Spans = Sequence[tuple[int, int]]
"""First step to read of each channel, and the one after the last."""

_EXPECTED = "expected .npy, CSV (UTF-8), Parquet, EDF, BDF, WAV, FLAC or a WFDB record"
_AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC")
_TRIED_LINES = 20
"""Lines of a table that decide its delimiter."""


@dataclass(frozen=True)
class Channel:
    """One channel of a recording, by its header."""

    name: str
    """"" if the file does not name its channels."""
    num_steps: int
    rate: float | None = None
    """Steps per second; None if the file does not say."""
    unit: str = ""
    """Unit of the values; "" if the file does not say."""


@dataclass(frozen=True)
class Recording:
    """Channels of a file whose header was read, and the function that reads their values."""

    label: str
    """Opens error messages."""
    channels: Sequence[Channel]
    read: Callable[[Sequence[int], Spans], Sequence[np.ndarray]]
    """(places of channels, their spans) -> their values, float64 [steps] each. Raises one of the
    errors of damaged bytes, or MediaError."""


def damaged_error(label: str, kind: str, error: object) -> MediaError:
    """Return the error of a file that begins like its format and is damaged."""
    return undecodable(
        f"{label} is {kind} that is truncated or damaged ({error}); copy or download it again"
    )


def open_table(data: bytes, label: str) -> Recording:
    """Return the recording in a CSV: a column is a channel, a line is a step.

    The first line may name the columns. Delimiters are comma, semicolon, tab or blanks; with
    semicolons or tabs, a decimal comma is read too. Raises MediaError.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise undecodable(f"{label} is not a series: {describe(data)}; {_EXPECTED}") from None
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    if not lines:
        raise undecodable(f"{label} has no lines of numbers; {_EXPECTED}")
    delimiter = _delimiter(lines[:_TRIED_LINES])
    first = [cell.strip() for cell in _cells(lines[0], delimiter)]
    names = first if any(not _is_number(cell) for cell in first) else [""] * len(first)
    body = lines[1:] if any(names) else lines
    if not body:
        raise undecodable(f"{label} has no lines of numbers; {_EXPECTED}")

    def read(places: Sequence[int], spans: Spans) -> Sequence[np.ndarray]:
        begin, end = spans[0]
        rows = body[begin:end]
        if delimiter in (";", "\t"):
            rows = [row.replace(",", ".") for row in rows]
        try:
            table = np.loadtxt(
                rows,
                delimiter=delimiter,
                usecols=list(places),
                ndmin=2,
                comments=None,
                quotechar='"',
            )
        except (ValueError, IndexError) as error:
            raise undecodable(
                f"{label} is no table of numbers ({error}; rows count from the first line of "
                "numbers that is read); fill or remove such cells, or choose `channel_names`"
            ) from None
        return list(table.T)

    return Recording(label, [Channel(name, len(body)) for name in names], read)


def _delimiter(lines: Sequence[str]) -> str | None:
    """The delimiter that cuts these lines into the same number of cells; None for blanks."""
    for delimiter in ("\t", ";", ","):
        widths = {len(_cells(line, delimiter)) for line in lines}
        if len(widths) == 1 and widths != {1}:
            return delimiter
    # Lines of several lengths are refused by the reader, which names the line.
    return next((d for d in ("\t", ";", ",") if d in lines[0]), None)


def _cells(line: str, delimiter: str | None) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), []) if delimiter else line.split()


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return cell == ""  # a missing value is refused where it is read
    return True


def open_parquet(file: BinaryIO, label: str) -> Recording:
    """Return the recording in a Parquet file: a column is a channel, a row is a step."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        schema, num_rows = table.schema_arrow, table.metadata.num_rows
    except (pa.ArrowException, *DAMAGE) as error:
        raise damaged_error(label, "a Parquet file", _first_line(error)) from None

    def read(places: Sequence[int], spans: Spans) -> Sequence[np.ndarray]:
        begin, end = spans[0]
        kinds = {schema.names[i]: schema.field(i).type for i in places}
        for name, kind in kinds.items():
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise undecodable(
                    f"the column {name!r} of {label} holds {kind}, and a series is numbers; choose "
                    "others with `channel_names`"
                )
        try:
            # Row groups before the part are skipped, and those after it are not read.
            groups, skipped = _groups(table.metadata, begin, end)
            part = table.read_row_groups(groups, columns=list(kinds), use_threads=False)
        except (pa.ArrowException, *DAMAGE) as error:
            raise damaged_error(label, "a Parquet file", _first_line(error)) from None
        part = part.slice(begin - skipped, end - begin)
        columns = [part.column(schema.names[i]) for i in places]
        # A null becomes NaN, which is refused with its place.
        return [column.cast(pa.float64()).to_numpy() for column in columns]

    return Recording(label, [Channel(name, num_rows) for name in schema.names], read)


def _groups(metadata: object, begin: int, end: int) -> tuple[list[int], int]:
    """Row groups with the rows `begin` to `end`, and the number of rows before them."""
    groups: list[int] = []
    at = skipped = 0
    for group in range(metadata.num_row_groups):  # type: ignore[attr-defined]
        num_rows = metadata.row_group(group).num_rows  # type: ignore[attr-defined]
        if at + num_rows <= begin:
            skipped += num_rows
        elif at < end:
            groups.append(group)
        at += num_rows
    return groups, skipped


def _first_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error).partition("\n")[0])[:200]


def open_audio(file: BinaryIO, label: str) -> Recording:
    """Return the recording in a WAV or FLAC: values from -1 to 1, channels without names."""
    try:
        soundfile = require_package("soundfile", "series")
    except MultiTokenError as error:
        # An error of the item, because a client of a server may send any file.
        raise undecodable(str(error)) from None
    declared, size = declared_size(file.read(16)), file.seek(0, os.SEEK_END)
    # libsndfile reads a file that was cut off without an error; a byte may pad an odd length.
    if size + 1 < declared < STREAMED:
        raise damaged_error(label, "a WAV", f"{declared - size:,} bytes at its end are missing")
    file.seek(0)
    try:
        audio = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise damaged_error(label, "a WAV or FLAC", error) from None
    if audio.format not in _AUDIO_FORMATS:
        raise undecodable(f"{label} is a {audio.format}; expected a WAV or FLAC")

    def read(places: Sequence[int], spans: Spans) -> Sequence[np.ndarray]:
        begin, end = spans[0]
        try:
            audio.seek(begin)
            values = audio.read(end - begin, "float64", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise damaged_error(label, "a WAV or FLAC", error) from None
        if len(values) < end - begin:
            raise damaged_error(label, "a WAV or FLAC", f"it ends after {len(values):,} steps")
        return [values[:, place] for place in places]

    channel = Channel("", audio.frames, float(audio.samplerate))
    return Recording(label, [channel] * audio.channels, read)
