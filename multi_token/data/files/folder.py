"""Rows of a folder of media files: with metadata, in pairs with texts, or in folders of classes."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from multi_token.data.parallel import pass_console, progress_bar
from multi_token.data.rows import IndexedRows, Row
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.fetch import shorten
from multi_token.media.sniff import FILE_KINDS

_KINDS = {
    # the later kind wins: `.webm` holds audio or video
    **{
        suffix: kind for kind in ("image", "audio", "video") for suffix in FILE_KINDS[kind].suffixes
    },
    ".pdf": "document",
}
"""Suffix of a media file -> the column that it is in."""
_TEXTS = {".txt": "text", ".caption": "caption"}
"""Suffix of a text beside a media file -> the column that it is in."""
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> names of its folder, those of `datasets`."""


def media_column(name: str) -> str | None:
    """Return the column of a file by its suffix: image, audio, video, document, or None."""
    return _KINDS.get(os.path.splitext(name)[1].lower())


def text_column(name: str) -> str | None:
    """Return the column of a text beside a media file (`text`, `caption`), or None."""
    return _TEXTS.get(os.path.splitext(name)[1].lower())


def is_media_folder(path: Path, formats: tuple[str, ...]) -> bool:
    """Return whether a folder's rows are its media files, and not files of rows in it.

    `formats`: suffixes of files of rows.
    """
    with os.scandir(path) as entries:
        names = {entry.name for entry in entries if not entry.name.startswith(".")}
    if any(name in names for name in _METADATA):
        return True
    media = {_stem(name) for name in names if media_column(name)}
    # x.json beside x.jpg is its metadata; any other file of rows is what was meant
    rows = {_stem(name) for name in names if name.lower().endswith(formats)}
    if media or rows:
        return bool(media) and rows <= media
    below = (name for name in sorted(names) if (path / name).is_dir())
    return any(media_column(file) for name in below for file in _walk(path, name))


def open_folder(
    path: Path, split: str, open_file: Callable[[Path], Sequence[Row]]
) -> Sequence[Row]:
    """Open a folder of media files as rows, whose paths are relative to the folder.

    | the folder has                      | columns                                                |
    |-------------------------------------|--------------------------------------------------------|
    | `metadata.csv`, `.jsonl`, `.parquet`| its columns; `file_name` is `image` (`audio`, `video`, |
    |                                     | `document`), `left_file_name` is `left`, `file_names`  |
    |                                     | is `images`, as in datasets' imagefolder               |
    | `x.jpg` with `x.txt`, `x.caption` or| `image`, `text`, `caption`, and the fields of the      |
    | `x.json` beside it                  | .json; files without a partner are left out, and said  |
    | folders of classes                  | `image`, and the name of its folder as `label`         |
    | else                                | `image`                                                |

    Folders `train`, `validation` and `test` are splits. Files with one name and several kinds
    (`x.mp4`, `x.wav`) are one row.

    Args:
        path: The folder.
        split: The split to read, where the folder has splits.
        open_file: Opens a metadata file.

    Raises:
        MultiTokenError: there is no such split, or one folder has two metadata files.
    """
    start = _split_folder(path, split)
    found = _metadata_of(path, [start] if _names_metadata(path / start) else [])
    if not found:
        names = sorted(_listed(path, start), key=_stem)
        found = _metadata_of(
            path, sorted({os.path.dirname(n) for n in names if os.path.basename(n) in _METADATA})
        )
        if not found:
            return FolderRows(path, names, start)
    tables = [MetadataRows(path, file, open_file(path / file)) for file in found]
    # ConcatDataset refuses an empty list
    full: Any = [table for table in tables if len(table)]
    rows: Any = ConcatDataset(full) if full else []
    return rows


def _walk(path: Path, start: str, above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Yield the files below `path / start`, relative to `path`; hidden ones are left out.

    `above`: folders that lead to `start`, to which no link is followed.
    """
    above |= _around(path / start)
    with os.scandir(path / start) as entries:
        for entry in entries:
            name = f"{start}/{entry.name}"
            if entry.name.startswith(".") or _leads_to(entry, above):
                continue
            if entry.is_dir():
                yield from _walk(path, name, above)
            else:
                yield name


def _around(folder: Path) -> frozenset[Path]:
    """Return a folder and those around it, by their real paths."""
    real = folder.resolve()
    return frozenset((real, *real.parents))


def _leads_to(entry: os.DirEntry[str], folders: frozenset[Path]) -> bool:
    return entry.is_symlink() and Path(os.path.realpath(entry.path)) in folders


def _listed(path: Path, start: str) -> Iterator[str]:
    """Yield files that may be in rows, with a bar over the entries of the folder itself."""
    around = _around(path / start)
    with os.scandir(path / start) as entries:
        top = [
            (e.name, e.is_dir())
            for e in entries
            if not e.name.startswith(".") and not _leads_to(e, around)
        ]
    with progress_bar(pass_console(), f"Listing files of {path.name}", len(top)) as step:
        for number, (entry, is_folder) in enumerate(top, 1):
            whole = f"{start}/{entry}" if start else entry
            for name in _walk(path, whole, around) if is_folder else (whole,):
                has_text = text_column(name) or name.endswith(".json")
                if media_column(name) or has_text or os.path.basename(name) in _METADATA:
                    yield name
            # one redraw of the bar costs as much as a thousand files
            if is_folder or number % 1000 == 0:
                step(1 if is_folder else 1000)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _split_folder(path: Path, split: str) -> str:
    """Return the folder of a split below `path`, or "" where the folder has no splits."""
    known = {name: key for key, names in _SPLITS.items() for name in names}
    with os.scandir(path) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    # a folder `test` beside folders of other names is a class
    has_splits = bool(folders) and all(name.lower() in known for name in folders)
    for name in folders if has_splits else ():
        if split in (name, known[name.lower()]):
            return name
    if has_splits or split != "train":
        there = f"its splits are {', '.join(folders)}" if has_splits else "it has no splits"
        raise MultiTokenError(f"{path} has no split {split!r}; {there}")
    return ""


def _names_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _METADATA)


def _metadata_of(path: Path, folders: Sequence[str]) -> list[str]:
    """Return the metadata file of each folder. Raises MultiTokenError where one has two."""
    found = []
    for folder in folders:
        names = [name for name in _METADATA if (path / folder / name).is_file()]
        if len(names) > 1:
            raise MultiTokenError(
                f"{path / folder} has {' and '.join(names)}, expected one; delete or rename the "
                "others"
            )
        found.append(os.path.join(folder, names[0]))
    return found


class MetadataRows(IndexedRows):
    """Rows of a metadata file whose `file_name` names a media file, as datasets' imagefolder."""

    def __init__(self, path: Path, file: str, rows: Sequence[Row]) -> None:
        """`file`: the metadata file, relative to `path`. Raises MultiTokenError."""
        self.file = path / file
        self.folder = os.path.dirname(file)
        self.rows = rows
        if len(rows) and not any(map(_is_file_name, rows[0])):
            raise MultiTokenError(
                f"{self.file} has the columns {', '.join(rows[0])}, expected `file_name` among "
                "them, or `left_file_name`, or `file_names`"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        full: dict[str, Any] = {}
        for key, value in self.rows[index].items():
            if not _is_file_name(key):
                name, value = key, value
            elif value is None:
                continue
            elif key.endswith("s"):
                if not isinstance(value, (list, tuple)):
                    raise self._error(
                        f"{value!r} as `{key}`, expected a list of names of files", index
                    )
                several = [self._path(one, key, index) for one in value]
                kind = media_column(several[0]) if several else None
                name, value = key[: -len("_file_names")] or f"{kind or 'image'}s", several
            else:
                value = self._path(value, key, index)
                name = key[: -len("_file_name")] or media_column(value) or "image"
            if name in full:
                raise self._error(f"two columns that are `{name}`; rename one", index)
            full[name] = value
        return full

    def _path(self, value: Any, key: str, index: int) -> str:
        parts = PurePosixPath(value.replace("\\", "/") if isinstance(value, str) else "")
        if not parts.parts:
            raise self._error(f"{value!r} as `{key}`, expected the name of a file", index)
        if "://" in value or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0]:
            raise self._error(
                f"`{key}` {shorten(value)}, which leads out of the folder; name files in it", index
            )
        return str(self.folder / parts)

    def _error(self, fault: str, index: int) -> RowError:
        row_id = f"{self.file.name}[{index}]"
        return RowError(f"row {index} of {self.file} has {fault}", kind="format", row_id=row_id)


def _is_file_name(key: str) -> bool:
    return key in ("file_name", "file_names") or key.endswith(("_file_name", "_file_names"))


class FolderRows(IndexedRows):
    """Media files with the texts beside them; memory holds their names, without an object each."""

    def __init__(self, path: Path, names: Sequence[str], start: str) -> None:
        """`names`: files relative to `path`, those with one stem one after the other.

        `start`: folder of the split below `path`, or "".
        """
        self.path = path.absolute()
        groups = [(stem, list(group)) for stem, group in groupby(names, _stem)]
        media = [[n for n in group if media_column(n)] for _, group in groups]
        texts = [[n for n in group if not media_column(n)] for _, group in groups]
        # a .json of one image among many without is no reason to leave the others out
        in_pairs = any(found and there for found, there in zip(media, texts, strict=True))
        kept: list[list[str]] = []
        alone: dict[str, list[str]] = {"media": [], "texts": []}
        for (_, group), found, beside in zip(groups, media, texts, strict=True):
            if in_pairs and not beside:
                alone["media"] += found
            elif not found:
                alone["texts"] += beside if in_pairs else []
            elif len({media_column(name) for name in found}) == len(found):
                kept.append(group)
            else:  # a.jpg and a.png are two images
                kept += [[name, *beside] for name in found]
        self._say_alone(alone, sum(map(len, media)))
        labels = Counter(os.path.basename(os.path.dirname(group[0])) for group in kept)
        depths = {group[0].count("/") for group in kept}
        self.has_labels = not in_pairs and len(labels) > 1 and len(depths) == 1
        encoded = [name.encode("utf-8", "surrogateescape") for group in kept for name in group]
        self._names = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._firsts = np.cumsum([0, *map(len, kept)])

    def _say_alone(self, alone: Mapping[str, Sequence[str]], num_media: int) -> None:
        said = []
        if alone["media"]:
            said.append(
                f"{len(alone['media']):,} of {num_media:,} media files have no .txt, .caption or "
                f".json beside them and are left out, such as {alone['media'][0]}"
            )
        if alone["texts"]:
            said.append(
                f"{len(alone['texts']):,} texts have no media file, such as {alone['texts'][0]}"
            )
        if said:
            pass_console().print(f"{self.path}: {'; '.join(said)}", highlight=False)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def _files(self, index: int) -> list[str]:
        return [
            self._names[slice(*self._ends[i : i + 2].tolist())]
            .tobytes()
            .decode("utf-8", "surrogateescape")
            for i in range(*self._firsts[index : index + 2].tolist())
        ]

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        files = self._files(index)
        # first, so that an `id` of the metadata wins
        full: dict[str, Any] = {"id": next(name for name in files if media_column(name))}
        # media and texts before the metadata, which must not hide them
        for name in sorted(files, key=lambda name: (name.endswith(".json"), name)):
            if column := media_column(name):
                full[column] = name
            elif column := text_column(name):
                full[column] = self._text(name, full["id"]).strip()
            else:
                add_metadata(full, self._text(name, full["id"]), name, full["id"])
        if self.has_labels:
            full["label"] = os.path.basename(os.path.dirname(files[0]))
        return full

    def _text(self, name: str, row_id: str) -> str:
        try:
            # editors on Windows put a byte order mark before the first letter
            return (self.path / name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RowError(
                f"{self.path / name} is not UTF-8 ({error.reason} at byte {error.start}); save the "
                "file as UTF-8",
                kind="format",
                row_id=row_id,
            ) from error
        except OSError as error:
            raise RowError(
                f"{self.path / name} cannot be read: {error.strerror or error}",
                kind="missing_file",
                row_id=row_id,
            ) from error


def add_metadata(row: dict[str, Any], text: str | bytes, name: str, row_id: str) -> None:
    """Add the fields of a .json beside a media file to its row. Raises RowError."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise RowError(f"{name} is not JSON ({error})", kind="format", row_id=row_id) from error
    if not isinstance(found, Mapping):
        raise RowError(
            f"{name} is a {type(found).__name__}, expected an object with fields",
            kind="format",
            row_id=row_id,
        )
    for key, value in found.items():
        if key != "id" and row.get(key) is not None:
            raise RowError(
                f"has a file that is the field {key!r}, and that field in {name} as well; leave "
                "one of them out",
                kind="format",
                row_id=row_id,
            )
        row[key] = value
