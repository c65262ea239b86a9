"""Samples of a WebDataset .tar as rows by index, with media members inlined as bytes."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from multi_token.checkpoint.atomic import atomic_file
from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.hashing import digest

_ROW = "json"
_NOT_MEDIA = ("id", "media_texts")
_TURNS = ("messages", "conversations", "chosen", "rejected")


class TarRows(IndexedRows):
    """Rows of a .tar: `0001.json` is the row of sample `0001`, `0001.jpg` one of its media.

    Key and extension split at the first dot of the member's name, as in WebDataset
    (https://github.com/webdataset/webdataset). A member enters the row as `{"bytes", "path"}`:

    - By name: `"image": "0001.jpg"`, or `".jpg"` for short, wherever a row may name a file: in the
      field of a modality, alone or in a list, or in a content part.
    - As a field: `0001.image.jpg` is the field `image`, `0001.jpg` without a name is `jpg`; the
      row must not have that field as well.

    Opening reads all headers once, and keeps their places in an index file: beside the tar, or in
    the cache of `datasets` where that folder is read-only. Other processes and later starts read
    the index. Each row is then read by offset, so access is random. Memory holds a few numbers and
    a name for each file. Raises MultiTokenError for a compressed or damaged file, RowError for a
    sample without a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        stamp = _stamp(self.path)
        index = _read_index(self.path, stamp)
        if index is None:
            index = _index_of(path)
            _write_index(self.path, index, stamp)
        self._index = index

    def __len__(self) -> int:
        return len(self._index["firsts"]) - 1

    def _members(self, index: int) -> list[tuple[str, int, int]]:
        """Return name, offset and size of the files of a sample."""
        found = self._index
        numbers = range(*found["firsts"][index : index + 2].tolist())
        names = found["names"]
        return [
            (
                # names of any encoding, as `tarfile` reads them
                names[slice(*found["ends"][i : i + 2].tolist())]
                .tobytes()
                .decode("utf-8", "surrogateescape"),
                int(found["offsets"][i]),
                int(found["sizes"][i]),
            )
            for i in numbers
        ]

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        # opened for each row: forked workers would share the file position of one handle
        members = self._members(index)
        key, _ = _split_name(members[0][0])
        row_id = f"{self.path.name}/{key}"
        with self.path.open("rb") as file:
            contents = {}
            for name, start, size in members:
                file.seek(start)
                content = {"bytes": file.read(size), "path": posixpath.basename(name)}
                contents[_split_name(name)[1]] = content
        given = contents.pop(_ROW, None)
        if given is None:
            names = ", ".join(posixpath.basename(name) for name, _, _ in members)
            raise RowError(
                f"has the files {names} and no {posixpath.basename(key)}.{_ROW}, which must be "
                "the row",
                kind="format",
                row_id=row_id,
            )
        try:
            row = json.loads(given["bytes"])
        except ValueError as error:
            raise RowError(
                f"{given['path']} is not JSON ({error})", kind="format", row_id=row_id
            ) from error
        if not isinstance(row, Mapping):
            raise RowError(
                f"{given['path']} is a {type(row).__name__}, expected an object with fields",
                kind="format",
                row_id=row_id,
            )
        # first, so that an `id` of the row's own wins
        return {"id": row_id, **_with_members(row, contents, row_id)}


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot -> (key with its folder, extension)."""
    folder, base = posixpath.split(name)
    key, _, extension = base.partition(".")
    return posixpath.join(folder, key), extension


_Index = dict[str, "NDArray[Any]"]
"""`names`: all member names as bytes, `ends` their ends after a 0; `offsets`, `sizes`: of members;
`firsts`: first member of each sample, then the number of members."""
_VERSION = 1


def _index_of(path: Path) -> _Index:
    """Read all headers of a tar. Raises MultiTokenError."""
    samples: dict[str, dict[str, tuple[bytes, int, int]]] = {}
    try:
        # "r:" refuses compression: offsets into a compressed file are no places to seek to
        with tarfile.open(path, "r:") as file:
            for member in file:
                base = posixpath.basename(member.name)
                if member.isfile() and not base.startswith(".") and "." in base:
                    key, extension = _split_name(member.name)
                    name = member.name.encode("utf-8", "surrogateescape")
                    entry = (name, member.offset_data, member.size)
                    samples.setdefault(key, {})[extension] = entry
                # `tarfile` keeps an object for each header that it has read
                file.members = []  # type: ignore[attr-defined]
            end = file.offset
        # `tarfile` takes a file that is cut between two members, or in a header, for a whole one
        with path.open("rb") as opened:
            opened.seek(end)
            if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it is cut short, at byte {end:,} there is no end")
    except (OSError, tarfile.TarError) as error:
        raise MultiTokenError(
            f"{path} cannot be read as an uncompressed .tar: {error}; unpack it if it is "
            "compressed, or write it again"
        ) from error
    members = [entry for sample in samples.values() for entry in sample.values()]
    return {
        "names": np.frombuffer(b"".join(name for name, _, _ in members), np.uint8),
        "ends": np.cumsum([0, *(len(name) for name, _, _ in members)]),
        "offsets": np.array([offset for _, offset, _ in members], np.int64),
        "sizes": np.array([size for _, _, size in members], np.int64),
        "firsts": np.cumsum([0, *map(len, samples.values())]),
    }


def _stamp(path: Path) -> list[int]:
    """Return numbers that change with a tar. A tar that is not there fails when it is read."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [_VERSION, found.st_size, found.st_mtime_ns]


def _index_files(path: Path) -> list[Path]:
    """Return the places of a tar's index, the first choice first."""
    import datasets.config

    # hidden: a pattern such as shards/* must not take it for rows
    name = f".{path.name}.index"
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "multi_token_tar"
    return [path.with_name(name), cache / f"{digest(str(path).encode())}.index"]


def _read_index(path: Path, stamp: list[int]) -> _Index | None:
    for file in _index_files(path):
        try:
            index: _Index = load_file(file)
        except (OSError, SafetensorError):
            continue
        # of another tar, or of an interrupted copy: it is written again
        if index.pop("stamp", np.zeros(0)).tolist() == stamp:
            return index
    return None


def _write_index(path: Path, index: _Index, stamp: list[int]) -> None:
    for file in _index_files(path):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial:
                save_file({**index, "stamp": np.array(stamp, np.int64)}, partial)
        except (OSError, SafetensorError):
            continue  # a folder that only reads, or a full disk: each process then reads headers
        return


def _with_members(
    row: Mapping[str, Any], members: Mapping[str, Mapping[str, Any]], row_id: str
) -> dict[str, Any]:
    """Fill the sample's files into the row: first those it names, then the rest as fields."""
    by_name = {f".{extension}": member for extension, member in members.items()}
    by_name |= {str(member["path"]): member for member in members.values()}
    named: set[str] = set()

    def filled(value: Any) -> Any:
        if isinstance(value, str) and value in by_name:
            named.add(by_name[value]["path"])
            return by_name[value]
        if isinstance(value, list):
            return [filled(one) for one in value]
        return value

    def filled_turns(turns: Any) -> Any:
        if not isinstance(turns, list):
            return turns
        return [
            {**turn, "content": [filled_part(part) for part in turn["content"]]}
            if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
            else turn
            for turn in turns
        ]

    def filled_part(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        # a text that happens to spell a member's name stays text
        return {k: v if k in ("type", "text") else filled(v) for k, v in part.items()}

    full: dict[str, Any] = {}
    for key, value in row.items():
        if key in _TURNS:
            full[key] = filled_turns(value)
        else:
            full[key] = value if key in _NOT_MEDIA else filled(value)
    for extension, member in members.items():
        # a member that the row names has its place already
        if member["path"] in named:
            continue
        field = extension.rpartition(".")[0] or extension
        if full.get(field) is not None:
            raise RowError(
                f"has the file {member['path']}, which is the field {field!r}, and that field as "
                "well; leave one of them out",
                kind="format",
                row_id=row_id,
            )
        full[field] = member
    return full
