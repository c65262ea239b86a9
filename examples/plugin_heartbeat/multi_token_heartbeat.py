"""The sense `heartbeat`: series of numbers, such as the seconds between heartbeats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

from multi_token import Encoder, Features, Modality, Prepared
from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.modalities.base import AnyProjector
from multi_token.projectors.kinds import Pool


class HeartbeatEncoder(Encoder):
    """Three numbers a step: the value, its change, and the square of that."""

    dim = 3

    def forward(self, **inputs: torch.Tensor) -> Features:
        """`series`, `mask` [items, length] -> values [items, length, 3] and the mask."""
        series, mask = inputs["series"].float(), inputs["mask"].bool()
        change = torch.diff(series, dim=1, prepend=series[:, :1])
        return Features(torch.stack([series, change, change**2], dim=-1), mask)


class HeartbeatModality(Modality):
    """A list of numbers, or a text file of them with blanks or line breaks between."""

    type: Literal["heartbeat"] = "heartbeat"  # type: ignore
    projector: AnyProjector = Pool(factor=8)
    max_steps: int = 100_000
    """A longer series is refused."""

    def load(self, source: Any, fetch: Fetch) -> list[float]:
        try:
            is_list = isinstance(source, (list, tuple))
            return [float(x) for x in (source if is_list else fetch.read(source).split())]
        except (TypeError, ValueError) as error:
            raise MediaError(f"expected numbers for heartbeat: {error}", "undecodable") from None

    def prepare(self, raw: Any) -> Prepared:
        if not 0 < len(raw) <= self.max_steps or not all(map(math.isfinite, raw)):
            expected = f"1 to {self.max_steps} finite numbers for heartbeat"
            raise MediaError(f"expected {expected}, got {len(raw)}: {raw[:3]} ...", "undecodable")
        mask = torch.ones(len(raw), dtype=torch.bool)
        return Prepared({"series": torch.tensor(raw), "mask": mask}, num_features=len(raw))

    def build_encoder(self) -> HeartbeatEncoder:
        return HeartbeatEncoder()

    @classmethod
    def example(cls, folder: Path) -> tuple[dict[str, Any], list[Any]]:
        path = folder / "series.txt"
        path.write_text("0.8 0.9 0.7")
        return {}, [[0.81, 0.79, 0.85, 0.8, 0.82], str(path)]
