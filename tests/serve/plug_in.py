"""A plug-in modality of a name that the library does not know, with its own facts for a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.sniff import FileKind
from multi_token.modalities.base import Encoder, Modality, OpenAIKind
from multi_token.types import Features, Prepared

decoded: list[str] = []
"""First letters of what this process has decoded."""


class OdourEncoder(Encoder):
    """Each reading and its square."""

    dim = 2

    def forward(self, **inputs: Tensor) -> Features:
        """`readings`, `mask` [items, length] -> values [items, length, 2]."""
        readings = inputs["readings"]
        return Features(torch.stack([readings, readings**2], dim=-1), inputs["mask"])


class OdourModality(Modality):
    """Readings of an electronic nose, one a second, as text with blanks between."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("image",)
    limit_fields: ClassVar[Mapping[str, str]] = {"longest": "max_seconds"}

    type: Literal["odour"] = "odour"  # type: ignore[reportIncompatibleVariableOverride]
    longest: float = 1e9

    def load(self, source: Any, fetch: Fetch) -> list[float]:
        is_list = isinstance(source, (list, tuple))
        words = source if is_list else fetch.read(source).decode().split()
        decoded.append(str(words[0]))
        if len(words) > self.longest:
            raise MediaError(
                f"an odour of {len(words)} s is over the limit of {self.longest:g}", "undecodable"
            )
        return [float(word) for word in words]

    def prepare(self, raw: Any) -> Prepared:
        mask = torch.ones(len(raw), dtype=torch.bool)
        return Prepared({"readings": torch.tensor(raw), "mask": mask}, num_features=len(raw))

    def build_encoder(self) -> OdourEncoder:
        return OdourEncoder()

    def example_sources(self) -> Sequence[bytes]:
        return [b"0.125 0.25"]

    def file_kinds(self) -> Sequence[FileKind]:
        return [FileKind("file", "odours", (".odour",))]

    def size_of(self, raw: Any) -> dict[str, float]:
        return {"seconds": len(raw)}
