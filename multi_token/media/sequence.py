"""Texts of letters (proteins, DNA, SMILES), and their records in FASTA files, or a MediaError."""

from __future__ import annotations

import zlib

from multi_token.media.errors import undecodable
from multi_token.media.sniff import describe
from multi_token.registry import did_you_mean

_GZIP = b"\x1f\x8b"


def gunzip(data: bytes, label: str, max_bytes: int) -> bytes:
    """Return the content of a gzip file; other bytes are returned as they are.

    Raises MediaError for a damaged file, and for one that unpacks to more than `max_bytes`.
    """
    if not data.startswith(_GZIP):
        return data
    pieces: list[bytes] = []
    num_left = max_bytes + 1
    try:
        # A file may have several members, as those of bgzip do.
        while data.startswith(_GZIP) and num_left > 0:
            unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            pieces.append(unpacker.decompress(data, num_left))
            num_left -= len(pieces[-1])
            if num_left > 0 and not unpacker.eof:
                raise zlib.error("its end is missing")
            data = unpacker.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise undecodable(
            f"{label} is a gzip file that is truncated or damaged ({error}); copy or download it "
            "again"
        ) from None
    if num_left <= 0:
        raise undecodable(f"{label} unpacks to more than {max_bytes:,} bytes, the limit")
    return b"".join(pieces)


def read_letters(data: bytes, label: str, *, record: str | None = None) -> str:
    """Return the letters of a record in a FASTA file, or of a plain text.

    Args:
        data: The file; FASTA if its first character is `>`.
        label: Opens error messages.
        record: The first word of the record's header; None for the first record.

    Raises:
        MediaError: The file is no text, or has no such record.
    """
    try:
        text = data.decode("utf-8-sig")
        if "\0" in text:
            raise ValueError
    except ValueError:
        raise undecodable(f"{label} is not a text: {describe(data)}; expected FASTA") from None
    if not text.lstrip().startswith(">"):
        if record is not None:
            raise undecodable(f"{label} is no FASTA file, so it has no record {record!r}")
        return text
    names: list[str] = []
    for entry in text.lstrip()[1:].split("\n>"):
        head, _, body = entry.partition("\n")
        names.append(head.split()[0] if head.split() else "")
        if record is None or names[-1] == record:
            return body
    raise undecodable(
        f"{label} has no record {record!r}{did_you_mean(record or '', names)} "
        f"({len(names):,} records)"
    )
