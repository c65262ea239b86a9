"""What JSON, Arrow and pandas call a list, a number or the same, and how messages call a value.

Border: single values; what a row means is formats.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def as_list(value: Any) -> list[Any] | None:
    """A list for what JSON, Arrow or pandas calls one; None for a text, bytes or single thing."""
    if isinstance(value, np.ndarray):
        return list(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(value)
    return None


def is_number(value: Any) -> bool:
    """Whether it is a number; a truth value is none."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def type_name(value: Any) -> str:
    """What messages call a value that was not expected."""
    if value is None:
        return "empty (null)"
    names = {str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    if isinstance(value, Mapping):
        return f"an object with the fields {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, (list, tuple)):
        return "a list"
    return names.get(type(value), f"of type {type(value).__name__}")


def values_equal(a: Any, b: Any) -> bool:
    """Whether two values say the same, arrays and whatever holds them included.

    A null field is an absent one: a table has a column in every row.
    """
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        ours, theirs = ({k: v for k, v in x.items() if v is not None} for x in (a, b))
        return ours.keys() == theirs.keys() and all(values_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and a.dtype != object:
        return a.dtype == b.dtype and np.array_equal(a, b)
    ours, theirs = as_list(a), as_list(b)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(map(values_equal, ours, theirs))
    return type(a) is type(b) and bool(a == b)
