"""Vectors of your own: embeddings or raw sensor values from a list, an array or a `.npy` file.

Border: no encoder weights. Values pass through; the projector standardizes them with statistics
fitted on the training rows and saved beside its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch, shorten
from multi_token.media.series import header_shape, read_npy
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.modalities.base import AnyProjector, Encoder, Modality
from multi_token.projectors.kinds import Expand
from multi_token.types import Features, Prepared


class VectorEncoder(Encoder):
    """Hands the vectors on as features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, **inputs: Tensor) -> Features:
        """`values` [items, length, dim], `mask` [items, length]."""
        return Features(values=inputs["values"].float(), mask=inputs["mask"].bool())


class VectorModality(Modality):
    """A vector [dim], or a sequence of them [length, dim], as one item."""

    kit_example: ClassVar[str] = "multi_token.testing.vector:vector_example"

    type: Literal["vector"] = "vector"  # type: ignore[reportIncompatibleVariableOverride]
    dim: int = Field(gt=0)
    """Numbers in one vector."""
    projector: AnyProjector = Field(default_factory=lambda: Expand(factor=4))

    def load(self, source: Any, fetch: Fetch) -> np.ndarray:
        """A list, tuple, array, tensor or the path of a `.npy` file -> float array."""
        if isinstance(source, Tensor):
            source = source.detach().cpu().numpy()
        if isinstance(source, (list, tuple, np.ndarray)):
            name, raw = "the row's list of numbers", source
        elif isinstance(source, Mapping):
            raise MediaError(
                f"expected a list of numbers or a .npy file for a vector, got {source!r}",
                kind="undecodable",
            )
        else:
            name = shorten(source) if isinstance(source, str) else "the bytes given"
            raw = read_npy(fetch.read(source), name)
        try:
            with np.errstate(over="ignore"):  # what becomes infinite is refused by `prepare`
                return np.asarray(raw, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise MediaError(
                f"expected numbers in {name}, got {str(raw)[:80]!r}", kind="undecodable"
            ) from None

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """From the header of a `.npy` file; numbers in the row are read, since they are there."""
        if isinstance(source, (list, tuple, np.ndarray, Tensor)):
            return self.prepare(self.load(source, fetch)).num_features
        if isinstance(source, Mapping):
            return None
        name = shorten(source) if isinstance(source, str) else "the bytes given"
        shape = header_shape(source, fetch, name)
        if len(shape) not in (1, 2) or shape[-1] != self.dim or shape[0] == 0:
            return None
        return 1 if len(shape) == 1 else shape[0]

    def prepare(self, raw: Any) -> Prepared:
        """[dim] or [length, dim] -> values [length, dim]. Raises MediaError: wrong shape, NaN."""
        array = np.asarray(raw, dtype=np.float32)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[1] != self.dim or array.shape[0] == 0:
            raise MediaError(
                f"expected a vector of {self.dim} numbers or a sequence of them, got shape "
                f"{tuple(np.shape(raw))}; set `dim` in the recipe to what the rows hold",
                kind="undecodable",
            )
        finite = np.isfinite(array)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise MediaError(
                f"a vector holds {array[row, column]} at position {column}"
                + (f" of step {row}" if len(array) > 1 else "")
                + f" ({int((~finite).sum())} such values in all); remove or fill them",
                kind="undecodable",
            )
        values = torch.from_numpy(array.copy())
        return Prepared(
            inputs={"values": values, "mask": torch.ones(len(values), dtype=torch.bool)},
            num_features=len(values),
        )

    def example_sources(self) -> Sequence[list[float]]:
        """Return one vector."""
        return [[0.5] * self.dim]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return files of numbers."""
        return [FILE_KINDS["vector"]]

    def build_encoder(self) -> VectorEncoder:
        return VectorEncoder(self.dim)
