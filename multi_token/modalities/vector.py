"""Precomputed vectors: embeddings or sensor values from a list, an array or a `.npy` file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, shorten, source_name
from multi_token.media.npy import open_part, read_npy, read_npy_header
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.modalities.base import AnyProjector, Encoder, Modality
from multi_token.projectors.kinds import Expand
from multi_token.types import Fact, Features, Prepared

_SOURCES = ("path", "bytes", "array")


class VectorEncoder(Encoder):
    """Returns the vectors as features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, **inputs: Tensor) -> Features:
        """Return `values` [items, length, dim] with their `mask` [items, length]."""
        return Features(values=inputs["values"].float(), mask=inputs["mask"].bool())


class VectorModality(Modality):
    """A precomputed vector [dim], or a sequence of them [length, dim], as one item.

    Each vector becomes one feature, so an item has features [length, dim]; nothing is encoded.
    """

    kit_example: ClassVar[str] = "multi_token.testing.examples:vector_example"
    fact_names: ClassVar[Mapping[str, str]] = {
        "norm": "Euclidean length of the vector",
        "vector": "number of the vector in its item, from 1",
    }

    type: Literal["vector"] = "vector"  # type: ignore[reportIncompatibleVariableOverride]
    dim: int = Field(gt=0)
    """Numbers in one vector."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        """Return the numbers of a source, float32.

        | source | meaning |
        |---|---|
        | list, tuple, array, tensor | a vector [dim], or several [length, dim] |
        | path, URL, bytes | a `.npy` file with one of both |
        | `{"path": "x.npy", "row": 5}` | row 5 of the file, of which only that row is read |
        | `"[0.5, -1.0]"` | the list in a text, as a CSV holds it |

        Raises:
            MediaError: The source cannot be read, or does not hold numbers.
        """
        source, row = _parse(source)
        if isinstance(source, Tensor):
            source = source.detach().cpu().numpy()
        if isinstance(source, (list, tuple, np.ndarray)):
            name, raw = "the row's list of numbers", source
            if row is not None:
                _check_row(row, len(source), name)
                raw = source[row]
        else:
            name = source_name(source) or "the bytes given"
            with fetch.open(source) if row is None else open_part(source, fetch) as file:
                raw = _read_rows(file, name, row)
        try:
            with np.errstate(over="ignore"):  # `prepare` refuses the infinity with its position
                return np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise undecodable(f"expected numbers in {name}, got {str(raw)[:80]!r}") from None

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of vectors; numbers in the row are read."""
        inner, row = _parse(source)
        if isinstance(inner, (list, tuple, np.ndarray, Tensor)):
            return len(self.prepare(self.load(source, fetch)).inputs["values"])
        # A list is in memory and is checked; a file is counted by its header.
        name = source_name(inner) or "the bytes given"
        with open_part(inner, fetch) as file:
            shape = read_npy_header(file, name).shape
        if row is not None:
            _check_row(row, shape[0] if shape else 0, name)
            shape = shape[1:]
        if len(shape) not in (1, 2) or shape[-1] != self.dim or shape[0] == 0:
            return None
        return 1 if len(shape) == 1 else shape[0]

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return the numbers as bytes; the key of cached features."""
        inner, row = _parse(source)
        if row is None and not isinstance(inner, (list, tuple, np.ndarray, Tensor)):
            return super().content(inner, fetch)
        # Not the bytes of the file: each row of a large one would be hashed with all of it.
        array = self.load(source, fetch)
        return f"{array.shape}".encode() + array.tobytes()

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """Return the path or URL that a source names; None for a list in a text."""
        return None if _is_list_text(source) else super().named_file(source)

    def count_features(self, size: int) -> int:
        """Return the number of features of `size` vectors: one for each."""
        return size

    def prepare(self, raw: Any) -> Prepared:
        """Return `values` float32 [length, dim] and their `mask` [length].

        Raises:
            MediaError: The shape is not [dim] or [length, dim], or a value is NaN or inf.
        """
        array = np.asarray(raw, dtype=np.float32)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[1] != self.dim or array.shape[0] == 0:
            raise undecodable(
                f"expected a vector of {self.dim} numbers or a sequence of them, got shape "
                f"{tuple(np.shape(raw))}; set `dim` in the recipe to what the rows hold"
            )
        # One NaN makes every loss of its batch NaN, so it is refused with its position.
        finite = np.isfinite(array)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise undecodable(
                f"a vector holds {array[row, column]} at position {column}"
                + (f" of step {row}" if len(array) > 1 else "")
                + f" ({int((~finite).sum())} such values in all); remove or fill them"
            )
        # Copied: arrays of memory maps and tables may be read-only.
        values = torch.from_numpy(array.copy())
        return Prepared(
            inputs={"values": values, "mask": torch.ones(len(values), dtype=torch.bool)},
            num_features=self.count_features(len(values)),
            # only on demand, since an item may have thousands of vectors
            facts=() if self.facts is None else _facts(array),
        )

    def example_sources(self) -> Sequence[list[float]]:
        """Return one vector."""
        return [[0.5] * self.dim]

    def usual_columns(self) -> Sequence[tuple[str, ...]]:
        """Return names of columns of numbers."""
        return [("embedding", "embeddings", "vector", "vectors", "features", "emb")]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return files of numbers."""
        return [FILE_KINDS["vector"]]

    def build_encoder(self) -> VectorEncoder:
        """Return the encoder, which has no weights."""
        return VectorEncoder(self.dim)


def _facts(array: np.ndarray) -> tuple[Fact, ...]:
    norms = np.linalg.norm(array.astype(np.float64), axis=1)
    return tuple(Fact({"norm": float(n), "vector": i + 1}, i) for i, n in enumerate(norms))


def _parse(source: Any) -> tuple[Any, int | None]:
    """Numbers or a file, and the row of it that is meant. Raises MediaError."""
    if _is_list_text(source):
        try:
            return json.loads(source), None
        except (ValueError, RecursionError) as error:  # `[[[[...`, thousands of them
            raise undecodable(
                f"expected a list of numbers, got {source[:80]!r} ({error})"
            ) from None
    if not isinstance(source, Mapping):
        return source, None
    given = {key: value for key, value in source.items() if value is not None}
    inner = [given[key] for key in _SOURCES if key in given]
    row = given.get("row")
    is_row = row is None or (isinstance(row, (int, np.integer)) and not isinstance(row, bool))
    if len(inner) != 1 or not given.keys() <= {*_SOURCES, "row"} or not is_row:
        raise undecodable(
            'expected a list of numbers, a .npy file or {"path": "x.npy", "row": 5} for a vector, '
            f"got {shorten(repr(source))}"
        )
    return inner[0], None if row is None else int(row)


def _is_list_text(source: Any) -> bool:
    return isinstance(source, str) and source.lstrip()[:1] == "["


def _check_row(row: int, num_rows: int, name: str) -> None:
    if not 0 <= row < num_rows:
        raise undecodable(f"{name} has {num_rows:,} rows, from 0, and the item names row {row:,}")


def _read_rows(file: BinaryIO, name: str, row: int | None) -> np.ndarray:
    if row is None:
        return read_npy(file, name)
    shape = read_npy_header(file, name).shape
    _check_row(row, shape[0] if shape else 0, name)
    file.seek(0)
    return read_npy(file, name, row, row + 1)[0]
