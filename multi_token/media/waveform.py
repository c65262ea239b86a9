"""Checks and conversion of waveforms: rate, scale, length, finite samples."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.errors import undecodable

RATES = (1_000, 768_000)
"""Samples in a second that are believed. Outside of them a number is another one: kHz, say."""
MAX_AMPLITUDE = 100.0
"""Floats lie between -1 and 1, or little over; beyond this they are integers in a coat."""

SecondsRange = tuple[float, float | None]
"""Start and end of the part that is wanted, in seconds; None is the end of the audio."""

UNKNOWN_LENGTH = 1 << 48
"""From here on, a number of samples means that a file does not tell its length."""
_END_SLACK_S = 0.5  # by which an `end` may lie behind the last sample: times in rows are rounded


def join_blocks(
    blocks: Iterable[np.ndarray], given: int, *, rate: int, label: str, max_seconds: float
) -> np.ndarray:
    """Mono blocks at the rate `given` -> one waveform [samples] at `rate`, in bounded memory.

    Raises MediaError for values that are not finite, for a length of zero, and where the blocks
    pass `max_seconds`: no block behind it is asked for.
    """
    soxr = require_package("soxr", "audio")
    stream = None if given == rate else soxr.ResampleStream(given, rate, 1, dtype="float32")
    pieces: list[np.ndarray] = []
    num_samples = 0
    for block in blocks:
        finite = np.isfinite(block)
        if not finite.all():
            at = num_samples + int(np.argmin(finite))
            raise undecodable(
                f"{label} holds {block[np.argmin(finite)]} at sample {at:,} ({at / given:.2f} s); "
                "remove or fill such values"
            )
        num_samples += len(block)
        if num_samples > max_seconds * given:
            raise _too_long_error(label, f"more than {max_seconds:g} s", max_seconds)
        pieces.append(block if stream is None else stream.resample_chunk(block))
    if stream is not None:
        pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
    audio = np.concatenate([np.zeros(0, np.float32), *pieces])
    if not len(audio):
        raise undecodable(f"{label} has a length of zero; leave the row out, or record it again")
    return audio


def resampled_length(num_samples: int, given: int, rate: int) -> int:
    """Samples that `join_blocks` makes of so many at the rate `given`: as libsoxr counts them."""
    # its own arithmetic, in doubles (`rate_flush` in rate.h), so that halves are rounded alike
    return num_samples if given == rate else int(num_samples / (given / rate) + 0.5)


def sample_range(
    span: SecondsRange, given: int, num_frames: int, label: str, max_seconds: float
) -> tuple[int, int]:
    """The first sample that is wanted and the one behind the last, of so many.

    Raises MediaError for a span outside of the audio or over `max_seconds`.
    """
    start, end = span
    length = num_frames / given
    if (start and start >= length) or (end or 0.0) > length + _END_SLACK_S:
        asked = f"{start:g} to {end:g} s" if end is not None else f"{start:g} s on"
        raise undecodable(f"{label} is {length:.2f} s long, but the row asks for {asked}")
    stop = num_frames if end is None else min(round(end * given), num_frames)
    begin = round(start * given)
    if stop < UNKNOWN_LENGTH and stop - begin > max_seconds * given:
        raise _too_long_error(label, f"{(stop - begin) / given:,.1f} s", max_seconds)
    return begin, stop


def check_rate(rate: Any, label: str) -> int:
    """Samples in a second, as a whole number that can be. Raises MediaError."""
    number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, bool)
    if not number or rate != round(float(rate)) or not RATES[0] <= rate <= RATES[1]:
        raise undecodable(
            f"{label} has the sampling rate {rate!r}, expected a whole number of samples in a "
            f"second, {RATES[0]:,} to {RATES[1]:,}"
        )
    return int(rate)


def to_float32(array: np.ndarray, label: str) -> np.ndarray:
    """Samples of any type as float32 between -1 and 1. Raises MediaError."""
    if array.dtype.kind == "f":
        loudest = float(np.abs(array).max(initial=0.0))
        if loudest > MAX_AMPLITUDE:  # NaN is not: it is named with its position later
            raise undecodable(
                f"{label} holds floats up to {loudest:g}, expected -1 to 1; divide 16-bit samples "
                "by 32768"
            )
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype.kind == "i" and array.dtype.itemsize < 8:
        return array.astype(np.float32) / 2.0 ** (8 * array.dtype.itemsize - 1)
    raise undecodable(
        f"{label} holds values of type {array.dtype}, whose full scale is unknown; give floats "
        "from -1 to 1 or integers of 16 bits"
    )


def require_package(name: str, extra: str) -> Any:
    """An optional package. Raises MultiTokenError with the line that installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise MultiTokenError(
            f"this audio is read by the package {name}, which is not installed; "
            f'pip install "multi_token[{extra}]"'
        ) from None


def _too_long_error(label: str, length: str, max_seconds: float) -> MediaError:
    return undecodable(
        f"{label} is {length} long, and the limit is {max_seconds:g} s; cut it, name a part with "
        "`start` and `end`, or raise `max_seconds`"
    )
