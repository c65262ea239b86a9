"""EDF, BDF and WFDB: recordings of physiology, read from open files.

Parsed here and not by pyedflib and wfdb, which open files by name: a server decodes bytes in a
process that may open none. Tests compare the values with theirs. Sources: edfplus.info/specs,
physionet.org/physiotools/wag/header-5.htm and signal-5.htm.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO

import numpy as np

from multi_token.errors import MediaError
from multi_token.media.errors import DAMAGE, undecodable
from multi_token.media.fetch import Fetch
from multi_token.media.recording import Channel, Recording, Spans, damaged_error
from multi_token.media.unpack import unzip

EDF_MAGIC = (b"0       ", b"\xffBIOSEMI")
_EDF_FIELDS = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)
"""Widths of the fields of a signal: label, transducer, unit, physical minimum and maximum, digital
minimum and maximum, filters, samples in a data record, reserved."""
_MAX_SIGNALS = 4096

_RECORD_LINE = re.compile(
    r"(?P<name>[\w./-]+?)(?P<segments>/\d+)?[ \t]+(?P<signals>\d{1,6})"
    r"(?:[ \t]+(?P<rate>[\d.eE+-]+)(?:/\S*)?(?:[ \t]+(?P<steps>\d{1,15}).*)?)?\s*"
)
_SIGNAL_LINE = re.compile(
    r"(?P<file>\S+)[ \t]+(?P<format>\d+)(?:x(?P<per_frame>\d{1,6}))?(?::(?P<skew>\d{1,12}))?"
    r"(?:\+(?P<begin>\d{1,15}))?"
    r"(?:[ \t]+(?P<gain>[\d.eE+-]+)(?:\((?P<baseline>-?\d{1,12})\))?(?:/(?P<unit>\S+))?"
    r"(?:[ \t]+-?\d+(?:[ \t]+(?P<zero>-?\d{1,12})(?:[ \t]+-?\d+(?:[ \t]+-?\d+"
    r"(?:[ \t]+\d+(?:[ \t]+(?P<name>.*))?)?)?)?)?)?)?\s*"
)
# Bytes of two samples, function of bytes, and the value that marks a sample as missing.
_WFDB_FORMATS: dict[str, tuple[int, Callable[[bytes], np.ndarray], int]] = {
    "16": (4, lambda data: np.frombuffer(data, "<i2"), -(1 << 15)),
    "24": (6, lambda data: _int24(data), -(1 << 23)),
    "32": (8, lambda data: np.frombuffer(data, "<i4"), -(1 << 31)),
    "61": (4, lambda data: np.frombuffer(data, ">i2"), -(1 << 15)),
    "80": (2, lambda data: np.frombuffer(data, "u1").astype("i2") - 128, -128),
    "160": (4, lambda data: np.frombuffer(data, "<u2").astype("i4") - 32768, -(1 << 15)),
    "212": (3, lambda data: _int12(data), -(1 << 11)),
}


def open_edf(file: BinaryIO, label: str) -> Recording:
    """Return the recording in an EDF, EDF+ or BDF file, in physical units.

    Channels of annotations are left out. Raises MediaError.
    """
    is_bdf = file.read(8) == EDF_MAGIC[1]
    kind, width = ("a BDF file", 3) if is_bdf else ("an EDF file", 2)
    try:
        file.seek(0)
        start = file.read(256).decode("latin-1")
        reserved, num_signals = start[192:236], int(start[252:256])
        num_records, seconds = int(start[236:244]), float(start[244:252])
        begin = int(start[184:192])
        if not 0 < num_signals <= _MAX_SIGNALS or begin != 256 * (num_signals + 1):
            raise ValueError(f"its header has {begin} bytes for {num_signals} signals")
        columns: list[list[str]] = []
        for size in _EDF_FIELDS:
            cells = file.read(size * num_signals).decode("latin-1")
            columns.append([cells[i * size : (i + 1) * size].strip() for i in range(num_signals)])
        names, _, units, low, high, low_digital, high_digital, _, per_record, _ = columns
        counts = [int(count) for count in per_record]
        if min(counts) < 0 or not any(counts):
            raise ValueError("its data records are empty")
        record_bytes = width * sum(counts)
        available = (file.seek(0, os.SEEK_END) - begin) // record_bytes
        # A recorder that was not stopped leaves -1.
        num_records = available if num_records == -1 else num_records
        if not 0 < num_records <= available:
            raise ValueError(f"it has {available} of {num_records} data records")
        scales = [
            (float(b) - float(a)) / (int(d) - int(c)) if "Annotations" not in name else 1.0
            for name, a, b, c, d in zip(names, low, high, low_digital, high_digital, strict=True)
        ]
        offsets = [
            float(b) / scale - int(d) if "Annotations" not in name else 0.0
            for name, b, d, scale in zip(names, high, high_digital, scales, strict=True)
        ]
    except DAMAGE as error:
        raise damaged_error(label, kind, error) from None
    if reserved.startswith(("EDF+D", "BDF+D")):
        raise undecodable(f"{label} has gaps in time (EDF+D); write it as EDF+C, or in parts")
    starts = np.cumsum([0, *counts])
    kept = [i for i in range(num_signals) if "Annotations" not in names[i] and counts[i]]

    def read(places: Sequence[int], spans: Spans) -> Sequence[np.ndarray]:
        signals = [kept[place] for place in places]
        first = min(span[0] // counts[i] for i, span in zip(signals, spans, strict=True))
        last = max(-(-span[1] // counts[i]) for i, span in zip(signals, spans, strict=True))
        file.seek(begin + first * record_bytes)
        data = file.read((last - first) * record_bytes)
        table = (_int24(data) if is_bdf else np.frombuffer(data, "<i2")).reshape(last - first, -1)
        found = []
        for i, (start, stop) in zip(signals, spans, strict=True):
            values = table[:, starts[i] : starts[i + 1]].reshape(-1)
            values = values[start - first * counts[i] : stop - first * counts[i]]
            # The arithmetic of edflib, so that values are equal to the last bit.
            found.append(scales[i] * (offsets[i] + values.astype(np.float64)))
        return found

    channels = [
        Channel(
            names[i],
            num_records * counts[i],
            counts[i] / seconds if seconds > 0 else None,
            units[i],
        )
        for i in kept
    ]
    return Recording(label, channels, read)


def _int24(data: bytes) -> np.ndarray:
    """Signed numbers of three bytes, little-endian, as int32."""
    padded = np.zeros((len(data) // 3, 4), np.uint8)
    padded[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return padded.view("<i4")[:, 0] >> 8


def _int12(data: bytes) -> np.ndarray:
    """Signed numbers of 12 bits, two in three bytes (format 212), as int16."""
    low, middle, high = np.frombuffer(data, np.uint8).reshape(-1, 3).astype(np.int16).T
    pairs = np.stack([low | (middle & 0x0F) << 8, high | (middle & 0xF0) << 4], axis=1)
    return (pairs.reshape(-1) ^ 0x800) - 0x800


@dataclass(frozen=True)
class _Signal:
    """A line of a WFDB header: one signal, and its place in a frame of its file."""

    file: str
    format: str
    per_frame: int
    begin: int
    gain: float
    baseline: int
    unit: str
    name: str


def is_wfdb_header(data: bytes) -> bool:
    """Return True if a text is the header of a WFDB record."""
    lines = _header_lines(data)
    return len(lines) > 1 and bool(
        _RECORD_LINE.fullmatch(lines[0]) and _SIGNAL_LINE.fullmatch(lines[1])
    )


def _header_lines(data: bytes) -> list[str]:
    lines = data.decode("utf-8", "replace").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def wfdb_header(source: Any, fetch: Fetch) -> str | None:
    """Return the header of the WFDB record that a path names; None for other sources.

    A record is named as `x.hea`, as `x.dat`, or as `x` beside `x.hea`.
    """
    if not isinstance(source, (str, os.PathLike)):
        return None
    name = os.fspath(source)
    if name[:5].lower() == "data:":
        return None
    suffix = PurePath(name).suffix.lower()
    if suffix in (".hea", ".dat"):
        return name[:-4] + ".hea"
    if suffix or "://" in name:
        return None
    # PTB-XL's tables name records without a suffix.
    header = f"{name}.hea"
    if not fetch.stamp(header):
        return None
    path = fetch.local_path(source)
    if path is not None and path.is_file():
        return None
    try:
        fetch.open(header).close()
    except MediaError:
        return None
    return header


def file_beside(header: str, name: str) -> str:
    """Return the path of a file in the folder of a header."""
    return header[: max(header.rfind("/"), header.rfind(os.sep)) + 1] + name


def wfdb_files(source: Any, fetch: Fetch) -> list[str]:
    """Return the files here of the WFDB record that a path names; [] for other sources."""
    header = wfdb_header(source, fetch)
    # a header at an address is not downloaded
    if header is None or not fetch.stamp(header):
        return []
    try:
        lines = _header_lines(fetch.read(header))
    except MediaError:  # reading the item says why
        return [header]
    signals = filter(None, map(_SIGNAL_LINE.fullmatch, lines[1:]))
    names = dict.fromkeys(signal["file"] for signal in signals)
    return [header, *(file_beside(header, name) for name in names)]


def open_wfdb(data: bytes, label: str, beside: Callable[[str], BinaryIO]) -> Recording:
    """Return a WFDB record, in physical units.

    Args:
        data: The header (`.hea`).
        label: Opens error messages.
        beside: Function of the name of a signal file (`.dat`) that opens it.

    Raises:
        MediaError: A file is missing or damaged, or the record has a form that is not read.
    """
    lines = _header_lines(data)
    record = _RECORD_LINE.fullmatch(lines[0]) if lines else None
    if record is None:
        raise damaged_error(label, "a WFDB header", f"its first line is {lines[:1]!r}"[:120])
    if record["segments"]:
        raise undecodable(
            f"{label} has several segments; read one of them, or join them with wfdb.rdrecord and "
            "wfdb.wrsamp"
        )
    try:
        num_signals, rate = int(record["signals"]), float(record["rate"] or 250)
    except ValueError as error:
        raise damaged_error(label, "a WFDB header", error) from None
    if not 0 < num_signals <= min(_MAX_SIGNALS, len(lines) - 1) or not 0 < rate < math.inf:
        raise damaged_error(label, "a WFDB header", f"{num_signals} signals at {rate:g} Hz")
    signals = [_parse_signal(line, label) for line in lines[1 : num_signals + 1]]
    files = {signal.file: beside(signal.file) for signal in signals}
    num_frames = int(record["steps"] or 0)
    for name, file in files.items():
        inside = [signal for signal in signals if signal.file == name]
        size = file.seek(0, os.SEEK_END) - inside[0].begin
        available = 2 * size // _WFDB_FORMATS[inside[0].format][0]
        available //= sum(signal.per_frame for signal in inside)
        num_frames = num_frames or available
        if len({(s.format, s.begin) for s in inside}) > 1 or available < num_frames:
            raise damaged_error(name, "a WFDB file", f"it has {available} of {num_frames} steps")

    def read(places: Sequence[int], spans: Spans) -> Sequence[np.ndarray]:
        chosen = [signals[place] for place in places]
        first = min(span[0] // s.per_frame for s, span in zip(chosen, spans, strict=True))
        last = max(-(-span[1] // s.per_frame) for s, span in zip(chosen, spans, strict=True))
        tables = {s.file: _frames(files[s.file], s, signals, first, last) for s in chosen}
        found = []
        for place, signal, (start, stop) in zip(places, chosen, spans, strict=True):
            before = [s.per_frame for s in signals[:place] if s.file == signal.file]
            at, missing = sum(before), _WFDB_FORMATS[signal.format][2]
            values = tables[signal.file][:, at : at + signal.per_frame].reshape(-1)
            values = values[start - first * signal.per_frame : stop - first * signal.per_frame]
            physical = (values.astype(np.float64) - signal.baseline) / signal.gain
            found.append(np.where(values == missing, np.nan, physical))
        return found

    channels = [
        Channel(s.name, num_frames * s.per_frame, rate * s.per_frame, s.unit) for s in signals
    ]
    return Recording(label, channels, read)


def _parse_signal(line: str, label: str) -> _Signal:
    found = _SIGNAL_LINE.fullmatch(line)
    if found is None:
        raise damaged_error(label, "a WFDB header", f"a line is {line[:80]!r}")
    if found["format"] not in _WFDB_FORMATS or int(found["skew"] or 0):
        what = "skewed signals" if int(found["skew"] or 0) else f"format {found['format']}"
        raise undecodable(
            f"{label} has {what}, and the formats {', '.join(_WFDB_FORMATS)} without skew are "
            "read; write it again with wfdb.rdrecord and wfdb.wrsamp"
        )
    # Names of files beside the header alone: a header must not open other files.
    name = found["file"]
    if PurePath(name).name != name or "\\" in name or name in ("-", "~", "..", "."):
        raise undecodable(f"{label} names the file {name!r}, which is not beside it")
    zero, gain = int(found["zero"] or 0), _number(found["gain"])
    if gain is None or not math.isfinite(gain):
        raise damaged_error(label, "a WFDB header", f"a gain is {found['gain']}")
    return _Signal(
        file=name,
        format=found["format"],
        per_frame=max(1, int(found["per_frame"] or 1)),
        begin=int(found["begin"] or 0),
        gain=gain or 200.0,
        baseline=zero if found["baseline"] is None else int(found["baseline"]),
        unit=found["unit"] or "mV",
        name=(found["name"] or "").strip(),
    )


def _number(text: str | None) -> float | None:
    try:
        return float(text or 0)
    except ValueError:
        return None


def _frames(
    file: BinaryIO, signal: _Signal, signals: Sequence[_Signal], first: int, last: int
) -> np.ndarray:
    """Samples of a signal file, integers [frames, samples in a frame]."""
    pair, decode, _ = _WFDB_FORMATS[signal.format]
    width = sum(s.per_frame for s in signals if s.file == signal.file)
    # Pairs of samples share a byte in format 212, so reading begins at an even sample.
    begin = first * width // 2
    end = -(-last * width // 2)
    file.seek(signal.begin + begin * pair)
    data = file.read((end - begin) * pair)
    # The last sample of an odd number has no second half.
    data += bytes(-len(data) % pair)
    samples = decode(data)[first * width - 2 * begin :]
    return samples[: (last - first) * width].reshape(last - first, width)


def open_zip(data: bytes, label: str, max_bytes: int) -> Recording:
    """Return the WFDB record in a ZIP archive of its files. Raises MediaError."""
    members = unzip(data, label, max_bytes)
    files = {PurePath(name).name: content for name, content in members.items()}
    if any(name.endswith(".npy") for name in files):
        raise undecodable(f"{label} holds several arrays (.npz); write one with numpy.save")
    headers = [name for name in files if name.endswith(".hea")]
    if len(headers) != 1:
        raise undecodable(
            f"{label} is a ZIP archive with {len(headers)} WFDB headers (.hea); expected the files "
            "of one record"
        )

    def beside(name: str) -> BinaryIO:
        if name not in files:
            raise undecodable(f"{label} lacks {name}, which {headers[0]} names; add it")
        return io.BytesIO(files[name])

    return open_wfdb(files[headers[0]], label, beside)
