"""Claims about media/video.py: the right frames of a file, or one sentence; nothing in vain."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.frame_sampling import FrameSampling, pick_frames
from multi_token.media.video import decode_video
from multi_token.testing.files import noise_frames, write_video

LIMITS: dict[str, Any] = {"max_seconds": 600.0, "max_frames": 128}
MAX_PIXELS = 10_000
NUM_FRAMES, FPS = 24, 10
FILES = {
    "ramp.mp4": {"codec": "libx264"},
    "groups.mp4": {"codec": "libx264", "g": "6", "bf": "3", "x264-params": "open-gop=1"},
    "ramp.webm": {"codec": "libvpx-vp9"},
    "ramp.mkv": {"codec": "libx264", "g": "5"},
    "ramp.gif": {"codec": "gif"},
    "ramp.avi": {"codec": "mpeg4"},
    "ramp.ts": {"codec": "libx264", "g": "6", "bf": "3"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 2.4 s whose frame i is grey 10 * i."""
    made = tmp_path_factory.mktemp("videos")
    ramp = np.stack([np.full((48, 64, 3), 10 * i, np.uint8) for i in range(NUM_FRAMES)])
    for name, options in FILES.items():
        write_video(made / name, ramp, fps=FPS, **options)
    return made


def decode(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS, **options: Any) -> Any:
    sampling = FrameSampling(**{**LIMITS, **options})
    return decode_video(data, sampling, name=name, max_pixels=max_pixels)


def decoded(folder: Path, name: str, **options: Any) -> list[int]:
    """The numbers of the frames that are returned."""
    frames = decode((folder / name).read_bytes(), name=name, **options)
    assert {(f.mode, f.size) for f in frames} == {("RGB", (64, 48))}
    return [round(float(np.asarray(frame).mean()) / 10) for frame in frames]


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        decode(data, **{"num_frames": 4, **options})
    assert caught.value.kind == "undecodable"
    return str(caught.value)


def encoded(image: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


def damaged(data: bytes, number: int) -> bytes:
    """The same file with another beginning of a packet."""
    import av

    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0)]
    start = data.index(packets[number])
    return data[:start] + bytes(byte ^ 0x5A for byte in data[start : start + 8]) + data[start + 8 :]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, NUM_FRAMES, 2 * NUM_FRAMES])
@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_in_the_middle_of_equal_parts(
    folder: Path, name: str, num_frames: int
) -> None:
    taken = decoded(folder, name, num_frames=num_frames)
    assert taken == [int((i + 0.5) / num_frames * NUM_FRAMES) for i in range(num_frames)]


@pytest.mark.parametrize("name", FILES)
def test_start_and_end_choose_the_part(folder: Path, name: str) -> None:
    assert decoded(folder, name, num_frames=3, start=1.0, end=1.6) == [11, 13, 15]
    assert decoded(folder, name, num_frames=2, end=0.4) == [1, 3]
    assert decoded(folder, name, num_frames=1, start=2.3) == [23]


def test_frames_a_second_are_as_many_as_there_are_whole_ones(folder: Path) -> None:
    assert decoded(folder, "ramp.mp4", fps=5.0) == list(range(1, 24, 2))
    assert decoded(folder, "ramp.mp4", fps=1.0) == [5, 15]
    assert decoded(folder, "ramp.mp4", fps=0.1) == [12], "one of a part that is shorter than that"


def test_more_frames_a_second_than_max_frames_are_spread_evenly(folder: Path) -> None:
    even = decoded(folder, "ramp.mp4", num_frames=6)
    assert decoded(folder, "ramp.mp4", fps=10.0, max_frames=6) == even


def test_times_are_middles_of_their_parts() -> None:
    section = Fraction(1), Fraction(3)
    halves = [Fraction(5, 4), Fraction(7, 4), Fraction(9, 4), Fraction(11, 4)]
    assert FrameSampling(fps=2.0, max_frames=8).spread(*section) == halves
    assert FrameSampling(num_frames=4, max_frames=8).spread(*section) == halves


def test_an_end_a_little_after_the_last_frame_is_the_last_frame(folder: Path) -> None:
    assert decoded(folder, "ramp.mp4", num_frames=2, start=2.0, end=3.0) == [21, 23]


def test_the_same_bytes_give_the_same_frames(folder: Path) -> None:
    data = (folder / "groups.mp4").read_bytes()
    once, again = (decode(data, num_frames=5) for _ in range(2))
    assert [f.tobytes() for f in once] == [f.tobytes() for f in again]


def test_a_gif_with_moving_parts_is_drawn_as_pillow_draws_it() -> None:
    frames = []
    for i in range(6):
        frame = Image.new("RGB", (40, 30), "white")
        frame.paste((255, 0, 0), (5 * i, 5, 5 * i + 8, 20))
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    taken = decode(buffer.getvalue(), num_frames=6)
    assert [f.tobytes() for f in taken] == [f.tobytes() for f in frames]


def test_transparent_parts_of_a_gif_lie_over_white() -> None:
    frames = [Image.new("P", (40, 30), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0])
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], transparency=0)
    first = decode(buffer.getvalue(), num_frames=2)[0]
    assert first.getpixel((0, 0)) == (255, 255, 255)


def test_a_still_gif_is_a_video_of_one_frame() -> None:
    still = encoded(Image.new("RGB", (40, 30), "red"), "GIF")
    assert len(decode(still, num_frames=3)) == 3


def test_a_video_of_a_turned_phone_is_upright(folder: Path) -> None:
    upright = np.zeros((48, 64, 3), np.uint8)
    upright[:24, :32] = 255
    data = Path(write_video(folder / "turned.mp4", np.stack([upright] * 3))).read_bytes()
    unit, one, end = bytes(4), bytes.fromhex("00010000"), bytes.fromhex("40000000")
    identity = one + unit * 3 + one + unit * 3 + end
    quarter = unit + one + unit + bytes.fromhex("ffff0000") + unit * 4 + end  # clockwise
    head = data.index(b"tkhd")
    turned = data[:head] + data[head:].replace(identity, quarter, 1)
    assert turned != data
    (frame,) = decode(turned, num_frames=1)
    values = np.asarray(frame).mean(-1)
    assert values.shape == (64, 48)
    assert values[:30, 26:].min() > 200 and values[34:].max() < 50


def test_only_packets_that_a_wanted_frame_is_made_of_are_decoded(tmp_path: Path) -> None:
    write_video(tmp_path / "noise.mkv", noise_frames(24), g="6", bf="0")
    data = (tmp_path / "noise.mkv").read_bytes()
    broken = damaged(data, 14)  # in the third group of six
    assert "is damaged 1.40 s after its start" in refusal(broken, num_frames=24)
    for part in ({"end": 1.2}, {"start": 1.8}):
        whole, around = (decode(d, num_frames=3, **part) for d in (data, broken))
        assert [f.tobytes() for f in whole] == [f.tobytes() for f in around]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_damaged_frame_in_the_middle_is_named(tmp_path: Path, name: str, codec: str) -> None:
    data = Path(write_video(tmp_path / name, noise_frames(24), codec=codec)).read_bytes()
    sentence = refusal(damaged(data, 12), name=name, num_frames=24)
    assert sentence.startswith(f"{name} is damaged 1.")
    assert "copy or download it again" in sentence


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (encoded(Image.new("RGB", (8, 8)), "PNG"), "it begins like a PNG image"),
        (encoded(Image.new("RGB", (8, 8)), "JPEG"), "begins like a JPEG image"),
        (encoded(Image.new("RGB", (8, 8)), "WEBP"), "begins like a RIFF file"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40), "begins like a RIFF file"),
        (b"What is this?\n" * 40, "its first bytes are b'What is this'"),
        (bytes(500), "expected MP4, MOV"),
    ],
)
def test_what_is_not_a_video_is_named(data: bytes, reason: str) -> None:
    sentence = refusal(data, name="thing")
    assert sentence.startswith("thing ") and reason in sentence


def test_a_playlist_opens_no_other_file(folder: Path) -> None:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:3", "#EXTINF:2.4,", str(folder / "ramp.ts")]
    playlist = "\n".join([*lines, "#EXT-X-ENDLIST", ""])
    assert "a playlist, which only names videos" in refusal(playlist.encode())
    assert "is not a video" in refusal(f"ffconcat version 1.0\nfile {folder}/ramp.ts\n".encode())


def test_a_sound_file_holds_no_video_track(tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        stream: Any = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    sentence = refusal((tmp_path / "sound.m4a").read_bytes())
    assert "holds no video track, only audio" in sentence


def test_a_header_without_frames_is_refused(tmp_path: Path) -> None:
    write_video(tmp_path / "none.webm", noise_frames(0), codec="libvpx-vp9")
    assert "has a header but no frames" in refusal((tmp_path / "none.webm").read_bytes())
    write_video(tmp_path / "none.mp4", noise_frames(0))
    assert "no video track, only a header" in refusal((tmp_path / "none.mp4").read_bytes())


def test_a_file_that_was_cut_off_is_refused(folder: Path) -> None:
    data = (folder / "ramp.webm").read_bytes()
    assert "its header promises 2.4 s, and it ends after" in refusal(data[: len(data) // 2])
    data = (folder / "ramp.mp4").read_bytes()
    assert "is not a video" in refusal(data[: len(data) // 2])


def test_a_long_video_is_refused_by_its_header_before_a_frame_is_read(folder: Path) -> None:
    data = (folder / "ramp.mp4").read_bytes()
    # how long a frame is shown becomes 1,500 s instead of 0.1 s, and no frame is left
    table = data.index(b"stts") + 12
    assert data[table : table + 8] == (24).to_bytes(4, "big") + (1024).to_bytes(4, "big")
    long = data[: table + 4] + (1024 * 15_000).to_bytes(4, "big") + data[table + 8 :]
    body, head = long.index(b"mdat") + 4, long.index(b"moov") - 4
    unreadable = long[:body] + bytes(head - body) + long[head:]
    assert "1500.0 s to read, and the limit is 600 s" in refusal(unreadable)


def test_a_long_video_without_a_duration_is_refused_while_it_is_read(folder: Path) -> None:
    import av

    # a live recording: its length was unknown
    with av.open(str(folder / "ramp.mkv")) as source, io.BytesIO() as buffer:
        with av.open(buffer, "w", format="matroska", options={"live": "1"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None or packet.pts is not None:
                    packet.stream = stream
                    target.mux(packet)
        data = buffer.getvalue()
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None
    assert len(decode(data, num_frames=4)) == 4
    assert "the video has more than 1." in refusal(data, max_seconds=1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_seconds": 2.0}, "2.4 s to read, and the limit is 2 s; give `start` and `end`"),
        ({"start": 0.2, "max_seconds": 2.0}, "2.2 s to read"),
        ({"max_pixels": 3071}, "64 x 48 = 3,072 pixels, and the limit is 3,071"),
        ({"start": 1.5, "end": 1.5}, "from 1.5 s to 1.5 s; `start` must be 0 or more"),
        ({"start": -1.0}, "from -1 s"),
        ({"start": 2.4}, "is 2.40 s long, and the row starts at 2.4 s"),
        ({"end": 9.0}, "is 2.40 s long, and the row ends at 9 s"),
    ],
)
def test_limits_and_times_that_cannot_be_are_named(
    folder: Path, options: dict[str, Any], reason: str
) -> None:
    for name in ("ramp.mp4", "ramp.webm"):
        assert reason in refusal((folder / name).read_bytes(), **options)


def test_a_short_part_of_a_long_video_is_read(folder: Path) -> None:
    assert decoded(folder, "ramp.mp4", num_frames=1, start=1.0, end=1.5, max_seconds=0.5) == [12]


def test_frames_in_a_list_are_chosen_as_those_of_a_file() -> None:
    frames = list(range(24))

    def pick(frames: list[int], *, rate: float | None = None, **options: Any) -> list[int]:
        return pick_frames(
            frames, FrameSampling(max_seconds=3.0, max_frames=12, **options), rate=rate
        )

    assert pick(frames, num_frames=3) == [4, 12, 20]
    assert pick([7], num_frames=3) == [7, 7, 7]
    assert pick(frames, rate=10.0, fps=5.0) == list(range(1, 24, 2))
    assert pick(frames, rate=10.0, num_frames=3, start=1.0, end=1.6) == [11, 13, 15]
    with pytest.raises(MediaError, match="has no times, which `fps`, `start` and `end` need"):
        pick(frames, fps=1.0)
    with pytest.raises(MediaError, match="24.0 s to read, and the limit is 3 s"):
        pick(frames, num_frames=3, rate=1.0)
    with pytest.raises(MediaError, match="is empty"):
        pick([], num_frames=3)
