"""Source -> a series of numbers [time, channels], or a MediaError; and `.npy` files."""

from __future__ import annotations

import io
import math
import os
import tokenize
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.errors import DAMAGE, undecodable
from multi_token.media.fetch import Fetch, source_name

_SOURCES = ("array", "path", "bytes")
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Readers of the header by the version of the format; version 3 is for named fields only."""
# A header is parsed as Python, and may ask for more memory than there is.
_DAMAGE = (*DAMAGE, tokenize.TokenError, MemoryError)


def read_series(
    source: Any, fetch: Fetch, *, channels: int, max_steps: int, rate: float | None = None
) -> np.ndarray:
    """Return a series, float32 [time, channels].

    Args:
        source: List, array, tensor or `.npy` file, or a mapping with one of them under `array`,
            `path` or `bytes` and an optional `sampling_rate` in steps per second.
        fetch: Reader of paths and URLs.
        channels: Numbers at each step.
        max_steps: Largest number of steps, as given and at `rate`.
        rate: Steps per second. A series with a `sampling_rate` is resampled to this rate by linear
            interpolation.

    Raises:
        MediaError: The source is no series of `channels` finite numbers, or is over the limit.
    """
    sampling_rate = None
    if isinstance(source, Mapping):
        source, sampling_rate = _open_source(source)
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, (list, tuple, np.ndarray)):
        name, raw = "the row's series", source
    else:
        name = source_name(source) or "the bytes given"
        raw = read_npy(fetch.read(source), name)
    series = _check_series(raw, name, channels, max_steps)
    if rate is None or sampling_rate is None or rate == sampling_rate:
        return series
    # Checked again: resampling can make a short series long.
    num_steps = _num_steps(len(series), rate, sampling_rate)
    _check_length(num_steps, max_steps, f"{name}, at {rate:g} steps a second,")
    at = np.arange(num_steps) * (sampling_rate / rate)
    given = np.arange(len(series))
    # Beyond the last step the last value is repeated, which is how `np.interp` extends.
    return np.stack([np.interp(at, given, c) for c in series.T], axis=1).astype(np.float32)


def count_steps(
    source: Any, fetch: Fetch, *, channels: int, max_steps: int, rate: float | None = None
) -> int | None:
    """Return the number of steps that `read_series` gives; numbers in the row are read.

    None for a file whose header shows no such series: reading it says why. Raises MediaError for a
    missing file, one that is no `.npy` file, and a series over `max_steps`.
    """
    inner, sampling_rate = _open_source(source) if isinstance(source, Mapping) else (source, None)
    if isinstance(inner, (list, tuple, np.ndarray, Tensor)):
        return len(read_series(source, fetch, channels=channels, max_steps=max_steps, rate=rate))
    # The header alone: a file of a million steps is not read to count them.
    shape = header_shape(inner, fetch)
    if len(shape) not in (1, 2) or shape[0] == 0 or channels != (*shape, 1)[1]:
        return None
    num_steps = _num_steps(shape[0], rate, sampling_rate)
    _check_length(max(shape[0], num_steps), max_steps, source_name(inner) or "the bytes given")
    return num_steps


def _num_steps(num_given: int, rate: float | None, sampling_rate: float | None) -> int:
    """Steps at `rate`, if both rates are known."""
    if rate is None or sampling_rate is None or rate == sampling_rate:
        return num_given
    return max(1, round(num_given * rate / sampling_rate))


def header_shape(source: Any, fetch: Fetch) -> tuple[int, ...]:
    """Return the shape of the array in a `.npy` file, from its header. Raises MediaError."""
    with fetch.open(source) as file:
        return _read_npy_header(file, source_name(source) or "the bytes given")


def _open_source(source: Mapping[str, Any]) -> tuple[Any, float | None]:
    """The source inside a mapping, and its steps per second if it has them."""
    inner = next((source[key] for key in _SOURCES if source.get(key) is not None), None)
    unknown = [key for key in source if key not in (*_SOURCES, "sampling_rate")]
    if inner is None or unknown:
        raise undecodable(
            'expected {"array": ..., "sampling_rate": 500} for a series (or `path` or `bytes` of a '
            f".npy file instead of `array`), got the keys {', '.join(map(str, source)) or 'none'}"
        )
    rate = source.get("sampling_rate")
    if rate is None:
        return inner, None
    number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, bool)
    if not number or not 0 < rate < float("inf"):
        raise undecodable(f"expected a `sampling_rate` above 0 in steps a second, got {rate!r}")
    return inner, float(rate)


def read_npy(data: bytes, name: str) -> np.ndarray:
    """Return the array of numbers in a `.npy` file. Raises MediaError."""
    _read_npy_header(io.BytesIO(data), name)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except _DAMAGE as error:
        raise _not_npy_error(name, error) from None


def npy_bytes(numbers: Any) -> bytes:
    """Return numbers as the bytes of a float32 `.npy` file.

    Raises MediaError for lists of different lengths and for other values than numbers.
    """
    file = io.BytesIO()
    try:
        with np.errstate(over="ignore"):  # the modality refuses the infinity with its position
            np.save(file, np.asarray(numbers, dtype=np.float32), allow_pickle=False)
    except (TypeError, ValueError, OverflowError):
        raise undecodable(
            f"expected a list of numbers, or of equally long ones, got {str(numbers)[:80]!r}"
        ) from None
    return file.getvalue()


def _read_npy_header(file: BinaryIO, name: str) -> tuple[int, ...]:
    """Shape of the array in a `.npy` file.

    Raises MediaError for other files, and for one that is shorter than its header says.
    """
    try:
        if file.read(2) == b"PK":
            raise undecodable(f"{name} holds several arrays (.npz); write one with numpy.save")
        file.seek(0)
        # A KeyError for another version is one of the errors of damaged bytes.
        read_header = _HEADERS[np.lib.format.read_magic(file)]
        shape, _, dtype = read_header(file)
        begin = file.tell()
        # Checked first: numpy allocates the size in the header before it reads the numbers.
        num_missing = math.prod(shape) * dtype.itemsize - (file.seek(0, os.SEEK_END) - begin)
        if dtype.kind not in "biuf":
            raise ValueError(f"it holds {dtype}")
        if num_missing > 0:
            raise ValueError(f"its header promises {num_missing:,} bytes more than there are")
        return shape
    except _DAMAGE as error:
        raise _not_npy_error(name, error) from None


def _not_npy_error(name: str, error: Exception) -> MediaError:
    return undecodable(f"{name} is not a .npy file of numbers ({error}); write it with numpy.save")


def _check_series(raw: Any, name: str, channels: int, max_steps: int) -> np.ndarray:
    """Series float32 [time, channels] of finite numbers. Raises MediaError."""
    try:
        array = np.asarray(raw)
    except ValueError:
        # Rows of different lengths; None fails the check below with the message for them.
        array = np.asarray(None)
    if array.dtype.kind not in "biuf" and array.size:
        raise undecodable(
            f"expected numbers in {name}, as [time] or [time, channels] with rows of one length, "
            f"got {str(raw)[:80]!r}"
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
    _check_length(len(array), max_steps, name)
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


def _check_length(num_steps: int, max_steps: int, name: str) -> None:
    if num_steps > max_steps:
        raise undecodable(
            f"{name} has {num_steps:,} steps, and the limit is {max_steps:,}; cut it, lower "
            "`rate`, or raise `max_steps`"
        )
