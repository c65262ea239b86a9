"""How much one item of a stranger may be, and how that is put onto any modality.

Border: numbers. They are enforced where things are decoded (media/*), and by media_worker.py for
memory and time.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from multi_token.modalities.base import Modality

MIB = 1024 * 1024


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


_FIELDS = {
    "max_pixels": "max_pixels",
    "max_frames": "max_frames",
    "max_seconds": "max_seconds",
    "max_pages": "max_pages",
    "max_characters": "max_characters",
    "max_letters": "max_characters",
    "max_steps": "max_numbers",
}
"""Field of a modality -> field of DecodeLimits. A plug-in with a field of such a name has it
lowered as well."""


def apply_limits(modality: Modality, limits: MediaLimits) -> Modality:
    """The modality with its own limits lowered to these; none is raised."""
    fields = type(modality).model_fields
    lowered: dict[str, Any] = {}
    for name, limit in _FIELDS.items():
        own, most = getattr(modality, name, None), getattr(limits, limit)
        if name in fields and _is_number(own) and own > most:
            lowered[name] = most
    if "max_frames" in fields:
        lowered |= _video_limits(modality, limits)
    return modality.model_copy(update=lowered) if lowered else modality


def _video_limits(modality: Modality, limits: MediaLimits) -> dict[str, Any]:
    """The model's own number of frames is what it was trained with, and stays."""
    own: Any = modality
    num_frames = getattr(own, "num_frames", None) or 1
    max_frames = max(min(own.max_frames, limits.max_frames), num_frames)
    lowered = {"max_frames": max_frames}
    max_pixels: Any = getattr(own, "max_pixels", None)
    if _is_number(max_pixels):
        most = max_frames if getattr(own, "fps", None) else num_frames
        lowered["max_pixels"] = min(
            max_pixels, limits.max_pixels, max(1, limits.max_film_pixels // most)
        )
    return lowered


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
