"""Audio in, one mono waveform out at the rate that is asked for, or one sentence saying why not."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, shorten
from multi_token.media.waveform import (
    RATES,
    UNKNOWN_LENGTH,
    SecondsRange,
    check_rate,
    join_blocks,
    require_package,
    resampled_length,
    sample_range,
    to_float32,
)

# A list of our own: libsndfile also opens the formats of old games and samplers, which nobody
# means and few have tested on damaged files.
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")

MAX_CHANNELS = 64
MAX_FILE_CHANNELS = 8
"""Most channels of a file, since a header may claim any number and each is decoded: 7.1 has 8."""
_KEYS = ("array", "sampling_rate", "path", "bytes", "start", "end")
_MAPPING_HINT = '{"array": [...], "sampling_rate": 16000}'
_HEADER_SLACK_S = 0.1  # by which a header may promise too much: that of an MP3 is an estimate
STREAMED = 0x7FFF_F000  # from here on, sizes in a header mean that the length was not known
_UNRECOGNISED = 1  # libsndfile's code of a format that it does not know

CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "mov"),  # MP4, M4A, MOV, 3GP
    (0, b"\x1a\x45\xdf\xa3", "matroska"),  # and WebM
    (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"),
)
"""Offset, first bytes, and FFmpeg's name of what libsndfile does not read. The reader is named and
never guessed: FFmpeg also knows playlists, which open other files and addresses."""

CODECS = (
    *("aac", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "libvorbis"),
    *("flac", "alac", "ac3", "eac3", "amrnb", "amrwb", "pcm_s16le", "pcm_s16be", "pcm_s24le"),
    *("pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_u8"),
)
"""Accepted codecs in containers; FFmpeg has a hundred more, few of them in use."""

_OTHER_CONTAINERS: tuple[tuple[bytes, str], ...] = (
    (b"\x89png", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"gif8", "a picture (GIF)"),
    (b"riff", "a RIFF file that is not WAV (WebP or AVI)"),
    (b"%pdf", "a PDF document"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML text"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"\x93numpy", "a NumPy array"),
    (b"{", "JSON text"),
)

_EXACT_COUNT_FORMATS = frozenset(("WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"))
"""Formats whose header knows the number of samples; that of an MP3 or Ogg is an estimate, or none.
"""
_PCM_FORMATS = frozenset(
    ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
)
"""Codings in which each sample has its own bytes, or (FLAC) is counted by the encoder."""


def load_audio(
    source: Any, fetch: Fetch, *, rate: int, max_seconds: float = 600.0, allow_silence: bool = False
) -> np.ndarray:  # float32 [samples] at `rate`
    """Load the waveform of an audio source.

    | source                                     | what happens                             |
    |--------------------------------------------|------------------------------------------|
    | path, address, `data:` URI, bytes          | read through `fetch`, then decoded       |
    | `{"array": ..., "sampling_rate": 16000}`   | converted (the shape of `datasets`)      |
    | `{"path" or "bytes": ...}`                 | as above                                 |
    | either with `"start"` and `"end"`, seconds | only that part is decoded and counted    |

    Raises MediaError.
    """
    given, name, span = unpack_source(source)
    path = given.get("path")
    limits = {"rate": rate, "name": name, "max_seconds": max_seconds, "span": span}
    if given.get("array") is not None:
        if given.get("sampling_rate") is None:
            raise undecodable(
                f"an array of samples comes without its rate; give {_MAPPING_HINT} with the rate "
                "at which it was recorded"
            )
        audio = as_audio(given["array"], sampling_rate=given["sampling_rate"], **limits)
    elif isinstance(path, (list, tuple, np.ndarray, Tensor)):
        raise undecodable(
            "samples alone do not tell their rate; instead of a bare list or array give "
            f"{_MAPPING_HINT} with the rate at which they were recorded"
        )
    else:
        data = given.get("bytes")
        audio = decode_audio(fetch.read(path if data is None else data), **limits)
    if not allow_silence and audio.min() == audio.max():
        raise undecodable(
            f"{name or 'the audio'} is silence ({len(audio) / rate:.2f} s, all samples equal); "
            "mend the row, or set `allow_silence: true` if silence means something"
        )
    return audio


def unpack_source(source: Any) -> tuple[dict[str, Any], str, SecondsRange]:
    """A source as a mapping, the name that messages call it by, and the part that is wanted.

    Raises MediaError for a key or a part that cannot be.
    """
    given = dict(source) if isinstance(source, Mapping) else {"path": source}
    unknown = sorted(str(key) for key in given if key not in _KEYS)
    if unknown:
        raise undecodable(
            f"an audio has the unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}"
        )
    path = given.get("path")
    name = shorten(path) if isinstance(path, str) and path[:5].lower() != "data:" else ""
    return given, name, _span(given.get("start"), given.get("end"), name or "the audio")


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
    """Return True if the file is shorter than its header says."""
    if not start.startswith((b"RIFF", b"FORM")):
        return False
    said = 8 + int.from_bytes(start[4:8], "little" if start.startswith(b"RIFF") else "big")
    return size < said < STREAMED


def decode_audio(
    data: bytes,
    *,
    rate: int,
    name: str = "",
    max_seconds: float = 600.0,
    span: SecondsRange = (0.0, None),
) -> np.ndarray:  # float32 [samples] at `rate`
    """The audio in `data`, channels averaged.

    WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU and CAF; with `av` also MP4, M4A, WebM, Matroska
    and AAC. It is decoded piece by piece and given up where it passes `max_seconds`, so that a
    long file costs no more than the limit. `span`: start and end in seconds, of which only what
    lies between is decoded. `name` opens the error message. Raises MediaError.
    """
    label = name or "the audio"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    demuxer = next((reader for at, magic, reader in CONTAINERS if data.startswith(magic, at)), "")
    decode = _decode_container if demuxer else _decode_file
    given, blocks = decode(data, demuxer, label, span, max_seconds)
    return join_blocks(blocks, given, rate=rate, label=label, max_seconds=max_seconds)


def as_audio(
    samples: Any,
    *,
    sampling_rate: Any,
    rate: int,
    name: str = "",
    max_seconds: float = 600.0,
    span: SecondsRange = (0.0, None),
) -> np.ndarray:  # float32 [samples] at `rate`
    """The same for samples that are decoded already: [samples] or [samples, channels].

    Floats from -1 to 1; integers of 8, 16 or 32 bits are scaled to that. Raises MediaError.
    """
    label = name or "the array of samples"
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
    try:
        array = np.asarray(array)
    except ValueError:
        raise undecodable(f"{label} has rows of different lengths; give [samples]") from None
    given = check_rate(sampling_rate, label)
    array = _mix_to_mono(to_float32(array, label), label)
    begin, end = sample_range(span, given, len(array), label, max_seconds)
    pieces = (array[at : min(at + given, end)] for at in range(begin, end, given))
    return join_blocks(pieces, given, rate=rate, label=label, max_seconds=max_seconds)


def _mix_to_mono(array: np.ndarray, label: str) -> np.ndarray:
    if array.ndim == 1:
        return array
    if array.ndim != 2 or array.shape[1] == 0:
        raise undecodable(
            f"{label} has the shape {list(array.shape)}, expected [samples] or [samples, channels]"
        )
    if array.shape[1] > min(MAX_CHANNELS, array.shape[0]):
        raise undecodable(
            f"{label} has the shape {list(array.shape)}, which would be {array.shape[1]:,} "
            "channels; expected [samples, channels], so transpose it"
        )
    return array.mean(axis=1)


def _decode_file(
    data: bytes, _: str, label: str, span: SecondsRange, max_seconds: float
) -> tuple[int, Iterator[np.ndarray]]:
    """The rate and the mono blocks of what libsndfile reads."""
    soundfile = require_package("soundfile", "audio")

    class Forward(soundfile.SoundFile):
        """Read from front to end: soundfile would else seek behind each block, which costs an MP3
        what its next frames build on, and fails at the end of a FLAC of unknown length."""

        def seekable(self) -> bool:
            return False

    try:
        file = Forward(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        if error.code != _UNRECOGNISED:
            raise _damaged_error(label, error) from error
        raise _not_audio_error(data, label) from error
    if file.format not in FORMATS:
        raise _not_audio_error(data, label)
    if num_missing := _num_missing_bytes(data):
        raise _damaged_error(label, f"{num_missing:,} bytes at its end are missing")
    given = check_rate(file.samplerate, label)
    _check_channels(file.channels, label)
    begin, end = sample_range(span, given, file.frames, label, max_seconds)

    def blocks() -> Iterator[np.ndarray]:
        # a second earlier: the first frames behind a jump lack what they build on
        position = max(0, begin - given)
        try:
            with file:
                if position:
                    file.seek(position)
                while position < end:
                    block = file.read(min(given, end - position), "float32", always_2d=True)
                    if not len(block):
                        break
                    yield block[max(0, begin - position) :].mean(axis=1)
                    position += len(block)
        except soundfile.LibsndfileError as error:
            where = f"after {position / given:.1f} s: {error}"
            raise _damaged_error(label, where) from error
        if file.frames < UNKNOWN_LENGTH and position < end - _HEADER_SLACK_S * given:
            raise _damaged_error(label, f"it ends after {position / given:.1f} s")

    return given, blocks()


def _decode_container(
    data: bytes, demuxer: str, label: str, span: SecondsRange, max_seconds: float
) -> tuple[int, Iterator[np.ndarray]]:
    """The same of the first audio track of what FFmpeg reads."""
    av = require_package("av", "video")
    try:
        container = av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _damaged_error(label, error) from error
    if not container.streams.audio:
        container.close()
        raise undecodable(f"{label} has no audio track; it is a film without sound")
    track = container.streams.audio[0]
    if track.codec_context is None:
        raise _damaged_error(label, "its audio track has no known codec")
    given = check_rate(track.rate, label)
    codec = track.codec_context.codec.name
    if codec not in CODECS:
        raise undecodable(f"{label} is coded as {codec}; convert it to FLAC, MP3 or AAC")
    _check_channels(track.codec_context.channels, label)
    known = UNKNOWN_LENGTH
    if container.duration and demuxer != "aac":  # of raw AAC it is a guess by the bit rate
        known = int(container.duration * given / av.time_base)
    begin, end = sample_range(span, given, known, label, max_seconds)

    def blocks() -> Iterator[np.ndarray]:
        position = 0
        try:
            with container:
                if begin > given:
                    # as of files: a second earlier
                    container.seek(int((begin / given - 1) / track.time_base), stream=track)
                for frame in container.decode(track):
                    position = round((frame.time or 0.0) * given) if position == 0 else position
                    block = _to_float(frame)
                    yield block[max(begin - position, 0) : max(end - position, 0)]
                    position += len(block)
                    if position >= end:
                        return
        except av.FFmpegError as error:
            raise _damaged_error(label, f"after {position / given:.1f} s: {error}") from error
        if known < UNKNOWN_LENGTH and position < end - _HEADER_SLACK_S * given:
            raise _damaged_error(label, f"it ends after {position / given:.1f} s")

    return given, blocks()


def _check_channels(num_channels: int, label: str) -> None:
    if num_channels > MAX_FILE_CHANNELS:
        raise undecodable(
            f"{label} has {num_channels:,} channels, and the limit is {MAX_FILE_CHANNELS}; mix it "
            "down"
        )


def _to_float(frame: Any) -> np.ndarray:
    """A decoded frame of FFmpeg as mono floats."""
    samples = frame.to_ndarray()  # [channels, samples], or [1, samples * channels]
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    return to_float32(samples, "a frame").mean(axis=0)


def _span(start: Any, end: Any, label: str) -> SecondsRange:
    for key, value in (("start", start), ("end", end)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value >= 0):
            raise undecodable(f"`{key}` of {label} is {value!r}, expected seconds from 0 on")
    if end is not None and end <= (start or 0.0):
        raise undecodable(f"{label} is to end at {end:g} s, but to start at {start or 0.0:g} s")
    return float(start or 0.0), end


def _num_missing_bytes(data: bytes) -> int:
    """Bytes that the file says it has and that are not there; libsndfile passes over the gap."""
    size = len(data)
    if data.startswith((b"RIFF", b"FORM")):
        size = 8 + int.from_bytes(data[4:8], "little" if data.startswith(b"RIFF") else "big")
    elif data.startswith(b"OggS"):
        last = data.rfind(b"OggS")
        table = data[last + 27 : last + 27 + data[last + 26]] if last + 26 < len(data) else b""
        size = last + 27 + len(table) + sum(table)
    missing = size - len(data)
    # one byte that fills up an odd number is often announced and not written
    return missing if missing > 1 and size < STREAMED else 0


def _damaged_error(label: str, reason: object) -> MediaError:
    return undecodable(f"{label} is truncated or damaged ({reason}); copy or download it again")


def _not_audio_error(data: bytes, label: str) -> MediaError:
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    what = next((what for magic, what in _OTHER_CONTAINERS if start.startswith(magic)), None)
    found = f"it begins like {what}" if what else f"its first bytes are {data[:12]!r}"
    return undecodable(
        f"{label} is not audio: {found}; expected one of {', '.join(FORMATS)}, MP4, WebM, AAC"
    )
