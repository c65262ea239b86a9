"""Precomputed vectors: embeddings or sensor values from a list, an array or a `.npy` file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.series import header_shape, read_npy
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.modalities.base import AnyProjector, Encoder, Modality
from multi_token.projectors.kinds import Expand
from multi_token.types import Features, Prepared


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

    type: Literal["vector"] = "vector"  # type: ignore[reportIncompatibleVariableOverride]
    dim: int = Field(gt=0)
    """Numbers in one vector."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        """Return the numbers of a list, tuple, array, tensor or `.npy` file, float32.

        Raises:
            MediaError: The source cannot be read, or does not hold numbers.
        """
        if isinstance(source, Tensor):
            source = source.detach().cpu().numpy()
        if isinstance(source, (list, tuple, np.ndarray)):
            name, raw = "the row's list of numbers", source
        elif isinstance(source, Mapping):
            raise undecodable(
                f"expected a list of numbers or a .npy file for a vector, got {source!r}"
            )
        else:
            name = source_name(source) or "the bytes given"
            raw = read_npy(fetch.read(source), name)
        try:
            with np.errstate(over="ignore"):  # `prepare` refuses the infinity with its position
                return np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise undecodable(f"expected numbers in {name}, got {str(raw)[:80]!r}") from None

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of vectors; numbers in the row are read."""
        if isinstance(source, (list, tuple, np.ndarray, Tensor)):
            return len(self.prepare(self.load(source, fetch)).inputs["values"])
        if isinstance(source, Mapping):
            return None
        # A list is in memory and is checked; a file is counted by its header.
        shape = header_shape(source, fetch)
        if len(shape) not in (1, 2) or shape[-1] != self.dim or shape[0] == 0:
            return None
        return 1 if len(shape) == 1 else shape[0]

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
