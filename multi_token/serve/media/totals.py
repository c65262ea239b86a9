"""What the media items of one request are together, beside what each of them may be.

Border: adds up and refuses. limits.py bounds each item, and the process that decodes an item says
what it was (`Modality.size_of`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from multi_token.media.fetch import MIB
from multi_token.serve.errors import ServeError


class RequestMediaLimits(BaseModel):
    """The most of all media items of one request together.

    An item that comes alone has its own limits, and none of these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: PositiveInt = 128 * MIB
    """As they were sent: base64 undone, or downloaded."""
    max_pixels: PositiveInt = 256_000_000
    """Of pictures, and of the frames taken of films."""
    max_frames: PositiveInt = 256
    """Taken of films."""
    max_seconds: PositiveFloat = 1800.0
    """Of sounds."""
    max_characters: PositiveInt = 1_000_000
    """Of documents and texts."""
    max_prepared_bytes: PositiveInt = 512 * MIB
    """Of what encoders are given for them."""
    max_tokens: PositiveInt = 65_536
    """That they take in the prompt; the language model's own length is often less."""


@dataclass(frozen=True)
class MediaSize:
    """What is known of an item by now; each field has its limit in `RequestMediaLimits`."""

    bytes: int = 0
    pixels: int = 0
    frames: int = 0
    seconds: float = 0.0
    characters: int = 0
    prepared_bytes: int = 0
    tokens: int = 0


_LIMIT_TEXTS = {
    "bytes": "bytes",
    "pixels": "pixels",
    "frames": "frames",
    "seconds": "seconds of sound",
    "characters": "characters of documents",
    "prepared_bytes": "bytes for their encoders",
    "tokens": "tokens",
}


class RequestMediaBudget:
    """The sum of one request's items so far. Lives on the event loop: no locks."""

    def __init__(self, limits: RequestMediaLimits, num_items: int) -> None:
        self.limits = limits
        self.num_items = num_items
        self._sums: dict[str, float] = {field.name: 0 for field in fields(MediaSize)}

    def add(self, size: MediaSize) -> None:
        """Count what became known of an item. Raises ServeError (413) if all are too much.

        The sum may be that of a few of them: the others are not decoded any more then.
        """
        for name in self._sums:
            self._sums[name] += getattr(size, name)
            most = getattr(self.limits, f"max_{name}")
            if self._sums[name] > most and self.num_items > 1:
                raise ServeError(
                    f"the {self.num_items} media items of this request have "
                    f"{round(self._sums[name], 1):,.15g} {_LIMIT_TEXTS[name]} as far as they "
                    f"were read, "
                    f"and the limit for all together is {most:,.15g}; send fewer or smaller ones, "
                    "or ask in several requests",
                    status=413,
                    param="messages",
                    code="media_too_large_together",
                )
