"""Kind of a file by its first bytes: image, audio, video or text; and its format's name."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multi_token.media.errors import undecodable

MediaKind = Literal["image", "audio", "video", "text"]


@dataclass(frozen=True)
class FileKind:
    """Files of one kind, as a chat page offers them.

    `kind`: how a browser treats such a file; it parses `numbers`, and sends a `file` unchanged.
    `noun`: the plural that the page shows. `suffixes`: endings of names, each with its dot.
    """

    kind: Literal["image", "audio", "video", "document", "text", "numbers", "file"]
    noun: str
    suffixes: tuple[str, ...]


def _files(kind: Any, noun: str, suffixes: str) -> FileKind:
    return FileKind(kind, noun, tuple(suffixes.split()))


# `.webm` is in two kinds: browsers record both audio and video into it.
FILE_KINDS: Mapping[str, FileKind] = {
    "image": _files("image", "images", ".png .jpg .jpeg .gif .webp .bmp .tif .tiff .avif"),
    "audio": _files("audio", "audio files", ".wav .mp3 .flac .ogg .opus .m4a .aac .aiff .webm"),
    "video": _files("video", "videos", ".mp4 .webm .mov .mkv .avi .mpeg .mpg"),
    "document": _files("document", "documents", ".pdf .txt .md .html .htm"),
    "text": _files("text", "texts", ".txt .md"),
    "sequence": _files("text", "sequences", ".fasta .fa .faa .fna .txt .smi"),
    "volume": _files("file", "volumes", ".nii .gz .dcm .zip"),
    "vector": _files("numbers", "lists of numbers", ".npy .json .csv .txt"),
    "series": _files("numbers", "series of numbers", ".npy .json .txt"),
    "recording": _files("file", "recordings", ".csv .tsv .parquet .edf .bdf .wav .flac .zip"),
}

_IMAGE: tuple[bytes, ...] = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",  # JPEG
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF, both orders of bytes
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)
_AUDIO: tuple[bytes, ...] = (b"fLaC", b"ID3", b".snd", b"caff", b"\xff\xf1", b"\xff\xf9")
_VIDEO: tuple[bytes, ...] = (
    b"\x1a\x45\xdf\xa3",  # Matroska and WebM
    b"FLV\x01",
    b"\x00\x00\x01\xba",  # MPEG
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # WMV
)
NOT_PROSE: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing"),
    (b"{\\rtf", "a rich text (RTF)"),
    (b"%!ps", "a PostScript document"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
"""Lower-case first bytes of texts that are no document to read, and their names."""
BINARY: tuple[tuple[bytes, str], ...] = (
    (b"\x89png", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"gif8", "a GIF image"),
    (b"ii*\0", "a TIFF image"),
    (b"mm\0*", "a TIFF image"),
    (b"riff", "a RIFF file (WAV, AVI or WebP)"),
    (b"id3", "an MP3"),
    (b"flac", "a FLAC file"),
    (b"oggs", "an Ogg file"),
    (b"%pdf", "a PDF document"),
    (b"pk\x03\x04", "a ZIP archive (.docx, .odt and .epub are such)"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93numpy", "a NumPy array"),
)
_TEXTS: tuple[tuple[bytes, str], ...] = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<?xml", "an XML text"),
    (b"#extm3u", "a playlist, which only names videos"),
    (b"{", "JSON text"),
)
NUM_SNIFF_BYTES = 4096
"""Number of bytes that decide; one more tells if a text ends there."""
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


def sniff_kind(data: bytes, *, name: str = "") -> MediaKind:
    """Return the kind of a file.

    `image` for PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF, JPEG 2000; `audio` for WAV, FLAC, Ogg, MP3,
    AIFF, AU, CAF, AAC, M4A; `video` for MP4, MOV, WebM, Matroska, AVI, FLV, MPEG, WMV and Ogg with
    images; else `text` for UTF-8. An animated GIF or WebP is an image.

    Raises:
        MediaError: The bytes are of no known kind; `name` opens the message.
    """
    label = name or "the item"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    kind = _known_signature(data)
    if kind is not None:
        return kind
    # Both are valid UTF-8 at their beginning, and no text that anyone wrote.
    if not data.startswith((b"%PDF", b"version https://git-lfs")) and _is_text(data):
        return "text"
    raise undecodable(f"{label} is not an image, audio, video or UTF-8 text: {describe(data)}")


def describe(data: bytes) -> str:
    """Return the half of an error message that says what undecodable bytes begin like."""
    name = format_name(data, (*NOT_PROSE, *BINARY, *_TEXTS))
    return f"it begins like {name}" if name else f"its first bytes are {data[:12]!r}"


def format_name(data: bytes, names: Sequence[tuple[bytes, str]]) -> str | None:
    """Return the name of a format by its first bytes, after blanks and in lower case."""
    start = data[:64].lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower()
    return next((name for magic, name in names if start.startswith(magic)), None)


def _known_signature(data: bytes) -> MediaKind | None:
    if data.startswith(_IMAGE) or _is_bmp(data):
        return "image"
    if data.startswith(_AUDIO) or _is_mp3(data):
        return "audio"
    if data.startswith(_VIDEO):
        return "video"
    # RIFF, FORM and ISO containers name their content after the size.
    form = data[8:12]
    if data.startswith((b"RIFF", b"RF64", b"riff")):
        riff: dict[bytes, MediaKind] = {b"WEBP": "image", b"AVI ": "video"}
        return riff.get(form, "audio")
    if data.startswith(b"FORM") and form in (b"AIFF", b"AIFC"):
        return "audio"
    if data.startswith(b"OggS"):  # the first pages name the codec of each stream
        return "video" if b"theora" in data[:NUM_SNIFF_BYTES] else "audio"
    if data[4:8] == b"ftyp":  # one container for all three; the brand names the use
        if form in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
            return "image"
        return "audio" if form in (b"M4A ", b"M4B ", b"M4P ") else "video"
    return None


def _is_bmp(data: bytes) -> bool:
    # "BM" alone could begin a text, so the size of the header has to be a known one.
    return data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS


def _is_mp3(data: bytes) -> bool:
    """Return True if an MP3 frame without tags begins here: sync bits and no reserved value."""
    return (
        len(data) > 2
        and data[0] == 0xFF
        and data[1] & 0xE0 == 0xE0
        and data[1] & 0x06 != 0  # the layer
        and data[1] & 0x18 != 0x08  # the version
        and data[2] & 0xF0 != 0xF0  # the bit rate
        and data[2] & 0x0C != 0x0C  # the sampling rate
    )


def _is_text(data: bytes) -> bool:
    try:
        # An incremental decoder accepts a character that the limit cuts in two.
        start = codecs.getincrementaldecoder("utf-8")().decode(
            data[:NUM_SNIFF_BYTES], final=len(data) <= NUM_SNIFF_BYTES
        )
    except UnicodeDecodeError:
        return False
    return not any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in start)
