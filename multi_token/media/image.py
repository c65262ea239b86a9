"""Bytes in, one upright RGB picture out, or one sentence saying why not.

Border: reads no files and knows no encoder; sizes and crops are the modality's.
"""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, UnidentifiedImageError

from multi_token.errors import MediaError

# A list of our own, because PIL's whole registry holds formats that start other programs (EPS runs
# Ghostscript) and formats nobody fuzzes. All of these are read from memory, inside the process.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

MAX_ASPECT = 300
"""Times that one side may be as long as the other. Processors scale the short side to that of their
encoder, and a line of pixels would become gigabytes."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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
    """The picture in `data`, upright, RGB, over white where it is transparent.

    Palettes, greys, CMYK and 16 bits are converted; an animation gives its first frame. `name`
    opens the error message. Raises `MediaError(kind="undecodable")`.
    """
    label = name or "the picture"
    if not data:
        raise _undecodable(f"{label} is empty (0 bytes); copy or download it again")
    return as_rgb(_open(data, label), name=name, max_pixels=max_pixels)


def as_rgb(
    picture: Image.Image, *, name: str = "", max_pixels: int = 89_478_485
) -> Image.Image:  # RGB, fully in memory
    """The same for a picture that is open already; one from `datasets` or a notebook, say."""
    label = name or "the picture"
    width, height = picture.size
    if width * height > max_pixels:
        raise _undecodable(
            f"{label} is {width} x {height} = {width * height:,} pixels, and the limit is "
            f"{max_pixels:,}; make it smaller, or raise max_pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _undecodable(
            f"{label} is {width} x {height} pixels, a line rather than a picture: one side may be "
            f"{MAX_ASPECT} times as long as the other; cut it"
        )
    try:
        picture.load()
        return _upright(_to_rgb(picture, label), picture)
    except _DAMAGE as error:
        raise _undecodable(
            f"{label} ({picture.format or picture.mode}, {width} x {height} pixels) is truncated "
            f"or damaged ({error}); copy or download it again"
        ) from error


def _open(data: bytes, label: str) -> Image.Image:
    """The header only.

    Not `Image.open`: that compares the size with a global limit of PIL and warns or raises by it,
    and the limit here is the caller's. `Image.OPEN` is the table that `Image.open` walks.
    """
    Image.init()
    prefix = data[:16]
    damage: Exception | None = None
    for name in FORMATS:
        if name not in Image.OPEN:  # AVIF and JPEG2000 are not in every build of PIL
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept is None or accept(prefix)
        if not accepted or isinstance(accepted, str):  # a text says what this build of PIL lacks
            continue
        try:
            return factory(io.BytesIO(data), "")
        except _DAMAGE as error:
            damage = error
    if damage is not None and not isinstance(damage, UnidentifiedImageError):
        raise _undecodable(
            f"{label} begins like a picture, but its header is truncated or damaged ({damage}); "
            "copy or download it again"
        ) from damage
    raise _undecodable(
        f"{label} is not a picture: {_describe(data)}; expected one of {', '.join(FORMATS)}"
    )


def _describe(data: bytes) -> str:
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return f"it begins like {what}"
    return f"its first bytes are {data[:12]!r}"


def _to_rgb(picture: Image.Image, label: str) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_integers(picture, label)
    if picture.mode == "F":
        raise _undecodable(
            f"{label} holds floating-point numbers, whose black and white are unknown; "
            "save it with 8 or 16 bits"
        )
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")


def _from_integers(picture: Image.Image, label: str) -> Image.Image:
    # convert("RGB") would cut everything above 255 to white instead of scaling it
    import numpy as np

    values = np.asarray(picture)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise _undecodable(
            f"{label} holds 32-bit integers from {values.min()} to {values.max()}, whose black and "
            "white are unknown; save it with 8 or 16 bits"
        )
    return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")


def _upright(rgb: Image.Image, picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        # viewers show a picture whose EXIF block is broken as it lies, and so do we
        orientation = 1
    turn = _UPRIGHT.get(orientation)
    upright = rgb if turn is None else rgb.transpose(turn)
    # with its EXIF block left in, an image processor that turns by it would turn a second time
    upright.info = {}
    return upright


def _undecodable(message: str) -> MediaError:
    return MediaError(message, kind="undecodable")
