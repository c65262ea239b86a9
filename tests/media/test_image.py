"""Claims about media/image.py: every image comes out upright and RGB, or as one sentence."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from multi_token.errors import MediaError
from multi_token.media.image import as_rgb, decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def refusal(data: bytes, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        decode_image(data, **options)
    assert caught.value.kind == "undecodable"
    return str(caught.value)


def noise(width: int = 64, height: int = 48) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size on paper: a signature, a header, and next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "GIF"])
def test_lossless_formats_keep_their_pixels(file_format: str) -> None:
    image = Image.new("RGB", (3, 2), RED)
    image.putpixel((2, 1), BLUE)
    decoded = decode_image(encoded(image, file_format))
    assert (decoded.mode, decoded.size) == ("RGB", (3, 2))
    assert (decoded.getpixel((0, 0)), decoded.getpixel((2, 1))) == (RED, BLUE)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_come_close(file_format: str) -> None:
    decoded = decode_image(encoded(Image.new("RGB", (16, 16), (200, 100, 50)), file_format))
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).mean((0, 1)) - (200, 100, 50)).max() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_for_every_exif_orientation(orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # one corner tells all eight orientations apart
    upright.paste(BLUE, (24, 0, 32, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(stored, exif=exif))
    assert decoded.tobytes() == upright.tobytes()


def test_a_turned_image_forgets_its_exif_so_that_no_processor_rotates_it_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(noise(), "JPEG", exif=exif))
    assert decoded.size == (48, 64)
    assert dict(decoded.getexif()) == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_hide_the_image() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert decode_image(data).size == (64, 48)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_lie_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    decoded = decode_image(encoded(image.convert(mode)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]


def test_half_transparent_colour_is_mixed_with_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))).getpixel((0, 0)) == (
        255,
        127,
        127,
    )


def test_a_palette_with_a_transparent_colour_lies_over_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*GREEN, *BLUE])
    image.putpixel((1, 0), 1)
    decoded = decode_image(encoded(image, transparency=0))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


def test_one_transparent_colour_without_an_alpha_channel_lies_over_white() -> None:
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((1, 0), BLUE)
    decoded = decode_image(encoded(image, transparency=GREEN))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_cut(file_format: str) -> None:
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    decoded = decode_image(encoded(Image.fromarray(values), file_format))
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), WHITE]


def test_black_and_white_and_grey_become_rgb() -> None:
    assert decode_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == WHITE
    assert decode_image(encoded(Image.new("L", (1, 1), 77))).getpixel((0, 0)) == (77, 77, 77)


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = np.asarray(decode_image(encoded(image, "JPEG"))).mean((0, 1))
    assert red > 240 and green < 15 and blue < 15


def test_floats_are_refused_because_their_white_is_unknown() -> None:
    assert "floating-point" in refusal(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    assert decode_image(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_refused_with_a_sentence(file_format: str) -> None:
    data = encoded(noise(), file_format)
    message = refusal(data[: len(data) * 2 // 3], name="a.bin")
    assert message.startswith("a.bin ")
    assert "truncated or damaged" in message


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(
    recwarn: pytest.WarningsRecorder,
) -> None:
    # decoding would fail on the missing data, so this sentence shows that it was not tried
    for width, height in ((20_000, 20_000), (12_000, 10_000), (9_460, 9_460)):
        message = refusal(png_header(width, height), name="big.png")
        assert f"big.png is {width} x {height} = {width * height:,} pixels" in message
        assert "89,478,485" in message
    assert not recwarn.list


def test_the_limit_is_the_callers_and_is_inclusive() -> None:
    data = encoded(noise(10, 10))
    assert decode_image(data, max_pixels=100).size == (10, 10)
    assert "the limit is 99" in refusal(data, max_pixels=99)


def test_a_limit_above_that_of_pil_holds_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(encoded(noise())).size == (64, 48)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 10


def test_an_empty_file_is_refused() -> None:
    assert refusal(b"", name="a.png").startswith("a.png is empty (0 bytes)")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\xef\xbb\xbf  <svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"hello", "b'hello'"),
    ],
)
def test_what_is_not_an_image_is_named_by_how_it_begins(data: bytes, what: str) -> None:
    message = refusal(data)
    assert "is not an image" in message
    assert what in message


def test_formats_that_start_other_programs_are_not_opened() -> None:
    postscript = encoded(noise(), "EPS")
    assert "a PostScript document" in refusal(postscript)


def test_an_open_image_is_treated_like_a_file() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encoded(Image.new("RGBA", (4, 2), (0, 0, 0, 0)), exif=exif)))
    assert as_rgb(turned).size == (2, 4)
    assert as_rgb(turned).getpixel((0, 0)) == WHITE
    with pytest.raises(MediaError, match="the limit is 7"):
        as_rgb(turned, max_pixels=7)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PIL's remarks on damaged metadata
@pytest.mark.parametrize(
    "file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]
)
def test_damaged_bytes_give_an_image_or_a_sentence_and_nothing_else(file_format: str) -> None:
    if not features.check({"AVIF": "avif", "JPEG2000": "jpg_2000"}.get(file_format, "pil")):
        pytest.skip(f"this build of Pillow has no {file_format}")
    chance = random.Random(0)
    whole = encoded(noise(16, 12), file_format)
    num_refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        del data[chance.randint(len(data) // 2, 2 * len(data)) :]
        try:
            assert decode_image(bytes(data), max_pixels=100_000).mode == "RGB"
        except MediaError as error:
            assert error.kind == "undecodable"
            num_refused += 1
    assert num_refused > 0
