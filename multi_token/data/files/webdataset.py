"""Samples of a WebDataset .tar as rows by index, with media members inlined as bytes."""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError, RowError

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

    Opening reads all headers; each row is then read by offset, so access is random. Raises
    MultiTokenError for a compressed or damaged file, RowError for a sample without a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        samples: dict[str, dict[str, tuple[str, int, int]]] = {}
        try:
            # "r:" refuses compression: offsets into a compressed file are no places to seek to
            with tarfile.open(self.path, "r:") as file:
                for member in file:
                    folder, name = posixpath.split(member.name)
                    key, dot, extension = name.partition(".")
                    if member.isfile() and key and dot:
                        entry = (name, member.offset_data, member.size)
                        samples.setdefault(posixpath.join(folder, key), {})[extension] = entry
                end = file.offset
            # tarfile takes a file that is cut between two members, or in a header, for a whole one
            with self.path.open("rb") as opened:
                opened.seek(end)
                if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"it is cut short, at byte {end:,} there is no end")
        except (OSError, tarfile.TarError) as error:
            raise MultiTokenError(
                f"{path} cannot be read as an uncompressed .tar: {error}; unpack it if it is "
                "compressed, or write it again"
            ) from error
        self.keys = list(samples)
        self.samples = list(samples.values())

    def __len__(self) -> int:
        return len(self.samples)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        # opened for each row: forked workers would share the file position of one handle
        key, members = self.keys[index], self.samples[index]
        row_id = f"{self.path.name}/{key}"
        with self.path.open("rb") as file:
            contents = {}
            for extension, (name, start, size) in members.items():
                file.seek(start)
                contents[extension] = {"bytes": file.read(size), "path": name}
        given = contents.pop(_ROW, None)
        if given is None:
            names = ", ".join(name for name, _, _ in members.values())
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
