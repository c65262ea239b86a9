"""Stored index of a file: built once, then mapped by other processes and later starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from multi_token.checkpoint.atomic import atomic_file
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
    stamp = index_stamp(path, kind)
    index = read_index(path, kind)
    if index is not None:
        return index
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
