"""Bytes -> one upright RGB image, or a MediaError."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from multi_token.media.errors import DAMAGE, undecodable
from multi_token.media.sniff import describe

# A closed list, because PIL's registry also holds formats that start other programs (EPS runs
# Ghostscript) and formats that are not fuzzed. All of these are read from memory, in the process.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_PIXELS = 89_478_485
"""Default limit; PIL's own for a warning about decompression bombs."""
MAX_ASPECT = 300
"""Largest ratio of the sides. Processors scale the short side to that of their encoder, so a line
of pixels would become gigabytes."""

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
"""EXIF orientations that swap width and height."""
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_DAMAGE = (*DAMAGE, Image.DecompressionBombError)


def decode_image(data: bytes, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in `data`, decoded: upright, RGB, over white where it is transparent.

    Palettes, greys, CMYK and 16 bits are converted; an animation gives its first frame.

    Raises:
        MediaError: The bytes are no image, are damaged or over a limit; `name` opens the message.
    """
    return as_rgb(_open(io.BytesIO(data), name or "the image"), name=name, max_pixels=max_pixels)


def as_rgb(image: Image.Image, *, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Do the same for an open PIL image, such as one from `datasets` or a notebook."""
    label = name or "the image"
    _check_size(image, label, max_pixels)
    width, height = image.size
    try:
        image.load()
        return _apply_orientation(_to_rgb(image, label), image)
    except _DAMAGE as error:
        raise undecodable(
            f"{label} ({image.format or image.mode}, {width} x {height} pixels) is truncated "
            f"or damaged ({error}); copy or download it again"
        ) from error


def read_size(
    file: BinaryIO, *, name: str = "", max_pixels: int = MAX_PIXELS
) -> tuple[int, int] | None:
    """Return width and height that `decode_image` would give of a file, from its header.

    None if only decoding gives the rotation: a PNG with metadata after its pixels. Raises
    MediaError if the header is not that of an image, or the image is over a limit.
    """
    label = name or "the image"
    image = _open(file, label)
    _check_size(image, label, max_pixels)
    if image.format == "TIFF":
        return image.size  # PIL rotates a TIFF while it decodes, and reports the rotated size
    if image.format == "PNG" and not _ends_with_pixels(file):
        return None
    # The base class's method: that of PNG would decode the pixels to find metadata after them.
    swapped = _orientation(Image.Image.getexif, image) in _SWAPPED_SIDES
    width, height = image.size
    return (height, width) if swapped else (width, height)


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
        file.seek(size + 4, os.SEEK_CUR)  # data and checksum
    return False


def _check_size(image: Image.Image, label: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise undecodable(
            f"{label} is {width} x {height} = {width * height:,} pixels, and the limit is "
            f"{max_pixels:,}; make it smaller, or raise max_pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise undecodable(
            f"{label} is {width} x {height} pixels, a line rather than an image: one side may be "
            f"{MAX_ASPECT} times as long as the other; crop it"
        )


def _open(file: BinaryIO, label: str) -> Image.Image:
    """Open an image by its header; no pixel is decoded."""
    # Not `Image.open`, which warns or raises by a limit that is global in PIL; the limit here is
    # the caller's. `Image.OPEN` is the table that `Image.open` goes through.
    start = file.read(64)
    if not start:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    Image.init()
    prefix = start[:16]
    damage: Exception | None = None
    # In this order: JPEG and PNG are nearly all images of a data set.
    for name in FORMATS:
        if name not in Image.OPEN:  # AVIF and JPEG2000 are not in every build of PIL
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a string names what this build lacks
            continue
        # Plug-ins read on from where the last one stopped.
        file.seek(0)
        try:
            return factory(file, "")
        except _DAMAGE as error:
            damage = error
    if damage is not None and not isinstance(damage, UnidentifiedImageError):
        raise undecodable(
            f"{label} begins like an image, but its header is truncated or damaged ({damage}); "
            "copy or download it again"
        ) from damage
    raise undecodable(
        f"{label} is not an image: {describe(start)}; expected one of {', '.join(FORMATS)}"
    )


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    if image.mode.startswith("I"):
        return _integers_to_uint8(image, label)
    if image.mode == "F":
        raise undecodable(
            f"{label} holds floating-point numbers, whose black and white are unknown; "
            "save it with 8 or 16 bits"
        )
    # White, as on a page: a black ground hides black drawings.
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _integers_to_uint8(image: Image.Image, label: str) -> Image.Image:
    # convert("RGB") would clip everything above 255 to white instead of scaling it.
    import numpy as np

    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise undecodable(
            f"{label} holds 32-bit integers from {values.min()} to {values.max()}, whose black and "
            "white are unknown; save it with 8 or 16 bits"
        )
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def _apply_orientation(rgb: Image.Image, image: Image.Image) -> Image.Image:
    turn = _NO_ROTATION.get(_orientation(type(image).getexif, image))
    upright = rgb if turn is None else rgb.transpose(turn)
    # An image processor that reads EXIF would rotate a second time.
    upright.info = {}
    return upright


def _orientation(read_exif: Callable[[Any], Image.Exif], image: Image.Image) -> int:
    try:
        return read_exif(image).get(_ORIENTATION, 1)
    except _DAMAGE:
        # Viewers show an image with a broken EXIF block unrotated.
        return 1
