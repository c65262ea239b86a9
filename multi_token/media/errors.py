"""Errors of media: one sentence that says what is wrong with an item and what to change."""

from __future__ import annotations

from multi_token.errors import MediaError


def undecodable(message: str) -> MediaError:
    """Return the error of an item that is there and cannot be decoded, or is over a limit."""
    return MediaError(message, kind="undecodable")


def missing_file(message: str) -> MediaError:
    """Return the error of an item whose bytes cannot be read."""
    return MediaError(message, kind="missing_file")
