"""Stored index of a file: built once, then mapped by other processes and later starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from multi_token.checkpoint.atomic import atomic_file, lock_file
from multi_token.media.archive import Index, index_places, index_stamp, read_index

LARGE = 1 << 28
"""Bytes of a file that may take seconds to index."""


def stored_index(path: Path, kind: str, build: Callable[[Path], Index]) -> Index:
    """Return the index of a file, from its index file where that is of the same content.

    Args:
        path: The file.
        kind: Name of the format with the version of its index.
        build: Reads the file; its errors pass through.
    """
    index = read_index(path, kind)
    if index is not None:
        return index
    with _alone(path):
        index = read_index(path, kind)  # another process built it meanwhile
        return _build(path, kind, build) if index is None else index


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of the machine is in here for a file; others wait."""
    place = index_places(path)[-1].with_suffix(".lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.open("w")
    except OSError:
        yield  # a cache that only reads has no lock: each process then may read the file
        return
    with lock:
        lock_file(lock, wait=True)
        yield


def _build(path: Path, kind: str, build: Callable[[Path], Index]) -> Index:
    """Build the index of a file and store it, where there is a place for it."""
    stamp = index_stamp(path, kind)
    index = build(path)
    for place in index_places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(place) as partial:
                save_file({**index, "stamp": np.array(stamp, np.int64)}, partial)
        except (OSError, SafetensorError):
            continue  # a folder that only reads, or a full disk: each process then reads the file
        break
    return index
