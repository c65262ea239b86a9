"""Source -> a series of numbers [time, channels], or a MediaError."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
from torch import Tensor

from multi_token.media.biosignal import (
    EDF_MAGIC,
    file_beside,
    is_wfdb_header,
    open_edf,
    open_wfdb,
    open_zip,
    wfdb_header,
)
from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.npy import MAGIC, open_part, read_npy, read_npy_header
from multi_token.media.recording import (
    Recording,
    Spans,
    open_audio,
    open_parquet,
    open_table,
)
from multi_token.media.unpack import ZIP_MAGIC
from multi_token.media.waveform import Excerpt
from multi_token.registry import did_you_mean

_SOURCES = ("array", "path", "bytes")
_KEYS = (*_SOURCES, "sampling_rate", "start", "end")
_LOBES = 32
"""Zero crossings of the anti-alias filter on each side; it stops 60 dB within 11 % of the rate."""
_FILTERED_AT_ONCE = 1 << 20
_PREFIXES = {"": 0, "k": 3, "M": 6, "m": -3, "u": -6, "µ": -6, "μ": -6, "n": -9, "p": -12}
_NAMES_IN_ERRORS = 24


@dataclass(frozen=True)
class SeriesSpec:
    """Series to make of a source."""

    channels: int
    """Numbers at each step."""
    max_steps: int
    """Largest number of steps, as given and at `rate`."""
    rate: float | None = None
    """Steps per second; None keeps the rate of the source."""
    names: Sequence[str] | None = None
    """Channels to take of a file, in this order; None takes all."""
    unit: str | None = None
    """Unit of the values; a file in another one of the same kind (uV, mV) is scaled."""

    def num_steps(self, num_given: int, given: float | None) -> int:
        """Return the number of steps at `rate`, if both rates are known."""
        if self.rate is None or given is None or self.rate == given:
            return num_given
        return max(1, round(num_given * self.rate / given))


class Series(np.ndarray):
    """A series, float32 [time, channels], and what its source says of it."""

    names: Sequence[str] = ()
    """Names of the channels; () if the source does not name them."""
    units: Sequence[str] = ()
    """Units of their values; () if they are not known."""
    rate: float | None = None
    """Steps per second; None if it is not known."""


def read_series(source: Any, fetch: Fetch, spec: SeriesSpec) -> Series:
    """Return a series, float32 [time, channels].

    | source | meaning |
    |---|---|
    | list, array, tensor | numbers |
    | path, URL, bytes | `.npy`, CSV, Parquet, EDF, BDF, WAV, FLAC; ZIP of a WFDB record |
    | path to `x.hea`, or to `x` beside it | a WFDB record |
    | `{"array" or "path" or "bytes": ...}` | the same, with the keys below |
    | `"sampling_rate"` | steps per second, where the file has none |
    | `"start"`, `"end"` | seconds; only that part is read |

    Raises:
        MediaError: The source is no series of such channels, holds NaN or inf, or is over the
            limit.
    """
    given = _parse_source(source)
    if given.is_numbers:
        values = _as_array(given.inner)
        begin, end = given.span(len(values) if values.ndim else 0, given.rate)
        series = _check_series(values[begin:end] if values.ndim else values, given.label, spec)
        return _at_rate([series], [given.rate], spec, given.label)
    with _opened(given, fetch) as file:
        if isinstance(file, Recording):
            places, spans, rates = _choose(file, given, spec)
            read = file.read(places, spans)
            factors = _unit_factors(file, places, spec)
            columns = [(c * f)[:, None] for c, f in zip(read, factors, strict=True)]
            each = replace(spec, channels=1)
            for place, column in zip(places, columns, strict=True):
                _check_series(column, f"{file.label}, channel {_name(file, place)}", each)
            series = _at_rate(columns, rates, spec, file.label)
            chosen = [file.channels[place] for place in places]
            names = [channel.name for channel in chosen]
            series.names = names if all(names) else ()
            units = [(spec.unit or channel.unit) if channel.unit else "" for channel in chosen]
            series.units = units if all(units) else ()
            return series
        shape = read_npy_header(file, given.label).shape
        file.seek(0)
        begin, end = given.span(shape[0] if shape else 0, given.rate)
        if shape:
            _check_length(end - begin, spec, given.label)
        series = _check_series(read_npy(file, given.label, begin, end), given.label, spec)
    return _at_rate([series], [given.rate], spec, given.label)


def count_steps(source: Any, fetch: Fetch, spec: SeriesSpec) -> int | None:
    """Return the number of steps that `read_series` gives; numbers in the row are read.

    Of a file only the header is read, and the lines of a CSV are counted. None if the header shows
    no such series: reading it says why. Raises MediaError for a missing or damaged file, and for a
    series over the limit.
    """
    given = _parse_source(source)
    if given.is_numbers:
        return len(read_series(source, fetch, spec))
    with _opened(given, fetch) as file:
        if isinstance(file, Recording):
            _, spans, rates = _choose(file, given, spec)
            return spec.num_steps(spans[0][1] - spans[0][0], rates[0])
        shape = read_npy_header(file, given.label).shape
    if len(shape) not in (1, 2) or shape[0] == 0 or spec.channels != (*shape, 1)[1]:
        return None
    begin, end = given.span(shape[0], given.rate)
    num_steps = spec.num_steps(end - begin, given.rate)
    _check_length(max(end - begin, num_steps), spec, given.label)
    return num_steps


def look_at_series(source: Any, fetch: Fetch) -> tuple[tuple[int, ...], float | None]:
    """Return the shape of numbers, [time, channels] of a recording, and its steps per second.

    Raises MediaError.
    """
    given = _parse_source(source)
    if given.is_numbers:
        return _as_array(given.inner).shape, given.rate
    with _opened(given, fetch) as file:
        if not isinstance(file, Recording):
            return tuple(read_npy_header(file, given.label).shape), given.rate
        rates = {channel.rate for channel in file.channels if channel.rate is not None}
        shape = (max(channel.num_steps for channel in file.channels), len(file.channels))
        return shape, max(rates, default=given.rate)


@dataclass(frozen=True)
class _Given:
    """A source, and what the row says beside it."""

    inner: Any
    rate: float | None = None
    start: float | None = None
    end: float | None = None

    @property
    def is_numbers(self) -> bool:
        return isinstance(self.inner, (list, tuple, np.ndarray, Tensor))

    @property
    def label(self) -> str:
        if self.is_numbers:
            return "the row's series"
        return source_name(self.inner) or "the bytes given"

    def span(self, num_steps: int, rate: float | None) -> tuple[int, int]:
        """First step to read, and the one after the last."""
        if self.start is None and self.end is None:
            return 0, num_steps
        if rate is None:
            raise undecodable(
                f"`start` and `end` of {self.label} are seconds, and its rate is unknown; give "
                "`sampling_rate` in the row"
            )
        excerpt = Excerpt(0, self.label, math.inf, self.start or 0.0, self.end)
        return excerpt.samples(cast(int, rate), num_steps)


def _parse_source(source: Any) -> _Given:
    if not isinstance(source, Mapping):
        return _Given(source)
    inner = next((source[key] for key in _SOURCES if source.get(key) is not None), None)
    unknown = [key for key in source if key not in _KEYS]
    if inner is None or unknown:
        raise undecodable(
            'expected {"array": ..., "sampling_rate": 500} for a series (or `path` or `bytes` of a '
            "file instead of `array`, and `start` and `end` in seconds), got the keys "
            f"{', '.join(map(str, source)) or 'none'}"
        )
    numbers: dict[str, float | None] = {}
    for key, least in (("sampling_rate", "above 0 in steps a second"), ("start", ""), ("end", "")):
        value: Any = source.get(key)
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        good = is_number and math.isfinite(value) and (value > 0 or (not least and value == 0))
        if value is not None and not good:
            raise undecodable(
                f"expected a `{key}` {least or 'of 0 or more seconds'}, got {value!r}"
            )
        numbers[key] = None if value is None else float(value)
    start, end = numbers["start"], numbers["end"]
    if end is not None and end <= (start or 0):
        raise undecodable(f"a series has `end` {end:g} s, which must be after `start`")
    return _Given(inner, numbers["sampling_rate"], start, end)


@contextmanager
def _opened(given: _Given, fetch: Fetch) -> Iterator[Recording | BinaryIO]:
    """The recording of a file by its first bytes, or the file itself if it is a `.npy` file."""
    source, label = given.inner, given.label
    with ExitStack() as stack:
        header = wfdb_header(source, fetch)
        if header is not None:
            yield open_wfdb(
                fetch.read(header),
                label,
                lambda name: stack.enter_context(open_part(file_beside(header, name), fetch)),
            )
            return
        file = stack.enter_context(open_part(source, fetch))
        start = file.read(12)
        file.seek(0)
        if start.startswith(EDF_MAGIC):
            yield open_edf(file, label)
        elif start.startswith(b"PAR1"):
            yield open_parquet(file, label)
        elif start.startswith((b"RIFF", b"RF64", b"riff", b"fLaC")):
            yield open_audio(file, label)
        elif start.startswith(MAGIC):
            yield file
        else:
            # These are read completely, so that the limit of bytes holds.
            data = fetch.read(source)
            if start.startswith(ZIP_MAGIC):
                yield open_zip(data, label, fetch.max_bytes)
            elif is_wfdb_header(data):
                raise undecodable(
                    f"{label} is the header of a WFDB record, without its samples; send a ZIP "
                    "archive of its .hea and .dat files"
                )
            else:
                yield open_table(data, label)


def _choose(
    recording: Recording, given: _Given, spec: SeriesSpec
) -> tuple[list[int], Spans, list[float | None]]:
    """Places of the channels to read, their spans, and their rates. Raises MediaError."""
    label, channels = recording.label, recording.channels
    known = [channel.name for channel in channels if channel.name]
    listed = ", ".join(known[:_NAMES_IN_ERRORS]) + ", ..." * (len(known) > _NAMES_IN_ERRORS)
    if spec.names is not None and known:
        places = [_place(name, recording, listed) for name in spec.names]
    elif len(channels) == spec.channels:
        places = list(range(len(channels)))
    else:
        raise undecodable(
            f"{label} has {len(channels)} channels{f' ({listed})' if known else ''}, and the "
            f"recipe says `channels: {spec.channels}`; "
            + ("choose by `channel_names`" if known else "set `channels` to what the rows hold")
        )
    rates: list[float | None] = []
    for place in places:
        own = channels[place].rate
        if own and given.rate and abs(own - given.rate) > 1e-6 * own:
            raise undecodable(
                f"{label} has {own:g} steps a second, and the row says {given.rate:g}; remove "
                "`sampling_rate` from the row"
            )
        rates.append(own or given.rate)
    spans = [
        given.span(channels[place].num_steps, rate)
        for place, rate in zip(places, rates, strict=True)
    ]
    if spec.rate is None:
        other = next((i for i, rate in enumerate(rates) if rate != rates[0]), None)
        if other is not None:
            first, second = (_name(recording, places[i]) for i in (0, other))
            raise undecodable(
                f"the channels {first} and {second} of {label} have {rates[0]:g} and "
                f"{rates[other]:g} steps a second; set `rate` in the recipe, or choose others by "
                "`channel_names`"
            )
    for (begin, end), rate in zip(spans, rates, strict=True):
        if end <= begin:
            raise undecodable(f"{label} has no steps to read; leave the row out")
        _check_length(end - begin, spec, label)
        num_steps = spec.num_steps(end - begin, rate)
        if num_steps > spec.max_steps:
            _check_length(num_steps, spec, f"{label}, at {spec.rate:g} steps a second,")
    return places, spans, rates


def _place(name: str, recording: Recording, listed: str) -> int:
    names = [channel.name for channel in recording.channels]
    # Files of one study differ in the case of a name: `aVR`, `AVR`.
    alike = [i for i, own in enumerate(names) if own.casefold() == name.casefold()]
    if name in names or len(alike) == 1:
        return names.index(name) if name in names else alike[0]
    raise undecodable(
        f"{recording.label} has no channel {name!r}{did_you_mean(name, names)} (channels: {listed})"
    )


def _name(recording: Recording, place: int) -> str:
    return recording.channels[place].name or str(place)


def _unit_factors(recording: Recording, places: Sequence[int], spec: SeriesSpec) -> list[float]:
    """Factor that brings each channel to `unit`; 1 where the file names none."""
    factors = []
    for place in places:
        own = recording.channels[place].unit
        if spec.unit is None or not own or own == spec.unit:
            factors.append(1.0)
            continue
        power = _power_between(own, spec.unit)
        if power is None:
            raise undecodable(
                f"the channel {_name(recording, place)} of {recording.label} is in {own}, and the "
                f"recipe says `unit: {spec.unit}`; choose other channels, or remove `unit`"
            )
        factors.append(10.0**power)
    return factors


def _power_between(own: str, wanted: str) -> int | None:
    """Power of ten from one unit to the other (uV -> mV is -3); None for units of two kinds."""
    forms = [
        {
            unit[len(prefix) :]: power
            for prefix, power in _PREFIXES.items()
            if unit.startswith(prefix)
        }
        for unit in (own, wanted)
    ]
    common = [base for base in forms[0] if base and base in forms[1]]
    return forms[0][common[0]] - forms[1][common[0]] if common else None


def _as_array(raw: Any) -> np.ndarray:
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu().numpy()
    try:
        return np.asarray(raw)
    except ValueError:
        # Rows of different lengths: kept as they are for the error of `_check_series`.
        made = np.empty(len(raw), dtype=object)
        made[:] = raw
        return made


def _at_rate(
    columns: Sequence[np.ndarray], rates: Sequence[float | None], spec: SeriesSpec, label: str
) -> Series:
    """Series float32 [time, channels] at `rate`; each part [time, channels] has its own rate."""
    num_steps = spec.num_steps(len(columns[0]), rates[0])
    # Checked again: resampling can make a short series long.
    if num_steps > spec.max_steps:
        _check_length(num_steps, spec, f"{label}, at {spec.rate:g} steps a second,")
    parts = []
    for column, rate in zip(columns, rates, strict=True):
        if spec.rate is None or rate is None or rate == spec.rate:
            parts.append(column)
        else:
            parts.append(_resampled(column, rate / spec.rate, num_steps))
    if len({len(part) for part in parts}) > 1:
        raise undecodable(f"the channels of {label} differ in length; choose by `channel_names`")
    series = np.ascontiguousarray(np.concatenate(parts, axis=1), dtype=np.float32).view(Series)
    series.rate = spec.rate or (rates[0] if len(set(rates)) == 1 else None)
    return series


def _resampled(series: np.ndarray, ratio: float, num_steps: int) -> np.ndarray:
    """Values of a series [time, channels] at every `ratio` steps, float64 [num_steps, channels].

    A rate that rises is interpolated linearly. Where the rate falls, a windowed sinc removes what
    the new rate cannot hold (Smith, "Digital Audio Resampling").
    """
    at = np.arange(num_steps) * ratio
    series = series.astype(np.float64)
    if ratio <= 1:
        given = np.arange(len(series))
        # Beyond the last step the last value is repeated, which is how `np.interp` extends.
        return np.stack([np.interp(at, given, c) for c in series.T], axis=1)
    # No longer than the series, since a row may claim any rate.
    half = min(math.ceil(_LOBES * ratio), len(series))
    # Odd reflection keeps the level and the slope at both ends.
    padded = np.pad(series, ((half, half + 1), (0, 0)), mode="reflect", reflect_type="odd")
    # A last step may be after the series, by less than one step of the new rate.
    nearest = np.minimum(np.floor(at).astype(int), len(series) - 1)
    # Rates in a simple ratio repeat a few distances: one for 500 -> 100, 18 for 500 -> 360.
    distances, place = np.unique(np.round(at - nearest, 9), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1, axis=0)
    made = np.empty((num_steps, series.shape[1]))
    size = max(1, _FILTERED_AT_ONCE // (2 * half + 1))
    for begin in range(0, num_steps, size):
        part = slice(begin, begin + size)
        own, row = np.unique(place[part], return_inverse=True)
        weights = _filter(distances[own], half, ratio)[row]
        for channel in range(series.shape[1]):
            taken = windows[nearest[part], channel]
            made[part, channel] = np.einsum("nk,nk->n", weights, taken)
    return made


def _filter(distances: np.ndarray, half: int, ratio: float) -> np.ndarray:
    """Weights [distances, 2 * half + 1] of the steps around one that is `distance` after a step."""
    away = distances[:, None] - np.arange(-half, half + 1)
    # Kaiser's window of 60 dB; the filter ends at the new Nyquist frequency.
    window = np.i0(5.65 * np.sqrt(np.maximum(1 - (away / (half + 1)) ** 2, 0)))
    weights = np.sinc(away * 0.94 / ratio) * window
    # Sums to one, so that a constant stays itself.
    return weights / weights.sum(1, keepdims=True)


def _check_series(array: np.ndarray, name: str, spec: SeriesSpec) -> np.ndarray:
    """Series float32 [time, channels] of finite numbers. Raises MediaError."""
    channels = spec.channels
    if array.dtype.kind not in "biuf" and array.size:
        raise undecodable(
            f"expected numbers in {name}, as [time] or [time, channels] with rows of one length, "
            f"got {str(array.tolist())[:80]!r}"
        )
    if array.ndim == 1 and channels == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != channels or len(array) == 0:
        fix = "set `channels` in the recipe to what the rows hold"
        if array.size == 0:
            fix = "a series has at least one step"
        elif array.ndim == 2 and array.shape[0] == channels:
            fix = "time comes first, so transpose it"
        raise undecodable(
            f"expected a series of shape [time, {channels}] in {name}, got {list(array.shape)}; "
            + fix
        )
    _check_length(len(array), spec, name)
    with np.errstate(over="ignore"):
        series = np.ascontiguousarray(array, dtype=np.float32)
    # After the cast, since a large float64 becomes inf in float32.
    finite = np.isfinite(series)
    if not finite.all():
        step, channel = (int(i) for i in np.argwhere(~finite)[0])
        raise undecodable(
            f"{name} holds {series[step, channel]} at step {step} of channel {channel} "
            f"({int((~finite).sum())} such values in all); remove or fill them"
        )
    return series


def _check_length(num_steps: int, spec: SeriesSpec, name: str) -> None:
    if num_steps > spec.max_steps:
        raise undecodable(
            f"{name} has {num_steps:,} steps, and the limit is {spec.max_steps:,}; cut it, name a "
            "part with `start` and `end`, lower `rate`, or raise `max_steps`"
        )
