"""Limits of one uploaded media item; `Modality.with_limits` takes them over.

Border: numbers. They are enforced where things are decoded (media/*), and by media_worker.py for
memory and time.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from multi_token.media.fetch import MIB


class MediaLimits(BaseModel):
    """The most of one media item, refused before or while it is decoded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: PositiveInt = 32 * MIB
    """As it was sent: base64 undone, or downloaded."""
    max_pixels: PositiveInt = 25_000_000
    """Of a picture, or of a frame; read from the header."""
    max_frames: PositiveInt = 64
    """Frames taken of a film, where their number grows with its length."""
    max_film_pixels: PositiveInt = 256_000_000
    """Of all frames taken of a film, together."""
    max_seconds: PositiveFloat = 600.0
    """Of a sound or film; counted while it is decoded, whatever the header says."""
    max_pages: PositiveInt = 200
    """Of a PDF."""
    max_characters: PositiveInt = 400_000
    """Of a document or text."""
    max_numbers: PositiveInt = 4_000_000
    """In lists and arrays."""
    max_prepared_bytes: PositiveInt = 256 * MIB
    """Of what an encoder is given for one item."""
