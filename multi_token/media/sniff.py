"""Kind of a file by its first bytes: image, audio, video or text."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from multi_token.media.errors import undecodable

MediaKind = Literal["image", "audio", "video", "text"]


@dataclass(frozen=True)
class FileKind:
    """Files of one kind, as a chat page offers them.

    `kind`: how a browser treats such a file; `numbers` are parsed there, `file` is sent unseen.
    `noun`: the plural that the page shows. `suffixes`: endings of names, each with its dot.
    """

    kind: Literal["image", "audio", "video", "document", "text", "numbers", "file"]
    noun: str
    suffixes: tuple[str, ...]


FILE_KINDS: Mapping[str, FileKind] = {
    "image": FileKind(
        "image",
        "images",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    ),
    "audio": FileKind(
        "audio",
        "audio files",
        (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".webm"),
    ),
    "video": FileKind(
        "video", "videos", (".mp4", ".webm", ".mov", ".mkv", ".avi", ".mpeg", ".mpg")
    ),
    "document": FileKind("document", "documents", (".pdf", ".txt", ".md", ".html", ".htm")),
    "text": FileKind("text", "texts", (".txt", ".md")),
    "vector": FileKind("numbers", "lists of numbers", (".npy", ".json", ".csv", ".txt")),
    "series": FileKind("numbers", "series of numbers", (".npy", ".json", ".csv", ".txt")),
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
_UNSUPPORTED_SIGNATURES: tuple[tuple[bytes, str], ...] = (  # some of these could pass for a text
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)
NUM_SNIFF_BYTES = 4096
"""So many are looked at, and one more tells whether that was all."""
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)


def sniff_kind(data: bytes, *, name: str = "") -> MediaKind:
    """`image` for PNG, JPEG, GIF, WebP, TIFF, BMP, AVIF, JPEG 2000; `audio` for WAV, FLAC, Ogg,
    MP3, AIFF, AU, CAF, AAC, M4A; `video` for MP4, MOV, WebM, Matroska, AVI, FLV, MPEG, WMV and Ogg
    with images; else `text` for UTF-8.

    A GIF or WebP that moves is an image as well. Raises `MediaError(kind="undecodable")`.
    """
    label = name or "the item"
    if not data:
        raise undecodable(f"{label} is empty (0 bytes); copy or download it again")
    kind = _known_signature(data)
    if kind is not None:
        return kind
    refused = next(
        (what for magic, what in _UNSUPPORTED_SIGNATURES if data.startswith(magic)), None
    )
    if refused is None and _is_text(data):
        return "text"
    raise undecodable(
        f"{label} is not a picture, sound, film or UTF-8 text: "
        + (f"it begins like {refused}" if refused else f"its first bytes are {data[:12]!r}")
    )


def _known_signature(data: bytes) -> MediaKind | None:
    if data.startswith(_IMAGE) or _is_bmp(data):
        return "image"
    if data.startswith(_AUDIO) or _is_mp3(data):
        return "audio"
    if data.startswith(_VIDEO):
        return "video"
    form = data[8:12]
    if data.startswith((b"RIFF", b"RF64", b"riff")):
        riff: dict[bytes, MediaKind] = {b"WEBP": "image", b"AVI ": "video"}
        return riff.get(form, "audio")
    if data.startswith(b"FORM") and form in (b"AIFF", b"AIFC"):
        return "audio"
    if data.startswith(b"OggS"):  # its streams name themselves on the first pages
        return "video" if b"theora" in data[:NUM_SNIFF_BYTES] else "audio"
    if data[4:8] == b"ftyp":  # the brand says what the container is for
        if form in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
            return "image"
        return "audio" if form in (b"M4A ", b"M4B ", b"M4P ") else "video"
    return None


def _is_bmp(data: bytes) -> bool:
    # the two letters alone could begin a text
    return data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS


def _is_mp3(data: bytes) -> bool:
    """Return True if an MP3 frame without tags begins here: sync, a layer, a valid rate."""
    return (
        len(data) > 2
        and data[0] == 0xFF
        and data[1] & 0xE0 == 0xE0
        and data[1] & 0x06 != 0  # the layer
        and data[1] & 0x18 != 0x08  # the version
        and data[2] & 0xF0 != 0xF0  # bits a second
        and data[2] & 0x0C != 0x0C  # samples a second
    )


def _is_text(data: bytes) -> bool:
    try:
        start = codecs.getincrementaldecoder("utf-8")().decode(
            data[:NUM_SNIFF_BYTES], final=len(data) <= NUM_SNIFF_BYTES
        )
    except UnicodeDecodeError:
        return False
    return not any(ord(letter) < 32 and letter not in "\t\n\r\f" for letter in start)
