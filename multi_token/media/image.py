"""Bytes in, one upright RGB image out, or one sentence saying why not."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from multi_token.media.errors import undecodable

# A list of our own, because PIL's whole registry holds formats that start other programs (EPS runs
# Ghostscript) and formats nobody fuzzes. All of these are read from memory, inside the process.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_ASPECT = 300
"""Times that one side may be as long as the other. Processors scale the short side to that of their
encoder, and a line of pixels would become gigabytes."""

_ORIENTATION = 0x0112
_NO_ROTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED_SIDES = (5, 6, 7, 8)
"""Orientations whose width is the height of what is upright."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# what PIL's plug-ins raise on damaged bytes; found by tests that damage bytes
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    EOFError,
    RuntimeError,  # AVIF
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML text"),
    (b"%pdf", "a PDF document"),
    (b"%!ps", "a PostScript document"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
    (b"\x93numpy", "a NumPy array"),
    (b"riff", "a RIFF file (WAV, AVI or WebP)"),
    (b"id3", "an MP3"),
    (b"oggs", "an Ogg file"),
    (b"{", "JSON text"),
)


def decode_image(
    data: bytes, *, name: str = "", max_pixels: int = 89_478_485
) -> Image.Image:  # RGB, fully in memory
    """The image in `data`, upright, RGB, over white where it is transparent.

    Palettes, greys, CMYK and 16 bits are converted; an animation gives its first frame. `name`
    opens the error message. Raises `MediaError(kind="undecodable")`.
    """
    picture = _open(io.BytesIO(data), name or "the picture")
    return as_rgb(picture, name=name, max_pixels=max_pixels)


def as_rgb(
    picture: Image.Image, *, name: str = "", max_pixels: int = 89_478_485
) -> Image.Image:  # RGB, fully in memory
    """The same for an image that is open already; one from `datasets` or a notebook, say."""
    label = name or "the picture"
    _check_size(picture, label, max_pixels)
    width, height = picture.size
    try:
        picture.load()
        return _apply_orientation(_to_rgb(picture, label), picture)
    except _DAMAGE as error:
        raise undecodable(
            f"{label} ({picture.format or picture.mode}, {width} x {height} pixels) is truncated "
            f"or damaged ({error}); copy or download it again"
        ) from error


def read_size(
    file: BinaryIO, *, name: str = "", max_pixels: int = 89_478_485
) -> tuple[int, int] | None:
    """Width and height of the image that `decode_image` would make of a file, from its header.

    None where only decoding tells how it is turned: a PNG that says something behind its pixels.
    Raises MediaError for what the header shows to be no image, or over a limit.
    """
    label = name or "the picture"
    picture = _open(file, label)
    _check_size(picture, label, max_pixels)
    if picture.format == "TIFF":
        return picture.size  # PIL turns it while it decodes, and says so before
    if picture.format == "PNG" and not _ends_with_pixels(file):
        return None
    # the base class's: that of PNG would decode to see whether more comes behind the pixels
    lies = _orientation(Image.Image.getexif, picture) in _SWAPPED_SIDES
    width, height = picture.size
    return (height, width) if lies else (width, height)


def _ends_with_pixels(file: BinaryIO) -> bool:
    """Return True if a PNG's metadata is before its pixels and no pixels are missing."""
    file.seek(len(_PNG_SIGNATURE))
    seen = False
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return seen
        if seen and kind != b"IDAT":
            return False
        seen = seen or kind == b"IDAT"
        file.seek(size + 4, os.SEEK_CUR)  # behind its checksum
    return False


def _check_size(picture: Image.Image, label: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise undecodable(
            f"{label} is {width} x {height} = {width * height:,} pixels, and the limit is "
            f"{max_pixels:,}; make it smaller, or raise max_pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise undecodable(
            f"{label} is {width} x {height} pixels, a line rather than a picture: one side may be "
            f"{MAX_ASPECT} times as long as the other; cut it"
        )


def _open(file: BinaryIO, label: str) -> Image.Image:
    """The header only.

    Not `Image.open`: that compares the size with a global limit of PIL and warns or raises by it,
    and the limit here is the caller's. `Image.OPEN` is the table that `Image.open` walks.
    """
    start = file.read(64)
    if not start:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    Image.init()
    prefix = start[:16]
    damage: Exception | None = None
    for name in FORMATS:
        if name not in Image.OPEN:  # AVIF and JPEG2000 are not in every build of PIL
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a text says what this build of PIL lacks
            continue
        file.seek(0)
        try:
            return factory(file, "")
        except _DAMAGE as error:
            damage = error
    if damage is not None and not isinstance(damage, UnidentifiedImageError):
        raise undecodable(
            f"{label} begins like a picture, but its header is truncated or damaged ({damage}); "
            "copy or download it again"
        ) from damage
    raise undecodable(
        f"{label} is not a picture: {_describe(start)}; expected one of {', '.join(FORMATS)}"
    )


def _describe(data: bytes) -> str:
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return f"it begins like {what}"
    return f"its first bytes are {data[:12]!r}"


def _to_rgb(picture: Image.Image, label: str) -> Image.Image:
    if picture.mode.startswith("I"):
        return _integers_to_uint8(picture, label)
    if picture.mode == "F":
        raise undecodable(
            f"{label} holds floating-point numbers, whose black and white are unknown; "
            "save it with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _integers_to_uint8(picture: Image.Image, label: str) -> Image.Image:
    # convert("RGB") would cut everything above 255 to white instead of scaling it
    import numpy as np

    values = np.asarray(picture)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise undecodable(
            f"{label} holds 32-bit integers from {values.min()} to {values.max()}, whose black and "
            "white are unknown; save it with 8 or 16 bits"
        )
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def _apply_orientation(rgb: Image.Image, picture: Image.Image) -> Image.Image:
    turn = _NO_ROTATION.get(_orientation(type(picture).getexif, picture))
    upright = rgb if turn is None else rgb.transpose(turn)
    # with its EXIF block left in, an image processor that turns by it would turn a second time
    upright.info = {}
    return upright


def _orientation(read_exif: Callable[[Any], Image.Exif], picture: Image.Image) -> int:
    try:
        return read_exif(picture).get(_ORIENTATION, 1)
    except _DAMAGE:
        # viewers show an image whose EXIF block is broken as it lies, and so do we
        return 1
