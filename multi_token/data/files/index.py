"""Stored index of a file: built once, then read by other processes and later starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from multi_token.checkpoint.atomic import atomic_file
from multi_token.media.hashing import digest

Index = dict[str, "NDArray[Any]"]
"""Arrays by name."""


def stored_index(path: Path, kind: str, build: Callable[[Path], Index]) -> Index:
    """Return the index of a file, from its index file where that is of the same content.

    Args:
        path: The file.
        kind: Name of the format with the version of its index.
        build: Reads the file; its errors pass through.
    """
    stamp = _stamp(path, kind)
    for file in _index_files(path):
        try:
            index: Index = load_file(file)
        except (OSError, SafetensorError):
            continue
        # of another content, or of an interrupted copy: it is written again
        if index.pop("stamp", np.zeros(0)).tolist() == stamp:
            return index
    index = build(path)
    for file in _index_files(path):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as partial:
                save_file({**index, "stamp": np.array(stamp, np.int64)}, partial)
        except (OSError, SafetensorError):
            continue  # a folder that only reads, or a full disk: each process then reads the file
        break
    return index


def cache_folder(name: str) -> Path:
    """Return a folder of ours in the cache of `datasets`; it need not exist."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / f"multi_token_{name}"


def _stamp(path: Path, kind: str) -> list[int]:
    """Return numbers that change with a file. A file that is not there fails when it is read."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [*kind.encode(), found.st_size, found.st_mtime_ns]


def _index_files(path: Path) -> list[Path]:
    """Return the places of a file's index, the first choice first."""
    # hidden: a pattern such as shards/* must not take it for rows
    name = f".{path.name}.index"
    return [path.with_name(name), cache_folder("index") / f"{digest(str(path).encode())}.index"]
