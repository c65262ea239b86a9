"""Bytes in, the frames shown at evenly spaced times out, or one sentence saying why not."""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO

from PIL import Image

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.errors import undecodable
from multi_token.media.frame_sampling import (
    TIME_SLACK_S,
    clip_bounds,
    sample_times,
    too_long_error,
)
from multi_token.media.image import as_rgb

# A list of our own, because FFmpeg's whole registry holds formats that open other files and
# addresses named inside the data (HLS, DASH, concat), and images as videos of one frame.
FORMATS = ("mov", "matroska", "gif", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
_ACCEPTED = "MP4, MOV, WebM, MKV, GIF, AVI, MPEG, FLV, Ogg or WMV"

CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9"),
    *("mpeg4", "mpeg1video", "mpeg2video", "h263", "theora", "gif", "mjpeg", "prores", "dnxhd"),
    *("ffv1", "rawvideo", "flv", "vp6", "vp6f", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3"),
    "vc1",
)
"""Accepted codecs in them; FFmpeg has two hundred more, few of them in use."""

# what stands where in the first bytes
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"BM", "a BMP picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"WAVE", "a WAV sound"),
    (0, b"ID3", "an MP3"),
    (0, b"fLaC", "a FLAC sound"),
    (0, b"%PDF", "a PDF document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"#EXTM3U", "a playlist, which only names videos"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (0, b"\x93NUMPY", "a NumPy array"),
)


@dataclass(frozen=True)
class _PacketIndex:
    """Packets of a video before decoding; in decoding order, seconds from the first frame.

    `times`: when each packet's frame is shown, None if it is not; `keys`: where decoding can begin.
    """

    times: list[Fraction | None]
    keys: list[int]
    zero: Fraction
    duration: Fraction


@dataclass
class _DecodeRun:
    """Packets `first` to `last` are decoded for the frames shown at `times`."""

    first: int
    last: int
    times: list[Fraction] = field(default_factory=list)


def decode_video(
    data: bytes,
    *,
    name: str = "",
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float,
    max_frames: int,
    max_pixels: int,
) -> list[Image.Image]:  # RGB, fully in memory
    """The frames that a player shows at the times of `sample_times` between `start` and `end`.

    Where there are fewer frames than times, a frame is given again. Only packets that a wanted
    frame is made of are decoded, and only wanted frames are kept. Upright, RGB, over white where
    transparent. `name` opens the error message. Raises `MediaError(kind="undecodable")`.
    """
    label = name or "the video"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    asked = _FrameRequest(num_frames, fps, start, end, max_seconds, max_frames, max_pixels)
    index, times = _plan_frames(io.BytesIO(data), asked, label)
    with _open_video(io.BytesIO(data), label, max_pixels) as (container, stream):
        return _decode(container, stream, index, times, label=label, max_pixels=max_pixels)


def count_frames(
    file: BinaryIO,
    *,
    name: str = "",
    num_frames: int | None = None,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float,
    max_frames: int,
    max_pixels: int,
) -> int:
    """Number of frames that `decode_video` gives of a file; nothing is decoded.

    With `num_frames` only the header is read, with `fps` all packets are. Raises MediaError.
    """
    label = name or "the video"
    asked = _FrameRequest(num_frames, fps, start, end, max_seconds, max_frames, max_pixels)
    if num_frames is None:
        return len(_plan_frames(file, asked, label)[1])
    with _open_video(file, label, max_pixels) as (container, stream):
        _header_times(container, stream, asked, label)
    return num_frames


@dataclass(frozen=True)
class _FrameRequest:
    """Frames to sample from a video, and the limits."""

    num_frames: int | None
    fps: float | None
    start: float | None
    end: float | None
    max_seconds: float
    max_frames: int
    max_pixels: int


def _header_times(container: Any, stream: Any, asked: _FrameRequest, label: str) -> Fraction | None:
    """Seconds by the header, if it says them. Raises MediaError for too many."""
    promised = _header_duration(container, stream)
    to_read = None if promised is None or asked.end is not None else promised - (asked.start or 0)
    if to_read is not None and to_read > asked.max_seconds:
        raise too_long_error(label, f"{float(to_read):.1f} s", asked.max_seconds)
    return promised


def _plan_frames(
    file: BinaryIO, asked: _FrameRequest, label: str
) -> tuple[_PacketIndex, list[Fraction]]:
    """All packets, and the times of the wanted frames; no frame is decoded."""
    with _open_video(file, label, asked.max_pixels) as (container, stream):
        promised = _header_times(container, stream, asked, label)
        limit = math.inf if asked.end is not None else asked.max_seconds + (asked.start or 0)
        index = _scan(container, stream, label, limit=limit, max_seconds=asked.max_seconds)
    if promised is not None and promised > index.duration + TIME_SLACK_S:
        raise undecodable(
            f"{label} is cut off: its header promises {float(promised):.1f} s, and it ends after "
            f"{float(index.duration):.1f} s; copy or download it again"
        )
    part = clip_bounds(
        index.duration, asked.start, asked.end, max_seconds=asked.max_seconds, label=label
    )
    return index, sample_times(
        *part, num_frames=asked.num_frames, fps=asked.fps, max_frames=asked.max_frames
    )


class _NamelessFile:
    """A file whose name says nothing to FFmpeg, which would believe its ending."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def _open_video(file: BinaryIO, label: str, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, of which only the header was read."""
    try:
        import av
        from av.stream import Disposition
    except ImportError:
        raise MultiTokenError('video needs av: pip install "multi_token[video]"') from None

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        container = av.open(_NamelessFile(file), options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        if isinstance(error, EOFError):
            raise _empty_error(label) from error
        raise undecodable(f"{label} is not a video: {_describe(file, error)}") from error
    with container:
        # a sound file may hold its cover as a video stream
        covers = Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            others = sorted({s.type for s in container.streams})
            raise undecodable(
                f"{label} holds no moving pictures, only {' and '.join(others) or 'a header'}; "
                "give a video, or use the item for another sense"
            )
        stream = streams[0]
        if stream.codec_context is None:
            raise undecodable(
                f"{label} is of a kind that the installed FFmpeg cannot decode; convert it to MP4"
            )
        codec = stream.codec_context.codec.name
        if codec not in CODECS:
            raise undecodable(f"{label} is coded as {codec}; convert it to H.264, in an MP4")
        _check_pixels(stream.width, stream.height, label, max_pixels)
        # A frame may be larger than the header says: the decoder then makes no room for it. It
        # counts whole blocks, and those of neighbours; what comes out is measured exactly.
        stream.codec_context.options = {"max_pixels": str(2 * max_pixels + 1_000_000)}
        yield container, stream


def _header_duration(container: Any, stream: Any) -> Fraction | None:
    """The duration in the header, of the video stream alone, if there is one."""
    if stream.duration is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, 1_000_000)
    return None


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.size or packet.dts is not None:  # the last one stands for the end of the file
            yield packet


def _scan(
    container: Any, stream: Any, label: str, *, limit: float, max_seconds: float
) -> _PacketIndex:
    """Read all packets, decode none. A header may know no duration, or a wrong one."""
    import av

    times: list[Fraction | None] = []
    keys: list[int] = []
    zero = end = None
    still = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    try:
        for packet in _packets(container, stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            time = None if stamp is None or packet.is_discard else stamp * stream.time_base
            if packet.is_keyframe:
                keys.append(len(times))
            times.append(time)
            if time is None:
                continue
            zero = time if zero is None else min(zero, time)
            shown = packet.duration * stream.time_base if packet.duration else still
            end = time + shown if end is None else max(end, time + shown)
            if time - zero > limit:
                raise too_long_error(label, f"more than {float(time - zero):.1f} s", max_seconds)
    except av.FFmpegError as error:
        time = Fraction(0) if zero is None or end is None else end - zero
        raise _damaged_error(label, time, error.strerror) from error
    if zero is None or end is None:
        raise _empty_error(label)
    return _PacketIndex(
        [None if time is None else time - zero for time in times], keys, zero, end - zero
    )


def _runs(index: _PacketIndex, times: Sequence[Fraction]) -> list[_DecodeRun]:
    """The packets needed for the frames at `times`, which ascend."""
    shown = sorted((time, number) for number, time in enumerate(index.times) if time is not None)
    runs: list[_DecodeRun] = []
    for time in times:
        position = bisect.bisect_right(shown, (time, len(index.times))) - 1
        frame_time, last = shown[max(position, 0)]
        key = bisect.bisect_right(index.keys, last) - 1
        key_time = index.times[index.keys[key]] if key >= 0 else None
        if key_time is not None and frame_time < key_time:
            key -= 1  # shown before the key frame it follows, so made of frames before that one
        first = index.keys[key] if key >= 0 else 0
        if not runs or first > runs[-1].last + 1:
            runs.append(_DecodeRun(first, last))
        runs[-1].last = max(runs[-1].last, last)
        runs[-1].times.append(time)
    return runs


def _decode(
    container: Any,
    stream: Any,
    index: _PacketIndex,
    times: Sequence[Fraction],
    *,
    label: str,
    max_pixels: int,
) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    packets = enumerate(_packets(container, stream))
    for run in _runs(index, times):
        shown = None  # the last frame, which stands until the next one comes
        waiting = list(run.times)
        for frame in _frames(packets, stream, run, index, label):
            _check_pixels(frame.width, frame.height, label, max_pixels)
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None:
                continue
            time = stamp * stream.time_base - index.zero
            while waiting and shown is not None and time > waiting[0]:
                pictures.append(_to_image(shown, waiting.pop(0), label, max_pixels))
            shown = frame
        if shown is None:
            raise _damaged_error(label, run.times[0], "no frame comes out")
        pictures += [_to_image(shown, time, label, max_pixels) for time in waiting]
    return pictures


def _frames(
    packets: Iterator[tuple[int, Any]],
    stream: Any,
    run: _DecodeRun,
    index: _PacketIndex,
    label: str,
) -> Iterator[Any]:
    """The frames made of a run of packets, in the order they are shown."""
    import av

    decoder = stream.codec_context
    number = run.first
    try:
        for number, packet in packets:
            if number >= run.first:
                yield from decoder.decode(packet)
            if number >= run.last:
                break
        yield from decoder.decode(None)
    except av.FFmpegError as error:
        raise _damaged_error(label, index.times[number] or Fraction(0), error.strerror) from error
    decoder.flush_buffers()


def _to_image(frame: Any, time: Fraction, label: str, max_pixels: int) -> Image.Image:
    if frame.is_corrupt:
        raise _damaged_error(label, time, "the frame is incomplete")
    if any(component.is_alpha for component in frame.format.components):
        picture = Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if frame.rotation:  # a phone held upright videos lying frames and says so
        picture = picture.rotate(frame.rotation, expand=True)
    return as_rgb(picture, name=label, max_pixels=max_pixels)


def _check_pixels(width: int, height: int, label: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise undecodable(
            f"a frame of {label} is {width} x {height} = {width * height:,} pixels, and the limit "
            f"is {max_pixels:,}; make it smaller, or raise max_pixels"
        )


def _describe(file: BinaryIO, error: Any) -> str:
    file.seek(0)
    data = file.read(16)
    for offset, magic, what in _MAGIC:
        if data.startswith(magic, offset):
            return f"it begins like {what}; expected {_ACCEPTED}"
    reason = f"it is damaged, or not one of {_ACCEPTED} ({error.strerror})"
    return f"{reason}; its first bytes are {data[:12]!r}"


def _empty_error(label: str) -> MediaError:
    return undecodable(f"{label} has a header but no frames; copy or download it again")


def _damaged_error(label: str, time: Fraction, error: str | None) -> MediaError:
    return undecodable(
        f"{label} is damaged {float(time):.2f} s after its start ({error}); copy or download it "
        "again, or leave that part out with `start` and `end`"
    )
