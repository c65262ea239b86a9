"""Name of a source -> its rows by index: picks the format by suffix, folder or hub name."""

from __future__ import annotations

import glob
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset

from multi_token.data.files.arrow import ArrowRows
from multi_token.data.files.csv import CsvRows
from multi_token.data.files.folder import is_media_folder, open_folder
from multi_token.data.files.hub import (
    is_saved_folder,
    load_hub,
    load_saved_folder,
    load_table,
)
from multi_token.data.files.hub_files import HUB_PREFIX, HubFiles
from multi_token.data.files.json import JsonRows
from multi_token.data.files.jsonl import JsonLines
from multi_token.data.files.npy import NpyRows
from multi_token.data.files.parquet import ParquetRows
from multi_token.data.files.unpack import PACKED, unpacked_file
from multi_token.data.files.webdataset import TarRows
from multi_token.data.parallel import pass_console, progress_bar
from multi_token.data.rows import IndexedRows, Row, row_id_of
from multi_token.errors import MultiTokenError

_TEXTS: dict[str, Callable[[Path], Sequence[Row]]] = {
    ".json": JsonRows,
    ".jsonl": JsonLines,
    ".csv": CsvRows,
    ".tsv": CsvRows,
}
_FORMATS = {
    **_TEXTS,
    ".parquet": ParquetRows,
    ".arrow": ArrowRows,
    ".feather": ArrowRows,
    ".tar": TarRows,
    **{text + packed: _TEXTS[text] for text in _TEXTS for packed in PACKED},
}
_SHARDS = tuple(_FORMATS)
"""Formats whose files a folder of rows may have."""
_FORMATS[".npy"] = lambda path: NpyRows(path, _open_alone)  # in a folder, each may be one item
_IN_FOLDERS = (".json", ".jsonl", ".parquet", ".tar")
"""Formats whose files in a folder are its rows, whatever else lies there."""
_SLICE = re.compile(
    r"(?P<split>[^\[\]]+)\[(?P<rest>not )?"
    r"(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?(:(?P<step>[1-9]\d*))?\]"
)
_ACCEPTED = (
    "a .json, .jsonl, .csv, .tsv, .parquet, .arrow, .feather, .npy or .tar file, a text file of "
    "these with .gz or .zst, a pattern (shards/*.parquet) or folder of such files, a folder of "
    "media files, a folder written by datasets' save_to_disk, or a name on the Hugging Face hub "
    "(hf://owner/name)"
)


def load_rows(source: str, *, split: str = "train") -> Sequence[Row]:
    """Open the rows of `source`, by index.

    | `source`                   | meaning                                                        |
    |----------------------------|----------------------------------------------------------------|
    | `rows.json`                | a list of rows, or an object with it under `data` or `rows`    |
    | `rows.jsonl`               | a row on each line, parsed on access                           |
    | `rows.csv`, `rows.tsv`     | a table with names of columns in line 1 (csv.py)               |
    | `rows.jsonl.gz`, `.csv.zst`| such a text file, unpacked once into the cache of `datasets`   |
    | `rows.parquet`             | a table                                                        |
    | `rows.arrow`, `.feather`   | a table, memory-mapped                                         |
    | `vectors.npy`              | a vector each, with labels of a file beside it (npy.py)        |
    | `shards.tar`               | samples of a WebDataset (webdataset.py)                        |
    | `*.parquet`, a folder      | all such files of one kind, sorted by name                     |
    | a folder                   | written by `save_to_disk`, with splits or without              |
    | a folder of media files    | with metadata, in pairs or in folders of classes (folder.py)   |
    | `owner/name`, `hf://...`   | a data set on the hub; `hf://owner/name/config` picks a config |
    | `hf://owner/name/a.json`   | a file of such a data set's repository, or a pattern           |

    Args:
        source: A name as in the table.
        split: The split of a hub data set or saved folder; files only have `train`. A part of it in
            brackets, as datasets writes it: `train[:95%]`, `train[1000:]`. Also every n-th row,
            `train[::20]`, and after `not` all rows but these, `train[not ::20]`.

    Returns:
        The rows, which stay on disk. Media in tables stay undecoded.

    Raises:
        MultiTokenError: nothing is there, the format is unknown, or the split does not exist.
        RowError: a .json file has no end, or is not JSON as a whole.
    """
    match = _SLICE.fullmatch(split)
    if match is None:
        return _load_split(source, split)
    rows = _load_split(source, match["split"])
    start, stop = (_bound(match[name], len(rows)) for name in ("start", "stop"))
    named = slice(start, stop, int(match["step"] or 1))
    indices: Sequence[int] = range(len(rows))[named]
    if match["rest"]:
        # an array, not a list: reference counts of list items make forked workers copy its pages
        rest = np.delete(np.arange(len(rows), dtype=np.int64), named)
        indices = array("q", rest.tobytes())
    part = PartOfRows(rows, indices, Path(source).name)
    if not len(part):
        raise MultiTokenError(
            f"split {split!r} of {source} has no rows: it has {len(rows):,} in all"
        )
    return part


def _bound(text: str | None, num_rows: int) -> int | None:
    if not text:
        return None
    return round(num_rows * int(text[:-1]) / 100) if text.endswith("%") else int(text)


class PartOfRows(IndexedRows):
    """Rows of some indices of other rows, with the ids that these have there."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int], name: str) -> None:
        """`name`: name of the source in the ids of rows that have none."""
        self.rows, self.indices, self.name = rows, indices, name

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, index: int) -> Row:
        """Read a row; see IndexedRows."""
        row = self.rows[self.indices[index]]
        if isinstance(row, Mapping) and row.get("id") is None:
            return {**row, "id": row_id_of(self.indices[index], row, self.name)}
        return row


def _load_split(source: str, split: str) -> Sequence[Row]:
    files = resolve_files(source)
    path = Path(source).expanduser()
    if files is None:
        if not path.is_dir():
            return load_hub(source, split)
        is_saved = is_saved_folder(path)
        return load_saved_folder(path, split) if is_saved else open_folder(path, split, _open_alone)
    check_no_split(source, split)
    if files == [path] or (_is_hub_file(source) and len(files) == 1):
        return _open_alone(files[0])
    # ConcatDataset refuses an empty list, and would search in vain through an empty file
    found: Any = []
    with progress_bar(pass_console(), f"Opening files of {Path(source).name}", len(files)) as step:
        for file in files:
            found += [rows] if len(rows := open_file(file)) else []
            step(1)
    rows: Any = ConcatDataset(found) if found else []
    return rows


def _open_alone(path: Path) -> Sequence[Row]:
    """Open a file whose rows are read in any order."""
    rows = None if _suffix(path) == ".parquet" else open_file(path)
    # by the cache of datasets: a shuffle within a large file would thrash row groups
    if rows is None or (isinstance(rows, ArrowRows) and not rows.is_mapped):
        return load_table("parquet" if rows is None else "arrow", path)
    return rows


def open_file(path: Path) -> Sequence[Row]:
    """Open one file of many; memory holds its index."""
    kind = _suffix(path)
    return _FORMATS[kind](unpacked_file(path) if path.suffix.lower() in PACKED else path)


def _suffix(path: Path) -> str:
    """Return the suffix that names a format: `.csv`, and `.csv.gz` for a compressed file."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in PACKED else last


def _is_hub_file(source: str) -> bool:
    return source.startswith(HUB_PREFIX) and _suffix(Path(source)) in _FORMATS


def check_no_split(source: str, split: str) -> None:
    """Raise MultiTokenError for any split but `train`: files have no splits."""
    if split != "train":
        raise MultiTokenError(
            f"{source} names files, which have no split {split!r}; leave the split out, or name "
            "the files that hold it"
        )


def media_root(source: str) -> str | None:
    """Return the folder from which relative media paths of `source` start.

    For files that is their folder, for a folder of media files this folder, and for a file on the
    hub the archive beside it (hub_files.py). For saved folders and hub names, whose media are
    inside, it is None: the current folder. Raises MultiTokenError for files in several folders.
    """
    if _is_hub_file(source):
        return HubFiles.of(source).media_root()
    files = resolve_files(source)
    if files is None:
        path = Path(source).expanduser()
        return str(path.resolve()) if path.is_dir() and not is_saved_folder(path) else None
    folders = sorted({str(file.resolve().parent) for file in files})
    if len(folders) > 1:
        raise MultiTokenError(
            f"the files of {source} lie in {len(folders)} folders ({folders[0]}, {folders[1]}"
            f"{', ...' if len(folders) > 2 else ''}), and media paths start at the folder of their "
            "rows; make each folder a source of its own"
        )
    return folders[0]


def resolve_files(source: str) -> list[Path] | None:
    """List the files of a source, sorted by name; None for a folder of media, or a hub name.

    A saved folder is None as well.

    Raises MultiTokenError if there are none, or if their kinds differ.
    """
    if source.startswith(HUB_PREFIX):
        return HubFiles.of(source).download() if _is_hub_file(source) else None
    path = Path(source).expanduser()
    where, suffix = path.resolve(), _suffix(path)
    if path.is_dir():
        if is_saved_folder(path) or is_media_folder(path, _SHARDS):
            return None
        files = [p for p in path.iterdir() if _suffix(p) in _SHARDS and p.is_file()]
        # tables of other kinds beside them may be media: series are .csv files, for example
        first = [p for p in files if _suffix(p) in _IN_FOLDERS]
        if not files:
            raise MultiTokenError(
                f"{where} is a folder, but not one that datasets' save_to_disk wrote, and "
                f"there are no files of rows or media in it; expected {_ACCEPTED}"
            )
        return _check_one_kind(source, sorted(first or files))
    if suffix in _FORMATS and path.is_file():
        return [path]
    if path.exists():
        raise MultiTokenError(f"{where} has the suffix {suffix!r}; expected {_ACCEPTED}")
    if any(sign in source for sign in "*?["):
        matches = map(Path, glob.glob(str(path), recursive=True))
        return _check_one_kind(source, sorted(p for p in matches if p.is_file()))
    if suffix in _FORMATS:
        raise MultiTokenError(f"no file at {where}; check the name, or the folder you are in")
    # `owner/name` is a hub name only if nothing here suggests that a path was meant: asking the
    # hub for a mistyped path ends in a message about the network
    names = source.split("/")
    if (
        len(names) > 2
        or not all(names)
        or "\\" in source
        or names[0] in (".", "..", "~")
        or (len(names) == 2 and Path(names[0]).is_dir())
    ):
        raise MultiTokenError(f"nothing at {where}; expected {_ACCEPTED}")
    return None


def _check_one_kind(source: str, files: list[Path]) -> list[Path]:
    """Return the files, or raise MultiTokenError if they are not rows of one kind."""
    kinds = sorted({_suffix(file) for file in files})
    if not files or not set(kinds) <= set(_FORMATS):
        raise MultiTokenError(
            f"{source} (seen from {Path.cwd()}) names no files of rows"
            + (f", but files that end in {', '.join(kinds)}" if files else "")
            + f"; expected files that end in {', '.join(_FORMATS)}"
        )
    if len(kinds) > 1:
        raise MultiTokenError(
            f"{source} has files of several kinds ({', '.join(kinds)}), expected one; name those "
            f"that hold the rows, such as {files[0].parent}/*{kinds[0]}"
        )
    return files
