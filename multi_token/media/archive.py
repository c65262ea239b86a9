"""Members of .zip and .tar archives by name, with random access by a stored index.

archive -> index_archive -> index file (data/files/index.py writes it) -> Archive -> member
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from multi_token.errors import MediaError
from multi_token.media.errors import missing_file, undecodable

Index = dict[str, "NDArray[Any]"]
"""Arrays by name."""

INDEX_KIND = "archive1"
"""Kind of the index file of an archive; changes with its content."""
_IN_ARCHIVE = re.compile(r"(.+?\.(?:zip|tar))(?:/(.*))?", re.IGNORECASE | re.DOTALL)
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Header before a member of a .zip: signature, length of its name, length of its extra fields."""
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 255
_MAX_HEADER = 1 << 20
"""Bytes of an index file's header that are read: in a damaged one, its length may be anything."""
_DTYPES = {"I64": np.int64, "U64": np.uint64, "U32": np.uint32, "U8": np.uint8}


class Archive:
    """Members of a .zip or an uncompressed .tar, read by name; the last of equal names counts.

    Memory holds the index, which is a mapped file where one is stored, and no object per member.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError, ValueError, tarfile.TarError or zipfile.BadZipFile."""
        self.path = path
        self.is_zip = path.suffix.lower() == ".zip"
        index = read_index(path, INDEX_KIND)
        # no place to store an index: each process then reads the names by itself
        self._index = index_archive(path) if index is None else index
        found = path.stat()
        self.stamp = [str(path), found.st_size, found.st_mtime_ns]
        """Values for JSON that change with the content."""

    def __len__(self) -> int:
        return len(self._index["keys"])

    def read(self, name: str) -> bytes:
        """Return the bytes of a member. Raises MediaError for a missing or damaged one."""
        with self.open(name) as file:
            data = file.read()
        at = self._find(name)
        if self.is_zip and zlib.crc32(data) != int(self._index["checksums"][at]):
            raise self._damaged(name, "its checksum differs")
        return data

    def open(self, name: str) -> BinaryIO:
        """Open a member; a compressed one is read completely. Raises MediaError."""
        at = self._find(name)
        size, method = int(self._index["sizes"][at]), int(self._index["methods"][at])
        # opened for each member: forked workers would share the file position of one handle
        file = self.path.open("rb")
        try:
            start = self._start(file, at, name)
            if method == _STORED:
                return io.BufferedReader(_Part(file, start, size))  # type: ignore[arg-type]
            file.seek(start)
            packed = file.read(int(self._index["packed"][at]))
        except BaseException:
            file.close()
            raise
        file.close()
        if method != _DEFLATED:
            reason = "encrypted" if method == _ENCRYPTED else f"packed by method {method}"
            raise undecodable(
                f"{name} in {self.path} is {reason}, expected a plain .zip; pack it again"
            )
        try:
            # one byte more than it should be shows a member that is larger than it says
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size + 1)
        except zlib.error as error:
            raise self._damaged(name, str(error)) from error
        if len(data) != size:
            raise self._damaged(name, "its size differs")
        return io.BytesIO(data)

    def size(self, name: str) -> int:
        """Return the unpacked size of a member in bytes. Raises MediaError."""
        return int(self._index["sizes"][self._find(name)])

    def _start(self, file: BinaryIO, at: int, name: str) -> int:
        """Return the offset of a member's bytes."""
        offset = int(self._index["offsets"][at])
        if not self.is_zip:
            return offset
        file.seek(offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise self._damaged(name, "it has no header")
        _, num_name, num_extra = _LOCAL_HEADER.unpack(header)
        return offset + _LOCAL_HEADER.size + num_name + num_extra

    def _find(self, name: str) -> int:
        wanted, keys = np.uint64(_key(name)), self._index["keys"]
        # several names may have one key
        for at in range(*(int(np.searchsorted(keys, wanted, side)) for side in ("left", "right"))):
            if self._name(at) == name:
                return at
        like = f", such as {self._name(0)}" if len(self) else ""
        raise missing_file(
            f"no file {name} in {self.path}, which has {len(self):,} files{like}; fix the path in "
            "the row, or name the folder in the archive that paths start from"
        )

    def _name(self, at: int) -> str:
        start, end = self._index["ends"][at : at + 2].tolist()
        return self._index["names"][start:end].tobytes().decode("utf-8", "surrogateescape")

    def _damaged(self, name: str, reason: str) -> MediaError:
        return undecodable(
            f"{name} in {self.path} is damaged or cut short ({reason}); copy the archive again"
        )


class _Part(io.RawIOBase):
    """Part of a file, as a file of its own that can be read."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        num_bytes = max(0, min(len(view), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(num_bytes)
        if len(data) < num_bytes and not data:
            raise OSError("the archive is cut short")
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def split_archive(root: str) -> tuple[Path, str] | None:
    """Split `data/images.zip/train` -> (archive, folder in it); None for a root without archive."""
    match = _IN_ARCHIVE.fullmatch(root)
    if match is None or not Path(match[1]).is_file():
        return None
    return Path(match[1]), match[2] or ""


def member_name(folder: str, name: str) -> str:
    """Return the name of a member, from a path that starts at `folder`. Raises MediaError."""
    whole = posixpath.normpath(posixpath.join(folder, name.replace("\\", "/")))
    if posixpath.isabs(whole) or whole.split("/")[0] == "..":
        raise missing_file(
            f"{name} leads out of the archive that `root` names; name a file in it, from its top"
        )
    return whole


def open_archive(path: Path) -> Archive:
    """Open an archive, once in a process as long as it does not change. Raises MediaError."""
    try:
        found = path.stat()
        return _open_archive(path, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise missing_file(f"{path} cannot be read as an archive: {error}") from error


@lru_cache(maxsize=8)
def _open_archive(path: Path, size: int, time: int) -> Archive:
    return Archive(path)


def index_archive(path: Path, step: Callable[[int], None] = lambda _: None) -> Index:
    """Read the names of all members of an archive.

    `step`: called with the number of bytes of the archive that are done.

    Returns:
        Index with an element for each member, sorted by `keys`, the hashes of names. `offsets` are
        of a member's header in a .zip, and of its content in a .tar.

    Raises:
        OSError, ValueError, tarfile.TarError, zipfile.BadZipFile: the archive cannot be read.
    """
    names: list[bytes] = []
    facts: list[tuple[int, int, int, int, int]] = []
    if path.suffix.lower() == ".tar":
        for name, offset, size in tar_members(path, step):
            names.append(name.removeprefix("./").encode("utf-8", "surrogateescape"))
            facts.append((offset, size, size, _STORED, 0))
    else:
        with zipfile.ZipFile(path) as file:
            for info in file.infolist():
                if info.is_dir():
                    continue
                method = _ENCRYPTED if info.flag_bits & 1 else info.compress_type
                names.append(info.filename.encode("utf-8", "surrogateescape"))
                sizes = info.file_size, info.compress_size
                facts.append((info.header_offset, *sizes, min(method, _ENCRYPTED), info.CRC))
    keys = np.fromiter(map(_key, names), np.uint64, len(names))
    # later members first, so that the last of equal names is found
    order = np.lexsort((-np.arange(len(names)), keys))
    table = np.array(facts, np.int64).reshape(-1, 5)[order]
    names = [names[i] for i in order]
    return {
        "keys": keys[order],
        "names": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.cumsum([0, *map(len, names)]),
        "offsets": table[:, 0].copy(),
        "sizes": table[:, 1].copy(),
        "packed": table[:, 2].copy(),
        "methods": table[:, 3].astype(np.uint8),
        "checksums": table[:, 4].astype(np.uint32),
    }


def tar_members(
    path: Path, step: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the files of an uncompressed .tar, from its headers.

    Raises OSError or tarfile.TarError, also for a tar that is cut short.
    """
    done = 0
    # "r:" refuses compression: offsets into a compressed file are no places to seek to
    with tarfile.open(path, "r:") as file:
        for member in file:
            if member.isfile():
                yield member.name, member.offset_data, member.size
            # `tarfile` keeps an object for each header that it has read
            file.members = []  # type: ignore[attr-defined]
            step(file.offset - done)
            done = file.offset
        end = file.offset
    # `tarfile` takes a file that is cut between two members, or in a header, for a whole one
    with path.open("rb") as opened:
        opened.seek(end)
        if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut short, at byte {end:,} there is no end")


def _key(name: str | bytes) -> int:
    data = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def read_index(path: Path, kind: str) -> Index | None:
    """Map the stored index of a file; None where there is none of its present content."""
    stamp = index_stamp(path, kind)
    for place in index_places(path):
        try:
            with place.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, _MAX_HEADER)))
            # mapped, so that all processes of a machine share one copy
            content = np.asarray(np.memmap(place, np.uint8, "r", offset=8 + length))
            index = {
                name: content[slice(*facts["data_offsets"])]
                .view(_DTYPES[facts["dtype"]])
                .reshape(facts["shape"])
                for name, facts in header.items()
            }
        # damaged, or of an interrupted copy: it is written again
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            continue
        # of another content
        if index.pop("stamp", np.zeros(0)).tolist() == stamp:
            return index
    return None


def index_stamp(path: Path, kind: str) -> list[int]:
    """Return numbers that change with a file. A file that is not there fails when it is read."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [*kind.encode(), found.st_size, found.st_mtime_ns]


def index_places(path: Path) -> list[Path]:
    """Return the places of a file's index: beside it, and in the cache of `datasets`."""
    # hidden: a pattern such as shards/* must not take it for rows
    key = blake2b(str(path).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return [path.with_name(f".{path.name}.index"), cache_folder("index") / f"{key}.index"]


def cache_folder(name: str) -> Path:
    """Return a folder of ours in the cache of `datasets`; it need not exist."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / f"multi_token_{name}"
