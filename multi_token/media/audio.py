"""Audio -> one mono waveform at the sampling rate that is asked for, or a MediaError."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.decoders import encoded_source
from multi_token.media.errors import require_package, undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.sniff import describe
from multi_token.media.waveform import (
    RATES,
    UNKNOWN_LENGTH,
    Excerpt,
    check_rate,
    resampled_length,
    to_float32,
)

# A closed list: libsndfile also opens formats of old games and samplers, which are rare in data and
# little tested on damaged files.
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")

MAX_CHANNELS = 64
MAX_FILE_CHANNELS = 8
"""Largest number of channels in a file: a header may claim any, and each is decoded. 7.1 has 8."""
_KEYS = ("array", "sampling_rate", "path", "bytes", "start", "end")
_MAPPING_HINT = '{"array": [...], "sampling_rate": 16000}'
_HEADER_SLACK_S = 0.1  # by which a header may be too long: the length of an MP3 is an estimate
STREAMED = 0x7FFF_F000  # writers of streams put this or more where they do not know the size
_UNRECOGNISED = 1  # libsndfile's error code for an unknown format

CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "mov"),  # MP4, M4A, MOV, 3GP
    (0, b"\x1a\x45\xdf\xa3", "matroska"),  # and WebM
    (0, b"\xff\xf1", "aac"),
    (0, b"\xff\xf9", "aac"),
)
"""Offset, first bytes, and FFmpeg's reader of formats that libsndfile does not read. The reader is
named and never guessed: FFmpeg also knows playlists, which open other files and URLs."""

CODECS = (
    *("aac", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "libvorbis"),
    *("flac", "alac", "ac3", "eac3", "amrnb", "amrwb", "pcm_s16le", "pcm_s16be", "pcm_s24le"),
    *("pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_u8"),
)
"""Accepted codecs in containers. FFmpeg has a hundred more, which are rare."""

_EXACT_COUNT_FORMATS = frozenset(("WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"))
"""Formats whose header has the number of samples; an MP3 or Ogg has an estimate or none."""
_PCM_FORMATS = frozenset(
    ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
)
"""Codings that store each sample in its own bytes, or (FLAC) whose encoder counts samples."""


def load_audio(
    source: Any, fetch: Fetch, *, rate: int, max_seconds: float = 600.0, allow_silence: bool = False
) -> np.ndarray:
    """Return the waveform of an audio source, float32 [samples] at `rate`.

    | source                                     | meaning                                  |
    |--------------------------------------------|------------------------------------------|
    | path, URL, `data:` URI, bytes              | read through `fetch`, then decoded       |
    | `{"array": ..., "sampling_rate": 16000}`   | converted (the form of `datasets`)       |
    | `{"path" or "bytes": ...}`                 | as above                                 |
    | a decoder of torchcodec                    | the file that it reads, or its samples   |
    | either with `"start"` and `"end"`, seconds | only that part is decoded and counted    |

    Raises:
        MediaError: The source is no audio, is silent, or is over `max_seconds`.
    """
    given, excerpt = _unpack_source(source, rate, max_seconds)
    path = given.get("path")
    if given.get("array") is not None:
        if given.get("sampling_rate") is None:
            raise undecodable(
                f"an array of samples has no sampling rate; give {_MAPPING_HINT} with the rate "
                "at which it was recorded"
            )
        audio = as_audio(given["array"], given["sampling_rate"], excerpt)
    elif isinstance(path, (list, tuple, np.ndarray, Tensor)):
        raise undecodable(
            "a list of samples has no sampling rate; give "
            f"{_MAPPING_HINT} with the rate at which it was recorded"
        )
    else:
        data = given.get("bytes")
        audio = decode_audio(fetch.read(path if data is None else data), excerpt)
    # All samples equal, and not only zero: a broken converter writes a constant offset.
    if not allow_silence and audio.min() == audio.max():
        raise undecodable(
            f"{excerpt.label} is silence ({len(audio) / rate:.2f} s, all samples equal); "
            "fix the row, or set `allow_silence: true` if silence means something"
        )
    return audio


def _unpack_source(source: Any, rate: int, max_seconds: float) -> tuple[dict[str, Any], Excerpt]:
    """A source as a mapping, and the part of it to read.

    Raises MediaError for an unknown key or an impossible part.
    """
    source = encoded_source(source)
    given = dict(source) if isinstance(source, Mapping) else {"path": source}
    unknown = sorted(str(key) for key in given if key not in _KEYS)
    if unknown:
        raise undecodable(
            f"an audio has the unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}"
        )
    start, end = given.get("start"), given.get("end")
    excerpt = Excerpt(rate, source_name(given.get("path")), max_seconds, start or 0.0, end)
    for key, value in (("start", start), ("end", end)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value) and value >= 0):
            raise undecodable(
                f"`{key}` of {excerpt.label} is {value!r}, expected 0 seconds or more"
            )
    if end is not None and end <= excerpt.start:
        raise undecodable(
            f"{excerpt.label} has `end` {end:g} s, which must be after `start`, {excerpt.start:g} s"
        )
    return given, excerpt


def count_samples(source: Any, fetch: Fetch, *, rate: int, max_seconds: float) -> int | None:
    """Return the number of samples that `load_audio` gives at `rate`, without decoding.

    Read from headers of WAV, FLAC, AIFF, AU, CAF, W64 and RF64, and from arrays; None if only
    decoding tells. Raises MediaError for a missing file, and for a part outside of the audio or
    over `max_seconds`.
    """
    given, excerpt = _unpack_source(source, rate, max_seconds)
    if given.get("array") is not None:
        counted = _count_array(given["array"], given.get("sampling_rate"), excerpt.label)
    elif isinstance(given.get("path"), (list, tuple, np.ndarray, Tensor)):
        return None
    else:
        data = given.get("bytes")
        with fetch.open(given.get("path") if data is None else data) as file:
            counted = _count_file(file)
    # `load_audio` refuses such a rate with a message of its own.
    if counted is None or not RATES[0] <= counted[0] <= RATES[1]:
        return None
    own_rate, num_frames = counted
    begin, end = excerpt.samples(own_rate, num_frames)
    return resampled_length(end - begin, own_rate, rate) or None


def _count_array(samples: Any, sampling_rate: Any, label: str) -> tuple[int, int] | None:
    """Sampling rate and number of samples. Raises MediaError for an impossible rate."""
    is_number = isinstance(samples, (np.ndarray, Tensor)) and samples.ndim == 0
    if sampling_rate is None or is_number or not hasattr(samples, "__len__"):
        return None
    return check_rate(sampling_rate, label), len(samples)


def _count_file(file: BinaryIO) -> tuple[int, int] | None:
    start = file.read(16)
    size = file.seek(0, os.SEEK_END)
    # Containers keep the length per track and codec, which only FFmpeg can read.
    if any(start.startswith(magic, at) for at, magic, _ in CONTAINERS):
        return None
    if size < declared_size(start) < STREAMED:
        return None  # truncated: decoding says by how much
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
        return None  # decoding says what is wrong
    return None


def declared_size(start: bytes) -> int:
    """Bytes of the complete file by the header of WAV or AIFF; 0 for other formats."""
    if not start.startswith((b"RIFF", b"FORM")):
        return 0
    return 8 + int.from_bytes(start[4:8], "little" if start.startswith(b"RIFF") else "big")


def decode_audio(data: bytes, excerpt: Excerpt) -> np.ndarray:
    """Return the audio in `data` as float32 [samples], channels averaged.

    WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU and CAF; with `av` also MP4, M4A, WebM, Matroska
    and AAC. Decoding stops where it passes `max_seconds`, so that a long file costs no more than
    the limit.

    Raises:
        MediaError: The bytes are no audio, are damaged or over the limit.
    """
    if not data:
        raise undecodable(f"{excerpt.label} is empty (0 bytes); copy or download it again")
    # By content, because names are often wrong and bytes have none.
    demuxer = next((reader for at, magic, reader in CONTAINERS if data.startswith(magic, at)), "")
    decode = _decode_container if demuxer else _decode_file
    return excerpt.join(*decode(data, demuxer, excerpt))


def as_audio(samples: Any, sampling_rate: Any, excerpt: Excerpt) -> np.ndarray:
    """Do the same for decoded samples: [samples] or [samples, channels].

    Floats from -1 to 1; integers of 8, 16 or 32 bits are scaled to that range.
    """
    excerpt = replace(excerpt, name=excerpt.name or "the array of samples")
    array = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else samples
    try:
        array = np.asarray(array)
    except ValueError:
        message = f"{excerpt.label} has rows of different lengths; give [samples]"
        raise undecodable(message) from None
    given = check_rate(sampling_rate, excerpt.label)
    array = _mix_to_mono(to_float32(array, excerpt.label), excerpt.label)
    begin, end = excerpt.samples(given, len(array))
    # A second at a time, as files are decoded, so that a NaN is found in bounded memory.
    pieces = (array[at : min(at + given, end)] for at in range(begin, end, given))
    return excerpt.join(pieces, given)


def _mix_to_mono(array: np.ndarray, label: str) -> np.ndarray:
    if array.ndim == 1:
        return array
    if array.ndim != 2 or array.shape[1] == 0:
        raise undecodable(
            f"{label} has the shape {list(array.shape)}, expected [samples] or [samples, channels]"
        )
    # [channels, samples] is the order of torchaudio; averaging it would give a few samples.
    if array.shape[1] > min(MAX_CHANNELS, array.shape[0]):
        raise undecodable(
            f"{label} has the shape {list(array.shape)}, which would be {array.shape[1]:,} "
            "channels; expected [samples, channels], so transpose it"
        )
    return array.mean(axis=1)


def _decode_file(data: bytes, _: str, excerpt: Excerpt) -> tuple[Iterator[np.ndarray], int]:
    """Mono blocks and the sampling rate of a file that libsndfile reads."""
    label = excerpt.label
    soundfile = require_package("soundfile", "audio")

    class Forward(soundfile.SoundFile):
        """A file that is read from front to end."""

        # soundfile seeks after each block of a seekable file. An MP3 then loses the frames that
        # its next ones depend on, and a FLAC of unknown length fails at its end.
        def seekable(self) -> bool:
            return False

    try:
        file = Forward(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        if error.code != _UNRECOGNISED:
            raise _damaged_error(label, error) from error
        raise _not_audio_error(data, label) from error
    # libsndfile recognises more formats than the closed list.
    if file.format not in FORMATS:
        raise _not_audio_error(data, label)
    if num_missing := _num_missing_bytes(data):
        raise _damaged_error(label, f"{num_missing:,} bytes at its end are missing")
    given = check_rate(file.samplerate, label)
    _check_channels(file.channels, label)
    begin, end = excerpt.samples(given, file.frames)

    def blocks() -> Iterator[np.ndarray]:
        # A second earlier: the first frames after a seek lack the ones that they depend on.
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

    return blocks(), given


def _decode_container(
    data: bytes, demuxer: str, excerpt: Excerpt
) -> tuple[Iterator[np.ndarray], int]:
    """Mono blocks and the sampling rate of the first audio track of a file that FFmpeg reads."""
    label = excerpt.label
    av = require_package("av", "video")
    try:
        container = av.open(io.BytesIO(data), format=demuxer, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _damaged_error(label, error) from error
    if not container.streams.audio:
        container.close()
        raise undecodable(f"{label} has no audio track; it is a video without sound")
    track = container.streams.audio[0]
    if track.codec_context is None:
        raise _damaged_error(label, "its audio track has no known codec")
    given = check_rate(track.rate, label)
    codec = track.codec_context.codec.name
    if codec not in CODECS:
        raise undecodable(f"{label} has the codec {codec}; convert it to FLAC, MP3 or AAC")
    _check_channels(track.codec_context.channels, label)
    known = UNKNOWN_LENGTH
    if container.duration and demuxer != "aac":  # that of raw AAC is a guess by the bit rate
        known = int(container.duration * given / av.time_base)
    begin, end = excerpt.samples(given, known)

    def blocks() -> Iterator[np.ndarray]:
        position = 0
        try:
            with container:
                if begin > given:  # a second earlier, as for files
                    container.seek(int((begin / given - 1) / track.time_base), stream=track)
                for frame in container.decode(track):
                    # The first frame tells where the seek arrived. Later ones are counted, since
                    # some containers round times to milliseconds.
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

    return blocks(), given


def _check_channels(num_channels: int, label: str) -> None:
    if num_channels > MAX_FILE_CHANNELS:
        raise undecodable(
            f"{label} has {num_channels:,} channels, and the limit is {MAX_FILE_CHANNELS}; mix it "
            "down"
        )


def _to_float(frame: Any) -> np.ndarray:
    """A decoded frame of FFmpeg as mono floats."""
    # [channels, samples], or [1, samples * channels] for packed formats.
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    return to_float32(samples, "a frame").mean(axis=0)


def _num_missing_bytes(data: bytes) -> int:
    """Bytes that a file declares and does not have; libsndfile reads on without an error."""
    size = declared_size(data)
    if data.startswith(b"OggS"):
        # The lacing table of the last page holds the lengths of its segments.
        last = data.rfind(b"OggS")
        table = data[last + 27 : last + 27 + data[last + 26]] if last + 26 < len(data) else b""
        size = last + 27 + len(table) + sum(table)
    missing = size - len(data)
    # Writers often count the byte that pads an odd length, and leave it out.
    return missing if missing > 1 and size < STREAMED else 0


def _damaged_error(label: str, reason: object) -> MediaError:
    return undecodable(f"{label} is truncated or damaged ({reason}); copy or download it again")


def _not_audio_error(data: bytes, label: str) -> MediaError:
    return undecodable(
        f"{label} is not audio: {describe(data)}; expected one of {', '.join(FORMATS)}, MP4, WebM, "
        "AAC"
    )
