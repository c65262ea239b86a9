"""Rows as JSON, Arrow and pandas return them: access by index, ids, and tests on single values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

Row = Mapping[str, Any]
"""One row of a data set: field -> value, as its file has it."""


class IndexedRows(Sequence[Row]):
    """Rows of a file that are read on access; a format implements `__len__` and `row`."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """Read the row at an index from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        numbers = range(len(self))[index]  # negative indexes, and IndexError where there is no row
        return [self.row(i) for i in numbers] if isinstance(numbers, range) else self.row(numbers)


def row_id_of(index: int, row: Row | None, source: str) -> str:
    """Return the row's own `id`, or else `file[index]`; messages name rows by it."""
    if isinstance(row, Mapping) and row.get("id") is not None:
        return str(row["id"])
    return f"{Path(source).name}[{index}]"


def as_list(value: Any) -> list[Any] | None:
    """Return a list for a list, tuple or array; None for a text, bytes or single value."""
    # texts first: the test for a Sequence is slow, and nearly all values are texts
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return None
    if isinstance(value, (np.ndarray, Sequence)):
        return list(value)
    return None


def is_number(value: Any) -> bool:
    """Return whether `value` is a number; bool does not count."""
    # bool is a subclass of int, and `[true, false]` in a row is no vector
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def type_name(value: Any) -> str:
    """Describe an unexpected value for a message."""
    if value is None:
        return "empty (null)"
    names = {str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return f"an object with the fields {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, (list, tuple)):
        return "a list"
    return names.get(type(value), f"of type {type(value).__name__}")


def values_equal(a: Any, b: Any) -> bool:
    """Compare two values deeply, arrays and tensors included; a null field equals an absent one."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        # Arrow writes every column into every row, so absent fields come back as null
        ours, theirs = ({k: v for k, v in x.items() if v is not None} for x in (a, b))
        return ours.keys() == theirs.keys() and all(values_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    # an object array may hold arrays, whose == is an array; it is compared as a list below
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype != object:
        return a.dtype == b.dtype and np.array_equal(a, b)
    ours, theirs = as_list(a), as_list(b)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(map(values_equal, ours, theirs))
    return type(a) is type(b) and bool(a == b)
