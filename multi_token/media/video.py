"""Bytes -> the frames shown at evenly spaced times, or a MediaError."""

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

from multi_token.errors import MediaError
from multi_token.media.errors import require_package, undecodable
from multi_token.media.frame_sampling import TIME_SLACK_S, Frames, FrameSampling
from multi_token.media.image import as_rgb
from multi_token.media.sniff import describe

# A closed list, because FFmpeg's registry also holds formats that open files and URLs named in the
# data (HLS, DASH, concat), and images as videos of one frame.
FORMATS = ("mov", "matroska", "gif", "avi", "mpegts", "mpeg", "flv", "ogg", "asf")
_ACCEPTED = "MP4, MOV, WebM, MKV, GIF, AVI, MPEG, FLV, Ogg or WMV"

CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9"),
    *("mpeg4", "mpeg1video", "mpeg2video", "h263", "theora", "gif", "mjpeg", "prores", "dnxhd"),
    *("ffv1", "rawvideo", "flv", "vp6", "vp6f", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3"),
    "vc1",
)
"""Accepted codecs in them. FFmpeg has two hundred more, which are rare and less tested on damaged
files."""


@dataclass(frozen=True)
class _PacketIndex:
    """Packets of a video in decoding order, before they are decoded.

    `times`: the second at which each packet's frame is shown, counted from `zero`, the first frame;
    None if it is not shown. `keys`: packets at which decoding can begin.
    """

    times: list[Fraction | None]
    keys: list[int]
    zero: Fraction
    duration: Fraction


@dataclass
class _DecodeRun:
    """Packets `first` to `last`, which are decoded for the frames shown at `times`."""

    first: int
    last: int
    times: list[Fraction] = field(default_factory=list)


def decode_video(
    data: bytes, sampling: FrameSampling, *, name: str = "", max_pixels: int
) -> Frames:
    """Return the frames that a player shows at the times of `sampling`: upright, RGB, over white.

    If the video has fewer frames than times, a frame is returned several times. Only the packets
    that a wanted frame depends on are decoded, and only wanted frames are kept in memory.

    Raises:
        MediaError: The bytes are no video, are damaged or over a limit; `name` opens the message.
    """
    label = name or "the video"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    index, times = _plan_frames(io.BytesIO(data), sampling, label, max_pixels)
    with _open_video(io.BytesIO(data), label, max_pixels) as (container, stream):
        return _decode(container, stream, index, times, label=label, max_pixels=max_pixels)


def count_frames(
    file: BinaryIO, sampling: FrameSampling, *, name: str = "", max_pixels: int
) -> int:
    """Return the number of frames that `decode_video` gives of a file, without decoding.

    With `num_frames` only the header is read, with `fps` all packets are. Raises MediaError.
    """
    label = name or "the video"
    if sampling.num_frames is None:
        return len(_plan_frames(file, sampling, label, max_pixels)[1])
    with _open_video(file, label, max_pixels) as (container, stream):
        _checked_duration(container, stream, sampling, label)
    return sampling.num_frames


def _checked_duration(
    container: Any, stream: Any, sampling: FrameSampling, label: str
) -> Fraction | None:
    """Seconds of the video by its header, if it has them. Raises MediaError over the limit."""
    seconds = None
    if stream.duration is not None:
        seconds = stream.duration * stream.time_base
    elif container.duration is not None and len(container.streams) == 1:
        # The container's duration is that of its longest stream, which may be the audio.
        seconds = Fraction(container.duration, 1_000_000)
    to_read = (
        None if seconds is None or sampling.end is not None else seconds - (sampling.start or 0)
    )
    if to_read is not None and to_read > sampling.max_seconds:
        raise sampling.too_long_error(label, f"{float(to_read):.1f} s")
    return seconds


def _plan_frames(
    file: BinaryIO, sampling: FrameSampling, label: str, max_pixels: int
) -> tuple[_PacketIndex, list[Fraction]]:
    """All packets, and the times of the wanted frames; no frame is decoded."""
    with _open_video(file, label, max_pixels) as (container, stream):
        promised = _checked_duration(container, stream, sampling, label)
        index = _scan(container, stream, label, sampling)
    if promised is not None and promised > index.duration + TIME_SLACK_S:
        raise undecodable(
            f"{label} is cut off: its header promises {float(promised):.1f} s, and it ends after "
            f"{float(index.duration):.1f} s; copy or download it again"
        )
    return index, sampling.times(index.duration, label)


class _NamelessFile:
    """A file without a name, because FFmpeg guesses the format by its suffix."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextmanager
def _open_video(file: BinaryIO, label: str, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Open the container and its video stream; only the header is read."""
    av = require_package("av", "video")

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        # No protocol is allowed, so data that names another file or URL cannot open it.
        container = av.open(_NamelessFile(file), options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        if isinstance(error, EOFError):
            raise _empty_error(label) from error
        file.seek(0)
        raise undecodable(
            f"{label} is not a video, or is damaged ({error.strerror}): {describe(file.read(64))}; "
            f"expected {_ACCEPTED}"
        ) from error
    with container:
        # An audio file may hold its cover as a video stream.
        covers = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & covers]
        if not streams:
            others = sorted({s.type for s in container.streams})
            raise undecodable(
                f"{label} holds no video track, only {' and '.join(others) or 'a header'}; "
                "give a video, or use the item for another modality"
            )
        stream = streams[0]
        if stream.codec_context is None:
            raise undecodable(
                f"{label} has a codec that the installed FFmpeg cannot decode; convert it to MP4"
            )
        codec = stream.codec_context.codec.name
        if codec not in CODECS:
            raise undecodable(f"{label} has the codec {codec}; convert it to H.264, in an MP4")
        _check_pixels(stream.width, stream.height, label, max_pixels)
        # A frame may be larger than the header says, so the decoder gets the limit too. It counts
        # complete blocks with their borders, hence the margin; decoded frames are checked exactly.
        stream.codec_context.options = {"max_pixels": str(2 * max_pixels + 1_000_000)}
        yield container, stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    for packet in container.demux(stream):
        if packet.size or packet.dts is not None:  # PyAV marks the end by an empty packet
            yield packet


def _scan(container: Any, stream: Any, label: str, sampling: FrameSampling) -> _PacketIndex:
    """Read all packets, decode none."""
    import av

    # Packets are counted because the header's duration may be missing or wrong. A part with an
    # `end` may be in a longer file, so its length is checked later.
    limit = sampling.max_seconds + (sampling.start or 0) if sampling.end is None else math.inf
    times: list[Fraction | None] = []
    keys: list[int] = []
    zero = end = None
    still = 1 / stream.average_rate if stream.average_rate else Fraction(0)
    try:
        for packet in _packets(container, stream):
            # AVI has no presentation times.
            stamp = packet.dts if packet.pts is None else packet.pts
            time = None if stamp is None or packet.is_discard else stamp * stream.time_base
            # Numbers of packets and not times: two packets can have one time.
            if packet.is_keyframe:
                keys.append(len(times))
            times.append(time)
            if time is None:
                continue
            zero = time if zero is None else min(zero, time)
            shown = packet.duration * stream.time_base if packet.duration else still
            end = time + shown if end is None else max(end, time + shown)
            if time - zero > limit:
                raise sampling.too_long_error(label, f"more than {float(time - zero):.1f} s")
    except av.FFmpegError as error:
        time = Fraction(0) if zero is None or end is None else end - zero
        raise _damaged_error(label, time, error.strerror) from error
    if zero is None or end is None:
        raise _empty_error(label)
    return _PacketIndex(
        [None if time is None else time - zero for time in times], keys, zero, end - zero
    )


def _runs(index: _PacketIndex, times: Sequence[Fraction]) -> list[_DecodeRun]:
    """Packets needed for the frames at `times`, which ascend."""
    shown = sorted((time, number) for number, time in enumerate(index.times) if time is not None)
    runs: list[_DecodeRun] = []
    for time in times:
        position = bisect.bisect_right(shown, (time, len(index.times))) - 1
        frame_time, last = shown[max(position, 0)]
        key = bisect.bisect_right(index.keys, last) - 1
        key_time = index.times[index.keys[key]] if key >= 0 else None
        # Open GOP: a frame that follows a key frame in the file and is shown before it depends on
        # the frames before that key frame.
        if key_time is not None and frame_time < key_time:
            key -= 1
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
) -> Frames:
    images: list[Image.Image] = []
    times_shown: list[float] = []
    packets = enumerate(_packets(container, stream))
    for run in _runs(index, times):
        shown = None  # a player shows the last frame until the time of the next one
        shown_at = Fraction(0)
        waiting = list(run.times)
        for frame in _frames(packets, stream, run, index, label):
            _check_pixels(frame.width, frame.height, label, max_pixels)
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None:
                continue
            time = stamp * stream.time_base - index.zero
            while waiting and shown is not None and time > waiting[0]:
                images.append(_to_image(shown, waiting.pop(0), label, max_pixels))
                times_shown.append(float(shown_at))
            shown, shown_at = frame, time
        if shown is None:
            raise _damaged_error(label, run.times[0], "no frame comes out")
        images += [_to_image(shown, time, label, max_pixels) for time in waiting]
        times_shown += [float(shown_at)] * len(waiting)
    return Frames(images, times_shown)


def _frames(
    packets: Iterator[tuple[int, Any]],
    stream: Any,
    run: _DecodeRun,
    index: _PacketIndex,
    label: str,
) -> Iterator[Any]:
    """Frames of a run of packets, in the order in which they are shown."""
    import av

    decoder = stream.codec_context
    number = run.first
    try:
        for number, packet in packets:
            if number >= run.first:
                yield from decoder.decode(packet)
            if number >= run.last:
                break
        # Decoders hold frames back until they know the order; None flushes them, and the next run
        # needs `flush_buffers` to decode again.
        yield from decoder.decode(None)
    except av.FFmpegError as error:
        raise _damaged_error(label, index.times[number] or Fraction(0), error.strerror) from error
    decoder.flush_buffers()


def _to_image(frame: Any, time: Fraction, label: str, max_pixels: int) -> Image.Image:
    if frame.is_corrupt:
        raise _damaged_error(label, time, "the frame is incomplete")
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    if frame.rotation:  # phones record in the sensor's orientation and write the angle beside it
        image = image.rotate(frame.rotation, expand=True)
    return as_rgb(image, name=label, max_pixels=max_pixels)


def _check_pixels(width: int, height: int, label: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise undecodable(
            f"a frame of {label} is {width} x {height} = {width * height:,} pixels, and the limit "
            f"is {max_pixels:,}; make it smaller, or raise max_pixels"
        )


def _empty_error(label: str) -> MediaError:
    return undecodable(f"{label} has a header but no frames; copy or download it again")


def _damaged_error(label: str, time: Fraction, error: str | None) -> MediaError:
    return undecodable(
        f"{label} is damaged {float(time):.2f} s after its start ({error}); copy or download it "
        "again, or leave that part out with `start` and `end`"
    )
