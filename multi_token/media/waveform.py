"""Checks and conversion of waveforms: rate, scale, length, finite samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from multi_token.errors import MediaError
from multi_token.media.errors import require_package, undecodable

RATES = (1_000, 768_000)
"""Accepted sampling rates in Hz. A number outside of them is another one, such as kHz."""
MAX_AMPLITUDE = 100.0
"""Floats are between -1 and 1, or a little over; larger ones are integers stored as floats."""

UNKNOWN_LENGTH = 1 << 48
"""Number of samples from which on the length of a file is unknown."""
_END_SLACK_S = 0.5  # by which an `end` may lie after the last sample: times in rows are rounded


@dataclass(frozen=True)
class Excerpt:
    """Waveform to make of an audio: its sampling rate, the part to read, and the limit."""

    rate: int
    name: str = ""
    """Opens error messages."""
    max_seconds: float = 600.0
    start: float = 0.0
    """First second of the part."""
    end: float | None = None
    """Last second of the part; None is the end of the audio."""

    @property
    def label(self) -> str:
        return self.name or "the audio"

    def samples(self, given: int, num_frames: int) -> tuple[int, int]:
        """Return the first sample to read at the rate `given`, and the one after the last.

        Raises MediaError for a part outside of the audio or over `max_seconds`.
        """
        start, end, length = self.start, self.end, num_frames / given
        if (start and start >= length) or (end or 0.0) > length + _END_SLACK_S:
            asked = f"{start:g} to {end:g} s" if end is not None else f"{start:g} s on"
            raise undecodable(f"{self.label} is {length:.2f} s long, but the row asks for {asked}")
        # Rounded times in rows end a few samples late, so the end is clipped.
        stop = num_frames if end is None else min(round(end * given), num_frames)
        begin = round(start * given)
        # A header without a length is checked block by block in `join`.
        if stop < UNKNOWN_LENGTH and stop - begin > self.max_seconds * given:
            raise self._too_long_error(f"{(stop - begin) / given:,.1f} s")
        return begin, stop

    def join(self, blocks: Iterable[np.ndarray], given: int) -> np.ndarray:
        """Join mono blocks at the rate `given` into one waveform [samples] at `rate`.

        Raises MediaError for NaN or inf, for a length of zero, and where the blocks pass
        `max_seconds`; the blocks after that are not decoded.
        """
        soxr = require_package("soxr", "audio")
        # A stream, and not the complete audio, so that a long file stops at the limit.
        stream = None
        if given != self.rate:
            stream = soxr.ResampleStream(given, self.rate, 1, dtype="float32")
        pieces: list[np.ndarray] = []
        num_samples = 0
        for block in blocks:
            finite = np.isfinite(block)
            if not finite.all():
                at = num_samples + int(np.argmin(finite))
                raise undecodable(
                    f"{self.label} holds {block[np.argmin(finite)]} at sample {at:,} "
                    f"({at / given:.2f} s); remove or fill such values"
                )
            num_samples += len(block)
            if num_samples > self.max_seconds * given:
                raise self._too_long_error(f"more than {self.max_seconds:g} s")
            pieces.append(block if stream is None else stream.resample_chunk(block))
        if stream is not None:
            pieces.append(stream.resample_chunk(np.zeros(0, np.float32), last=True))
        audio = np.concatenate([np.zeros(0, np.float32), *pieces])
        if not len(audio):
            raise undecodable(
                f"{self.label} has a length of zero; leave the row out, or record it again"
            )
        return audio

    def _too_long_error(self, length: str) -> MediaError:
        return undecodable(
            f"{self.label} is {length} long, and the limit is {self.max_seconds:g} s; cut it, name "
            "a part with `start` and `end`, or raise `max_seconds`"
        )


def resampled_length(num_samples: int, given: int, rate: int) -> int:
    """Return the number of samples at `rate` that `Excerpt.join` makes of samples at `given`."""
    # The arithmetic of libsoxr in doubles (`rate_flush` in rate.h), so that halves round alike.
    return num_samples if given == rate else int(num_samples / (given / rate) + 0.5)


def check_rate(rate: Any, label: str) -> int:
    """Return a sampling rate as an int. Raises MediaError for one that is impossible."""
    number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, bool)
    # Rates come as floats from JSON and tables; 44,100.5 is no rate.
    if not number or rate != round(float(rate)) or not RATES[0] <= rate <= RATES[1]:
        raise undecodable(
            f"{label} has the sampling rate {rate!r}, expected a whole number of samples a "
            f"second, {RATES[0]:,} to {RATES[1]:,}"
        )
    return int(rate)


def to_float32(array: np.ndarray, label: str) -> np.ndarray:
    """Return samples of any type as float32 between -1 and 1. Raises MediaError."""
    if array.dtype.kind == "f":
        loudest = float(np.abs(array).max(initial=0.0))
        if loudest > MAX_AMPLITUDE:  # False for NaN, which `join` reports
            raise undecodable(
                f"{label} holds floats up to {loudest:g}, expected -1 to 1; divide 16-bit samples "
                "by 32768"
            )
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128  # 8-bit WAV is unsigned
    if array.dtype.kind == "i" and array.dtype.itemsize < 8:
        return array.astype(np.float32) / 2.0 ** (8 * array.dtype.itemsize - 1)
    raise undecodable(
        f"{label} holds values of type {array.dtype}, whose full scale is unknown; give floats "
        "from -1 to 1 or integers of 16 bits"
    )
