"""Decompression bombs: images, audio and videos of few bytes that decode to many."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multi_token.errors import MediaError
from multi_token.testing.audio import tone
from multi_token.testing.video import noise_frames, write_video
from tests.serve.untrusted import MIB, little_memory, prepare, refusal

pytestmark = pytest.mark.slow

# --- images


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """A grey image with any size in its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * min(height, 100_000_000 // (width + 1))), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def gif(num_frames: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\xff\x00\x00\x00\xff\x00"
    one = b"\x21\xf9\x04\x00\x01\x00\x00\x00\x2c\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02"
    frames = [one + bytes([0x44 if n == 0 else 0x4C, 0x01, 0x00]) for n in range(num_frames)]
    return head + b"".join(frames) + b"\x3b"


def test_an_image_of_65500_by_65500_is_refused_by_its_header(
    all_modalities: dict[str, Any],
) -> None:
    bomb = png(65_500, 65_500)
    with little_memory(2):
        assert "65500 x 65500" in refusal(all_modalities["image"], bomb)
    assert len(bomb) < MIB


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3, 3), (3, 50), (2, 2)])
def test_a_tiny_image_is_decoded(all_modalities: dict[str, Any], size: tuple[int, int]) -> None:
    pixels = prepare(all_modalities["image"], png(*size)).inputs["pixel_values"]
    assert torch.equal(pixels, prepare(all_modalities["image"], png(64, 64)).inputs["pixel_values"])


@pytest.mark.parametrize("size", [(1, 301), (90_000, 1), (2, 500_000)])
def test_a_line_of_pixels_is_refused(all_modalities: dict[str, Any], size: tuple[int, int]) -> None:
    """Scaled so that its short side fits an encoder, the image would take gigabytes."""
    with little_memory(4):
        assert "a line rather than a" in refusal(all_modalities["image"], png(*size))


def test_of_10000_frames_the_first_is_decoded(all_modalities: dict[str, Any]) -> None:
    with little_memory(4):
        many = prepare(all_modalities["image"], gif(10_000))
    assert torch.equal(
        many.inputs["pixel_values"], prepare(all_modalities["image"], gif(1)).inputs["pixel_values"]
    )


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_a_bomb_in_the_metadata_of_an_image_is_not_unpacked(
    all_modalities: dict[str, Any], kind: bytes
) -> None:
    packed_mib = zlib.compress(bytes(100 * MIB), 9)
    start = b"a\x00\x01\x00\x00\x00" if kind == b"iTXt" else b"a\x00\x00"
    try:
        with little_memory(8):
            prepare(all_modalities["image"], png(8, 8, chunk(kind, start + packed_mib)))
    except MediaError:
        pass  # a refusal is as good


def test_formats_that_start_programs_or_hold_others_are_not_opened(
    all_modalities: dict[str, Any],
) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    psd = b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(12)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for data in (
        eps,
        psd,
        svg,
        b"\x00\x00\x01\x00\x01\x00" + bytes(40),
        b"",
        b"MZ",
        png(8, 8)[:45],
    ):
        refusal(all_modalities["image"], data)


# --- audio


def wav(num_channels: int, rate: int, num_frames: int, said_frames: int | None = None) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(num_channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        samples = (tone(num_frames / 8_000, 8_000) * 9_000).astype("<i2")[:num_frames]
        out.writeframes(np.repeat(samples, num_channels).tobytes())
    data = bytearray(file.getvalue())
    if said_frames is not None:
        size = min(said_frames * num_channels * 2, 2**32 - 1)
        data[40:44] = struct.pack("<I", size)
        data[4:8] = struct.pack("<I", min(size + 36, 2**32 - 1))
    return bytes(data)


@pytest.mark.parametrize("name", ["speech", "sound"])
def test_audio_over_the_limit_is_refused(all_modalities: dict[str, Any], name: str) -> None:
    assert prepare(all_modalities[name], wav(1, 8_000, 8_000)).num_features > 0
    assert "the limit is 3 s" in refusal(all_modalities[name], wav(1, 8_000, 25_000))


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "OPUS"), ("FLAC", "PCM_16")])
def test_ten_minutes_in_few_bytes_are_refused_before_they_are_decoded(
    all_modalities: dict[str, Any], kind: str, subtype: str
) -> None:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, np.zeros(600 * 8_000, np.float32), 8_000, subtype, format=kind)
    data = file.getvalue()
    assert len(data) < MIB
    with little_memory(2):
        assert "the limit is 3 s" in refusal(all_modalities["speech"], data)


@pytest.mark.parametrize("said", [2**31, 2**30, 2**24, 0])
def test_a_header_that_lies_about_its_length_costs_nothing(
    all_modalities: dict[str, Any], said: int
) -> None:
    with little_memory(16):
        try:
            prepare(all_modalities["speech"], wav(1, 8_000, 8_000, said))
        except MediaError:
            refusal(all_modalities["speech"], wav(1, 8_000, 8_000, said))


@pytest.mark.parametrize("rate", [1, 999, 1_000_000_000])
def test_an_impossible_sampling_rate_is_refused(all_modalities: dict[str, Any], rate: int) -> None:
    refusal(all_modalities["speech"], wav(1, rate, 8_000))


def test_audio_may_have_up_to_eight_channels(all_modalities: dict[str, Any]) -> None:
    assert prepare(all_modalities["speech"], wav(8, 8_000, 8_000)).num_features > 0
    assert "9 channels" in refusal(all_modalities["speech"], wav(9, 8_000, 8_000))
    assert "1,000 channels" in refusal(all_modalities["speech"], wav(1_000, 8_000, 100))


# --- videos


def video_bytes(tmp_path: Path, name: str = "a.mp4", num_frames: int = 20, **options: Any) -> bytes:
    return Path(write_video(tmp_path / name, noise_frames(num_frames), **options)).read_bytes()


def test_a_video_has_limits_of_frames_seconds_and_pixels(
    all_modalities: dict[str, Any], tmp_path: Path
) -> None:
    video = all_modalities["video"]
    data = video_bytes(tmp_path, num_frames=30, fps=15)
    assert prepare(video, data).inputs["pixel_values"].shape[0] == 8  # four frames of each second
    many = video.model_copy(update={"fps": 100.0})
    assert prepare(many, data).inputs["pixel_values"].shape[0] == 16
    assert "the limit is 3 s" in refusal(video, video_bytes(tmp_path, num_frames=40, fps=10))
    # up to 16 frames of 10,000 pixels each
    large = write_video(tmp_path / "large.mp4", noise_frames(4, height=102, width=102))
    assert "102 x 102" in refusal(video, Path(large).read_bytes())


def test_a_codec_that_is_not_on_the_list_is_not_opened(
    all_modalities: dict[str, Any], tmp_path: Path
) -> None:
    data = video_bytes(tmp_path, "a.mkv", codec="jpeg2000")
    assert "jpeg2000" in refusal(all_modalities["video"], data)


def test_a_file_that_names_other_files_is_not_followed(all_modalities: dict[str, Any]) -> None:
    playlists = [
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=video 9 RTP/AVP 96\r\n",
    ]
    for data in playlists:
        for name in ("video", "speech", "image"):
            refusal(all_modalities[name], data)
