"""Packed bytes (gzip, ZIP) -> their content, within a limit, or a MediaError."""

from __future__ import annotations

import io
import re
import zipfile
import zlib

from multi_token.media.errors import DAMAGE, undecodable

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
_PADDING = re.compile(rb"\0*(?=\x1f\x8b)")
"""Zeros before a member of a gzip file."""
_BLOCK = 1 << 13
"""Packed bytes that are unpacked together: the least that a member, however small, costs."""


def gunzip(data: bytes, label: str, max_bytes: int) -> bytes:
    """Return the content of a gzip file; other bytes are returned as they are.

    Raises MediaError for a damaged file, and for one that unpacks to more than `max_bytes`.
    """
    if not data.startswith(GZIP_MAGIC):
        return data
    pieces: list[bytes] = []
    at, num_left = 0, max_bytes + 1
    try:
        # A file may have several members, as those of bgzip do: thousands, of some KiB each.
        while num_left > 0 and (padding := _PADDING.match(data, at)):
            at = padding.end()
            unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
            while num_left > 0 and not unpacker.eof:
                # In blocks: `unused_data` is a copy of what is given beyond the member's end.
                block = data[at : at + _BLOCK]
                if not block:
                    raise zlib.error("its end is missing")
                pieces.append(unpacker.decompress(block, num_left))
                num_left -= len(pieces[-1])
                at += len(block) - len(unpacker.unused_data)
    except zlib.error as error:
        raise undecodable(
            f"{label} is a gzip file that is truncated or damaged ({error}); copy or download it "
            "again"
        ) from None
    if num_left <= 0:
        raise undecodable(f"{label} unpacks to more than {max_bytes:,} bytes, the limit")
    return b"".join(pieces)


def unzip(data: bytes, label: str, max_bytes: int) -> dict[str, bytes]:
    """Return the files in a ZIP archive by name, sorted.

    Raises MediaError for a damaged archive, and for one that unpacks to more than `max_bytes`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            total = sum(info.file_size for info in files.values())
            if total > max_bytes:
                raise undecodable(
                    f"{label} unpacks to {total:,} bytes, and the limit is {max_bytes:,}"
                )
            # `read` stops at the size that the archive states.
            return {name: archive.read(files[name]) for name in sorted(files)}
    except (zipfile.BadZipFile, NotImplementedError, *DAMAGE) as error:
        raise undecodable(
            f"{label} is a ZIP archive that is truncated or damaged ({error}); copy or download it "
            "again"
        ) from None
