"""How many samples a waveform will have, told by a header or an array before anything is decoded.

Border: counts only. What decoding makes of the same source is audio.py's, which also says what is
wrong with it: whatever is unusual here is left to decoding.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from multi_token.media.audio import CONTAINERS, FORMATS, STREAMED, unpack_source
from multi_token.media.fetch import Fetch
from multi_token.media.waveform import (
    RATES,
    UNKNOWN_LENGTH,
    check_rate,
    require_package,
    resampled_length,
    sample_range,
)

_EXACT_COUNT_FORMATS = frozenset(("WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"))
"""Formats whose header knows the number of samples; that of an MP3 or Ogg is an estimate, or none.
"""
_PCM_FORMATS = frozenset(
    ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
)
"""Codings in which each sample has its own bytes, or (FLAC) is counted by the encoder."""


def count_samples(source: Any, fetch: Fetch, *, rate: int, max_seconds: float) -> int | None:
    """The samples that `load_audio` gives at `rate`; None where only decoding tells.

    Told by headers of WAV, FLAC, AIFF, AU, CAF, W64 and RF64, and by arrays. Raises MediaError for
    what is not there, and for a part outside of the audio or over `max_seconds`.
    """
    given, name, span = unpack_source(source)
    label = name or "the audio"
    if given.get("array") is not None:
        told = _count_array(given["array"], given.get("sampling_rate"), label)
    elif isinstance(given.get("path"), (list, tuple, np.ndarray, Tensor)):
        return None
    else:
        data = given.get("bytes")
        with fetch.open(given.get("path") if data is None else data) as file:
            told = _count_file(file)
    if told is None or not RATES[0] <= told[0] <= RATES[1]:
        return None
    own_rate, num_frames = told
    begin, end = sample_range(span, own_rate, num_frames, label, max_seconds)
    return resampled_length(end - begin, own_rate, rate) or None


def _count_array(samples: Any, sampling_rate: Any, label: str) -> tuple[int, int] | None:
    """Samples in a second, and how many there are. Raises MediaError for a rate that cannot be."""
    is_number = isinstance(samples, (np.ndarray, Tensor)) and samples.ndim == 0
    if sampling_rate is None or is_number or not hasattr(samples, "__len__"):
        return None
    return check_rate(sampling_rate, label), len(samples)


def _count_file(file: BinaryIO) -> tuple[int, int] | None:
    start = file.read(16)
    size = file.seek(0, os.SEEK_END)
    if any(start.startswith(magic, at) for at, magic, _ in CONTAINERS) or _is_truncated(
        start, size
    ):
        return None
    soundfile = require_package("soundfile", "audio")
    file.seek(0)
    try:
        with soundfile.SoundFile(file) as sound:
            exact = (
                sound.format in _EXACT_COUNT_FORMATS.intersection(FORMATS)
                and sound.subtype in _PCM_FORMATS
            )
            if exact and 0 < sound.frames < UNKNOWN_LENGTH:
                return sound.samplerate, sound.frames
    except soundfile.LibsndfileError:
        return None  # decoding says what it is
    return None


def _is_truncated(start: bytes, size: int) -> bool:
    """Whether bytes are missing that the file says it has."""
    if not start.startswith((b"RIFF", b"FORM")):
        return False
    said = 8 + int.from_bytes(start[4:8], "little" if start.startswith(b"RIFF") else "big")
    return size < said < STREAMED
