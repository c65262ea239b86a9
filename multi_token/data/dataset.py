"""Where rows come from, and the torch dataset that reads them into samples.

Border: files, folders and hub names end here as sequences of rows; media files are the reader's.
"""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from torch.utils.data import Dataset

from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError, RowError
from multi_token.types import Conversation, Sample

if TYPE_CHECKING:
    import datasets

Row = Mapping[str, Any]
_HUB = "hf://"
_SUFFIXES = (".json", ".jsonl", ".parquet")
_ACCEPTED = (
    "a .json, .jsonl, .parquet or .tar file, a pattern (shards/*.parquet) or folder of such files, "
    "a folder written by datasets' save_to_disk, or a name on the Hugging Face hub "
    "(hf://owner/name)"
)
_SHARDS = (*_SUFFIXES, ".tar")
_SIGNS = "*?["


def load_rows(source: str, *, split: str = "train") -> Sequence[Row]:
    """The rows of `source`, by index; files of rows are not copied into memory where that can be.

    | `source`                   | what it is                                                     |
    |----------------------------|----------------------------------------------------------------|
    | `rows.json`                | a list of rows, or an object with it under `data` or `rows`    |
    | `rows.jsonl`               | a row on each line, parsed when it is asked for                |
    | `rows.parquet`             | a table                                                        |
    | `shards.tar`               | WebDataset's samples (webdataset.py)                            |
    | `*.parquet`, a folder      | all such files of one kind, sorted by name                     |
    | a folder                   | written by `save_to_disk`, with splits or without              |
    | `owner/name`, `hf://...`   | a data set on the hub; `hf://owner/name/config` picks a config |

    `split` picks one where there are several; a file has no other than `train`. Pictures in tables
    stay undecoded, so that a damaged one is reported by our decoder with its row.
    """
    kind = _source_kind(source)
    if kind == "hub":
        return _without_decoding(_from_hub(source, split))
    path = Path(source).expanduser()
    if kind == "folder":
        return _from_folder(path, split)
    if kind == "many":
        from multi_token.data.row_stream import all_rows

        return all_rows(source, split=split)
    if split != "train":
        raise MultiTokenError(
            f"{path} is one file, which has no split {split!r}; "
            "leave the split out, or name the file that holds it"
        )
    if kind == ".jsonl":
        return JsonLines(path)
    if kind == ".json":
        return _from_json(path)
    return _from_parquet(path)


def media_root(source: str) -> str | None:
    """The folder where relative media paths of `source` start: that of a file of rows.

    None (the current folder) for saved folders and hub names: they do not lie beside their media.
    Raises MultiTokenError for files in several folders.
    """
    files = resolve_files(source)
    if files is None:
        return None
    folders = sorted({str(file.resolve().parent) for file in files})
    if len(folders) > 1:
        raise MultiTokenError(
            f"the files of {source} lie in {len(folders)} folders ({folders[0]}, {folders[1]}"
            f"{', ...' if len(folders) > 2 else ''}), and media paths start at the folder of their "
            "rows; make each folder a source of its own"
        )
    return folders[0]


def resolve_files(source: str) -> list[Path] | None:
    """The files of rows that a name stands for, by name, or None for a saved folder or hub name.

    Raises MultiTokenError where there are none, or of several kinds.
    """
    kind = _source_kind(source)
    path = Path(source).expanduser()
    if kind in _SUFFIXES or path.is_file():
        return [path]
    if kind != "many":
        return None
    given = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    found = sorted(p for p in given if p.is_file() and (not path.is_dir() or _is_shard(p)))
    kinds = sorted({p.suffix.lower() for p in found})
    if not found or not set(kinds) <= set(_SHARDS):
        raise MultiTokenError(
            f"{source} (seen from {Path.cwd()}) names no files of rows"
            + (f", but files that end in {', '.join(kinds)}" if found else "")
            + f"; expected files that end in {', '.join(_SHARDS)}"
        )
    if len(kinds) > 1:
        raise MultiTokenError(
            f"{source} has files of several kinds ({', '.join(kinds)}), expected one; name those "
            f"that hold the rows, such as {path if path.is_dir() else path.parent}/*{kinds[0]}"
        )
    return found


def _is_shard(path: Path) -> bool:
    return path.suffix.lower() in _SHARDS


def row_id_of(index: int, row: Row | None, source: str) -> str:
    """What messages call a row: its own `id`, or else the file and the index."""
    if isinstance(row, Mapping) and row.get("id") is not None:
        return str(row["id"])
    return f"{Path(source).name}[{index}]"


def row_to_sample(
    row: Row,
    row_id: str,
    *,
    processor: Callable[[Conversation], Sample],
    modalities: Collection[str],
) -> Sample:
    """A row the whole way to its sample: the one path of training, of `check` and of
    `add_samples`."""
    return processor(to_conversation(row, modalities, row_id=row_id))


class ConversationDataset(Dataset[Sample]):
    """Rows as samples: `dataset[i]` is the i-th good row, read when it is asked for.

    Picklable for data workers as long as `rows` and `processor` are. A row that cannot be read
    raises:
    which rows are good is decided before, by `scan`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        processor: Callable[[Conversation], Sample],
        *,
        modalities: Collection[str],
        good: Sequence[int] | None = None,
        source: str = "rows",
    ) -> None:
        self.rows = rows
        self.processor = processor
        self.modalities = tuple(modalities)
        # an array, not a list: forked workers would copy the pages of a list by counting references
        self.good = array("q", range(len(rows)) if good is None else good)
        self.source = source

    def __len__(self) -> int:
        return len(self.good)

    def __getitem__(self, index: int) -> Sample:
        row_index = self.good[index]
        row = self.rows[row_index]
        row_id = row_id_of(row_index, row, self.source)
        return row_to_sample(row, row_id, processor=self.processor, modalities=self.modalities)


class JsonLines(Sequence[Row]):
    """The lines of a .jsonl file, parsed one by one when asked for; blank lines are no rows.

    Holds only where each line starts, so that a file larger than memory can be used, and opens the
    file for each row, so that no handle is shared with forked workers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.starts = array("q")
        self.line_numbers = array("q")
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(start)
                    self.line_numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            line = file.readline()
        number = self.line_numbers[index]
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            # its own "line 1" would be taken for the file's
            reason = str(error).replace("line 1 ", "")
            raise RowError(
                f"line {number} of {self.path} is not JSON ({reason}); "
                "write one object on each line",
                kind="format",
                row_id=row_id_of(index % len(self), None, str(self.path)),
            ) from error
        return _checked(row, index % len(self), f"line {number} of {self.path}", self.path)


def _checked(row: Any, index: int, where: str, path: Path) -> Row:
    if not isinstance(row, Mapping):
        raise RowError(
            f"{where} is a {type(row).__name__}, expected an object with fields",
            kind="format",
            row_id=row_id_of(index, None, str(path)),
        )
    return cast("Row", row)


def _source_kind(source: str) -> str:
    """A suffix of a file, "many" (files, or WebDataset's), "folder" (saved) or "hub"; raises for
    what is none of them.
    """
    if source.startswith(_HUB):
        return "hub"
    path = Path(source).expanduser()
    where = path.resolve()
    if path.is_dir():
        shards = not _is_saved(path) and any(map(_is_shard, path.iterdir()))
        return "many" if shards else "folder"
    suffix = path.suffix.lower()
    if (suffix == ".tar" and path.is_file()) or (
        any(sign in source for sign in _SIGNS) and not path.exists()
    ):
        return "many"
    if suffix in _SUFFIXES:
        if not path.is_file():
            raise MultiTokenError(f"no file at {where}; check the name, or the folder you are in")
        return suffix
    if path.exists():
        raise MultiTokenError(f"{where} has the suffix {suffix!r}; expected {_ACCEPTED}")
    # `owner/name` is a hub name only if nothing here suggests that a path was meant
    names = source.split("/")
    looks_like_path = (
        len(names) > 2
        or not all(names)
        or "\\" in source
        or names[0] in (".", "..", "~")
        or (len(names) == 2 and Path(names[0]).is_dir())
    )
    if looks_like_path:
        raise MultiTokenError(f"nothing at {where}; expected {_ACCEPTED}")
    return "hub"


def _from_json(path: Path) -> Sequence[Row]:
    text = path.read_bytes()
    try:
        content = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = ""
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            hint = "; if there is a row on each line, name the file .jsonl"
        raise RowError(
            f"the file is not JSON ({error}){hint}", kind="format", row_id=str(path)
        ) from error
    if isinstance(content, Mapping):
        found = [key for key in ("data", "rows") if isinstance(content.get(key), list)]
        if not found:
            raise MultiTokenError(
                f"{path} is an object with the fields {', '.join(map(str, content)) or 'none'}; "
                "expected a list of rows, or that list under `data` or `rows`"
            )
        content = content[found[0]]
    if not isinstance(content, list):
        raise MultiTokenError(f"{path} holds a {type(content).__name__}; expected a list of rows")
    return content


def _from_parquet(path: Path) -> Sequence[Row]:
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    try:
        table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error
        raise MultiTokenError(f"{path} cannot be read as parquet: {cause}") from error
    return _without_decoding(cast("datasets.Dataset", table))


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _from_folder(path: Path, split: str) -> Sequence[Row]:
    if not _is_saved(path):
        raise MultiTokenError(
            f"{path.resolve()} is a folder, but not one that datasets' save_to_disk wrote, and "
            "there are no files of rows in it; "
            f"expected {_ACCEPTED}"
        )
    import datasets

    content = datasets.load_from_disk(str(path))
    if isinstance(content, datasets.DatasetDict):
        if split not in content:
            raise MultiTokenError(
                f"{path} has no split {split!r}; its splits are {', '.join(map(str, content))}"
            )
        return _without_decoding(content[split])
    return _without_decoding(content)


def rows_while_loading(source: str, *, split: str = "train") -> Iterable[Row]:
    """The rows of a data set on the hub in their order, each once it is downloaded.

    Raises MultiTokenError if the hub does not have it, or cannot be reached.
    """
    return _from_hub(source, split, streaming=True).decode(False)


def _from_hub(source: str, split: str, *, streaming: bool = False) -> Any:
    names = source.removeprefix(_HUB).removeprefix("datasets/").split("/")
    if not all(names) or len(names) > 3:
        raise MultiTokenError(f"expected hf://owner/name or hf://owner/name/config, got {source}")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        found = datasets.load_dataset(
            "/".join(names[:2]),
            names[2] if len(names) == 3 else None,
            split=split,
            streaming=streaming,
        )
    except (OSError, ValueError, DatasetsError) as error:
        raise MultiTokenError(
            f"cannot load {source} (split {split!r}) from the hub: {error}; "
            f"if a file was meant, there is nothing at {Path(source).resolve()}"
        ) from error
    return found


def _without_decoding(table: datasets.Dataset) -> Sequence[Row]:
    """The same table, whose pictures and recordings come as {"bytes", "path"}, however nested."""
    import datasets

    def turn_off(feature: Any) -> None:
        if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
            feature.decode = False
        elif isinstance(feature, Mapping):
            for child in feature.values():
                turn_off(child)
        elif isinstance(feature, (list, tuple)):
            for child in feature:
                turn_off(child)
        elif hasattr(feature, "feature"):  # the list types, whose names differ between versions
            turn_off(feature.feature)

    # in place: `cast_column` would do it for whole columns only, and `cast` rewrites the table
    turn_off(table.info.features)
    return cast("Sequence[Row]", table)
