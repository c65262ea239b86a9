"""`.npy` files of numbers, without pickles: their header, and all or some of their rows."""

from __future__ import annotations

import io
import math
import os
import sys
import tokenize
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from multi_token.media.errors import DAMAGE, undecodable
from multi_token.media.fetch import Fetch

MAGIC = b"\x93NUMPY"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Readers of the header by the version of the format; version 3 is for named fields only."""
# A header is parsed as Python, and may ask for more memory than there is.
_DAMAGE = (*DAMAGE, tokenize.TokenError, MemoryError)


@dataclass(frozen=True)
class NpyHeader:
    """Shape and type of the array in a `.npy` file."""

    shape: tuple[int, ...]
    by_column: bool
    """True if the numbers of a column are side by side in the file."""
    dtype: np.dtype
    begin: int
    """Byte at which the numbers begin."""


def open_part(source: Any, fetch: Fetch) -> BinaryIO:
    """Return a file of which only a part is read, so a local one may be over `fetch.max_bytes`."""
    # The limit is for bytes in memory; every other source is in memory before a part is read.
    is_local = fetch.local_path(source) is not None
    return (replace(fetch, max_bytes=sys.maxsize) if is_local else fetch).open(source)


def read_npy_header(file: BinaryIO, name: str) -> NpyHeader:
    """Return the header of a `.npy` file.

    Raises MediaError for other files, and for one that is shorter than its header says.
    """
    try:
        if file.read(2) == b"PK":
            raise undecodable(f"{name} holds several arrays (.npz); write one with numpy.save")
        file.seek(0)
        # A KeyError for another version is one of the errors of damaged bytes.
        read_header = _HEADERS[np.lib.format.read_magic(file)]
        shape, by_column, dtype = read_header(file)
        begin = file.tell()
        # Checked first: reading allocates the size in the header.
        num_missing = math.prod(shape) * dtype.itemsize - (file.seek(0, os.SEEK_END) - begin)
        if dtype.kind not in "biuf":
            raise ValueError(f"it holds {dtype}")
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {shape}")
        if num_missing > 0:
            raise ValueError(f"its header promises {num_missing:,} bytes more than there are")
        return NpyHeader(shape, by_column, dtype, begin)
    except _DAMAGE as error:
        raise undecodable(
            f"{name} is not a .npy file of numbers ({error}); write it with numpy.save"
        ) from None


def read_npy(file: BinaryIO, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
    """Return the array in a `.npy` file, or its rows `first` to `last`; only those are read.

    Raises MediaError for a file that is no array of numbers.
    """
    header = read_npy_header(file, name)
    shape, dtype = header.shape, header.dtype
    if not shape or header.by_column:  # a row is spread over the file
        file.seek(header.begin)
        array = np.frombuffer(file.read(math.prod(shape) * dtype.itemsize), dtype)
        array = array.reshape(shape[::-1]).T
        return array[first:last] if shape else array
    last = shape[0] if last is None else min(last, shape[0])
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    file.seek(header.begin + first * row_bytes)
    array = np.frombuffer(file.read((last - first) * row_bytes), dtype)
    return array.reshape(last - first, *shape[1:])


def npy_bytes(numbers: Any) -> bytes:
    """Return numbers as the bytes of a float32 `.npy` file.

    Raises MediaError for lists of different lengths and for other values than numbers.
    """
    file = io.BytesIO()
    try:
        with np.errstate(over="ignore"):  # the modality refuses the infinity with its position
            np.save(file, np.asarray(numbers, dtype=np.float32), allow_pickle=False)
    except (TypeError, ValueError, OverflowError):
        raise undecodable(
            f"expected a list of numbers, or of equally long ones, got {str(numbers)[:80]!r}"
        ) from None
    return file.getvalue()
