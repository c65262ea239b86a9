"""Packed bytes (gzip, ZIP) -> their content, within a limit, or a MediaError."""

from __future__ import annotations

import io
import zipfile
import zlib

from multi_token.media.errors import DAMAGE, undecodable

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"


def gunzip(data: bytes, label: str, max_bytes: int) -> bytes:
    """Return the content of a gzip file; other bytes are returned as they are.

    Raises MediaError for a damaged file, and for one that unpacks to more than `max_bytes`.
    """
    if not data.startswith(GZIP_MAGIC):
        return data
    pieces: list[bytes] = []
    num_left = max_bytes + 1
    try:
        # A file may have several members, as those of bgzip do.
        while data.startswith(GZIP_MAGIC) and num_left > 0:
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
