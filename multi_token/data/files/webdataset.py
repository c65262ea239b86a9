"""Samples of a WebDataset .tar as rows by index, with media members inlined as bytes."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from multi_token.data.files.folder import add_metadata, media_column, text_column
from multi_token.data.files.index import LARGE, stored_index
from multi_token.data.parallel import pass_console, progress_bar
from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.archive import Index, tar_members

_ROW = "json"
_NOT_MEDIA = ("id", "media_texts")
_TURNS = ("messages", "conversations", "chosen", "rejected")


class TarRows(IndexedRows):
    """Rows of a .tar: `0001.json` is the row of sample `0001`, `0001.jpg` one of its media.

    Where the .json has no turns (img2dataset: it describes the image), or is not there, `.jpg` is
    the column `image` (or `audio`, `video`, `document`), `.txt` is `text`, `.caption` is `caption`.

    Key and extension split at the first dot of the member's name, as in WebDataset
    (https://github.com/webdataset/webdataset). A member enters the row as `{"bytes", "path"}`:

    - By name: `"image": "0001.jpg"`, or `".jpg"` for short, wherever a row may name a file: in the
      field of a modality, alone or in a list, or in a content part.
    - As a field: `0001.image.jpg` is the field `image`, `0001.jpg` without a name is `jpg`; the
      row must not have that field as well.

    Opening reads all headers once, and keeps their places in an index file: beside the tar, or in
    the cache of `datasets` where that folder is read-only. Other processes and later starts read
    the index. Each row is then read by offset, so access is random. Memory holds a few numbers and
    a name for each file. Raises MultiTokenError for a compressed or damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._index = stored_index(self.path, "tar2", _index_of)

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
        # first, so that an `id` of the row's own wins
        full: dict[str, Any] = {"id": row_id}
        if given is not None:
            add_metadata(full, given["bytes"], given["path"], row_id)
        return _with_members(full, contents, row_id)


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name at its first dot -> (key with its folder, extension)."""
    folder, base = posixpath.split(name)
    key, _, extension = base.partition(".")
    return posixpath.join(folder, key), extension


def _index_of(path: Path) -> Index:
    """Read all headers of a tar. Raises MultiTokenError.

    `names`: all member names as bytes, `ends` their ends after a 0; `offsets`, `sizes`: of members;
    `firsts`: first member of each sample, then the number of members.
    """
    samples: dict[str, dict[str, tuple[bytes, int, int]]] = {}
    size = path.stat().st_size
    bar = progress_bar(pass_console(quiet=size < LARGE), f"Opening {path.name} (bytes)", size)
    try:
        with bar as step:
            for full_name, offset, num_bytes in tar_members(path, step):
                base = posixpath.basename(full_name)
                if not base.startswith(".") and "." in base:
                    key, extension = _split_name(full_name)
                    name = full_name.encode("utf-8", "surrogateescape")
                    samples.setdefault(key, {})[extension] = (name, offset, num_bytes)
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


def _text(content: Mapping[str, Any], row_id: str) -> str:
    try:
        return str(content["bytes"], "utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RowError(
            f"{content['path']} is not UTF-8 ({error.reason} at byte {error.start}); pack the tar "
            "again with text in UTF-8",
            kind="format",
            row_id=row_id,
        ) from error


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
    # of img2dataset and others: the .json describes the media, or is not there
    is_metadata = not any(row.get(key) is not None for key in _TURNS)
    for extension, member in members.items():
        # a member that the row names has its place already
        if member["path"] in named:
            continue
        field, value = extension.rpartition(".")[0] or extension, member
        if is_metadata and field == extension:
            column = media_column(member["path"])
            if text := text_column(member["path"]):
                field, value = text, _text(member, row_id)
            elif column and full.get(column) is None:
                field = column
        if full.get(field) is not None:
            raise RowError(
                f"has the file {member['path']}, which is the field {field!r}, and that field as "
                "well; leave one of them out",
                kind="format",
                row_id=row_id,
            )
        full[field] = value
    return full
