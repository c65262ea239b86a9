"""Limits of uploaded media: of one item, and of all items of a request together.

`Modality.with_limits` applies the limits of one item, and decoders refuse an item while decoding.
The worker measures each decoded item, and `RequestMediaBudget` sums the sizes of a request.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from multi_token.media.fetch import MIB
from multi_token.serve.errors import ServeError


class MediaLimits(BaseModel):
    """Limits of one media item; `Modality.with_limits` finds a limit by the name of its field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: PositiveInt = 32 * MIB
    """Encoded bytes, after base64 decoding or download."""
    max_pixels: PositiveInt = 25_000_000
    """Pixels of an image or a video frame, read from the header."""
    max_frames: PositiveInt = 64
    """Frames sampled from a video, if a longer video has more of them."""
    max_video_pixels: PositiveInt = 256_000_000
    """Pixels of all frames sampled from a video."""
    max_seconds: PositiveFloat = 600.0
    """Duration of audio or video, counted while decoding: headers may lie."""
    max_pages: PositiveInt = 200
    """Pages of a PDF."""
    max_characters: PositiveInt = 400_000
    """Characters of a document or text."""
    max_numbers: PositiveInt = 4_000_000
    """Numbers in lists and arrays."""
    max_prepared_bytes: PositiveInt = 256 * MIB
    """Bytes of the item's encoder input."""


class RequestMediaLimits(BaseModel):
    """Limits of all media items of one request together; a single item has its own limits only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: PositiveInt = 128 * MIB
    """Encoded bytes, after base64 decoding or download."""
    max_pixels: PositiveInt = 256_000_000
    """Pixels of images and sampled video frames."""
    max_frames: PositiveInt = 256
    """Frames sampled from videos."""
    max_seconds: PositiveFloat = 1800.0
    """Duration of audio."""
    max_characters: PositiveInt = 1_000_000
    """Characters of documents and texts."""
    max_prepared_bytes: PositiveInt = 512 * MIB
    """Bytes of encoder input."""
    max_tokens: PositiveInt = 65_536
    """Media embeddings in the prompt; the language model's context is often shorter."""


SIZE_UNITS = {
    "bytes": "bytes",
    "pixels": "pixels",
    "frames": "frames",
    "seconds": "seconds of audio",
    "characters": "characters of documents",
    "prepared_bytes": "bytes of encoder input",
    "tokens": "tokens",
}
"""Name of a measured size -> its unit in messages; `max_<name>` of a request is its limit."""


class RequestMediaBudget:
    """Sum of the sizes of one request's items. Used on the event loop only: no locks."""

    def __init__(self, limits: RequestMediaLimits, num_items: int) -> None:
        self.limits = limits
        self.num_items = num_items
        self._sums = dict.fromkeys(SIZE_UNITS, 0.0)

    @property
    def num_tokens(self) -> int:
        """Tokens of the items that were added."""
        return int(self._sums["tokens"])

    def add(self, **sizes: float) -> None:
        """Add sizes of one item by name. Raises ServeError (413) when a sum exceeds its limit."""
        # Called as soon as each size is known, so the sum of a few items already refuses the
        # request, and the other items are not decoded.
        for name, size in sizes.items():
            self._sums[name] += size
            limit = getattr(self.limits, f"max_{name}")
            if self._sums[name] > limit and self.num_items > 1:
                total = f"{round(self._sums[name], 1):,.15g} {SIZE_UNITS[name]}"
                raise ServeError(
                    f"the {self.num_items} media items of this request have at least {total} "
                    f"together, and the limit is {limit:,.15g}; send fewer or smaller items, or "
                    "split them into several requests",
                    status=413,
                    param="messages",
                    code="media_too_large_together",
                )
