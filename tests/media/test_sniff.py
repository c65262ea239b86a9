"""media/sniff.py: what bytes begin like, for files that other programs wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from multi_token.errors import MediaError
from multi_token.media.sniff import sniff_kind
from multi_token.testing.files import noise_frames, write_tone, write_video


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_images_are_images_and_animated_ones_too(form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this build of Pillow writes no {form}")
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    one = io.BytesIO()
    frames[0].save(one, form)
    assert sniff_kind(one.getvalue()) == "image"
    if form in ("GIF", "WEBP"):
        several = io.BytesIO()
        frames[0].save(several, form, save_all=True, append_images=frames[1:])
        assert sniff_kind(several.getvalue()) == "image"


@pytest.mark.parametrize(
    ("form", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("RF64", "PCM_16"),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", None),
        ("AU", None),
        ("CAF", None),
    ],
)
def test_sounds_are_audio(tmp_path: Path, form: str, subtype: str | None) -> None:
    path = write_tone(tmp_path / "tone", 0.3, 48_000, format=form, subtype=subtype)
    assert sniff_kind(Path(path).read_bytes()) == "audio"


def test_an_mp3_without_tags_is_audio(tmp_path: Path) -> None:
    data = Path(write_tone(tmp_path / "tone", 0.3, 48_000, format="MP3")).read_bytes()
    # The first frame, after the tags and padding of the encoder.
    starts = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] & 0xFE == 0xFA]
    assert starts
    assert sniff_kind(data[starts[0] :]) == "audio"


@pytest.mark.parametrize(
    ("name", "codec", "kind"),
    [
        ("clip.mp4", "libx264", "video"),
        ("clip.mov", "libx264", "video"),
        ("clip.webm", "libvpx-vp9", "video"),
        ("clip.mkv", "libx264", "video"),
        ("clip.avi", "mpeg4", "video"),
        ("clip.flv", "flv", "video"),
        ("clip.mpg", "mpeg1video", "video"),
        ("clip.wmv", "wmv2", "video"),
        ("clip.gif", "gif", "image"),
    ],
)
def test_videos_are_video(tmp_path: Path, name: str, codec: str, kind: str) -> None:
    path = write_video(tmp_path / name, noise_frames(4), fps=25, codec=codec)
    assert sniff_kind(Path(path).read_bytes()) == kind


def test_a_container_with_the_brand_of_a_sound_is_audio(tmp_path: Path) -> None:
    import av

    path = tmp_path / "tone.m4a"
    with av.open(str(path), "w", format="ipod") as container:
        stream: Any = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 48_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert sniff_kind(path.read_bytes()) == "audio"


@pytest.mark.parametrize(
    "text", ["a", "BMW and GIF", "Ü" * 5000, "\ufeffwith a mark", "two\r\n\tlines", "<html>", "{}"]
)
def test_utf8_is_text(text: str) -> None:
    assert sniff_kind(text.encode()) == "text"
    assert sniff_kind(b"x" + text.encode()) == "text"  # wherever the first 4096 bytes cut a letter


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"^a\.bin is empty"),
        (b"%PDF-1.7 ...", "begins like a PDF document"),
        (b"PK\x03\x04....", "begins like a ZIP archive"),
        (b"\x93NUMPY\x01\x00", "begins like a NumPy array"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        ("ü".encode("latin-1"), "its first bytes are b'.xfc'"),
        (b"a\x00b", "is not an image, audio, video or UTF-8 text"),
        (b"\xff\xff\xff\xff", "its first bytes are"),
        (b"\xff\xfb", "its first bytes are"),
        (b"BM\x00\x00", "its first bytes are"),
    ],
)
def test_anything_else_is_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(MediaError, match=sentence) as caught:
        sniff_kind(data, name="a.bin")
    assert caught.value.kind == "undecodable"
