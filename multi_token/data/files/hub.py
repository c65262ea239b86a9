"""Tables that `datasets` reads: data sets on the hub, saved folders and single tables.

Media columns stay undecoded (`{"bytes", "path"}`): our decoders then name the row of a damaged
item, which `datasets` cannot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from multi_token.data.files.hub_files import HUB_PREFIX
from multi_token.data.rows import Row
from multi_token.errors import MultiTokenError
from multi_token.hub import limited_hub_waits
from multi_token.media.fetch import shorten

if TYPE_CHECKING:
    import datasets

_HUB_ARGS = ("path", "name", "split", "revision")
"""Arguments of `load_dataset` that a row may give."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w-][\w.-]*)?", re.ASCII)


def load_hub(source: str, split: str) -> Sequence[Row]:
    """Download a data set `owner/name` or `hf://owner/name/config`; rows by index.

    Raises MultiTokenError if the hub does not have it, or cannot be reached.
    """
    return _without_decoding(_open_hub(source, split))


def stream_hub(source: str, *, split: str = "train") -> datasets.IterableDataset:
    """Open a data set on the hub whose rows are read while they are downloaded.

    Raises MultiTokenError if the hub does not have it, or cannot be reached.
    """
    # undecoded, as `load_hub` returns them
    return _open_hub(source, split, streaming=True).decode(False)


def hub_args_fault(args: Mapping[str, Any]) -> str | None:
    """Return why arguments of `load_dataset` name no data set on the hub, or None if they do.

    A row may be written by others, and `load_dataset` opens any file, also pickles.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as BUILDERS

    for key, value in args.items():
        if key not in _HUB_ARGS or not isinstance(value, str):
            return (
                f"has `{shorten(key)}: {shorten(repr(value))}`, expected texts under "
                f"{', '.join(_HUB_ARGS)} alone; put other files into rows of their own"
            )
    path = args.get("path", "")
    # `load_dataset` prefers a builder of files (`json`), and a folder here, to a name on the hub
    if not _HUB_NAME.fullmatch(path) or path in BUILDERS or Path(path).exists():
        return f"has the `path` {shorten(repr(path))}, expected a data set on the hub, owner/name"
    return None


def open_hub_args(args: Mapping[str, Any]) -> Sequence[Row]:
    """Open the rows of `load_dataset(**args)`, for arguments without `hub_args_fault`.

    Raises MultiTokenError.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with limited_hub_waits(str(args.get("path"))):
            found = datasets.load_dataset(**args)
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        raise MultiTokenError(f"cannot load the data set of {dict(args)}: {error}") from error
    if not isinstance(found, datasets.Dataset):
        raise MultiTokenError(f"{dict(args)} names a data set with splits; add `split` to it")
    return _without_decoding(found)


def is_saved_folder(path: Path) -> bool:
    """Return whether `save_to_disk` of datasets wrote this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def load_saved_folder(path: Path, split: str) -> Sequence[Row]:
    """Map a folder of `save_to_disk`, with splits or without. Raises MultiTokenError."""
    import datasets

    content = datasets.load_from_disk(str(path))
    if isinstance(content, datasets.DatasetDict):
        if split not in content:
            raise MultiTokenError(
                f"{path} has no split {split!r}; its splits are {', '.join(map(str, content))}"
            )
        return _without_decoding(content[split])
    return _without_decoding(content)


def load_table(kind: Literal["parquet", "arrow"], path: Path) -> Sequence[Row]:
    """Read one file through the memory-mapped cache of datasets.

    Raises MultiTokenError if the file is not of that kind.
    """
    import datasets
    import pyarrow
    from datasets.exceptions import DatasetGenerationError

    # copies the file into the cache of `datasets` once, which later runs map
    try:
        table = datasets.load_dataset(kind, data_files=str(path), split="train")
    except (DatasetGenerationError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error
        raise MultiTokenError(f"{path} cannot be read as {kind}: {cause}") from error
    return _without_decoding(cast("datasets.Dataset", table))


def _open_hub(source: str, split: str, *, streaming: bool = False) -> Any:
    names = source.removeprefix(HUB_PREFIX).removeprefix("datasets/").split("/")
    if not all(names) or len(names) > 3:
        raise MultiTokenError(f"expected hf://owner/name or hf://owner/name/config, got {source}")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        with limited_hub_waits(source):
            return datasets.load_dataset(
                "/".join(names[:2]),
                names[2] if len(names) == 3 else None,
                split=split,
                streaming=streaming,
            )
    # datasets raises ValueError for an unknown config or split, OSError without a network
    except (OSError, ValueError, DatasetsError) as error:
        raise MultiTokenError(
            f"cannot load {source} (split {split!r}) from the hub: {error}; rows in one file of a "
            "repository, beside an archive of media, are named hf://owner/name/file.json; "
            f"if a file was meant, there is nothing at {Path(source).resolve()}"
        ) from error


def _without_decoding(table: datasets.Dataset) -> Sequence[Row]:
    """Turn decoding off in every media column, however nested."""

    def turn_off(feature: Any) -> None:
        # media, and the types of one version only: Pdf, Nifti, Mesh, BioSequence, BioStructure
        if getattr(feature, "decode", False) is True:
            feature.decode = False
        elif isinstance(feature, Mapping):
            for child in feature.values():
                turn_off(child)
        elif isinstance(feature, (list, tuple)):
            for child in feature:
                turn_off(child)
        elif hasattr(feature, "feature"):  # list types, whose class names differ between versions
            turn_off(feature.feature)

    # in place: `cast_column` handles whole columns only, and `cast` rewrites the table
    turn_off(table.info.features)
    return cast("Sequence[Row]", table)
