"""Bytes in, raw media out: one file fetches, every other file decodes one kind."""

from multi_token.media.fetch import Fetch
from multi_token.media.image import decode_image

__all__ = ["Fetch", "decode_image"]
