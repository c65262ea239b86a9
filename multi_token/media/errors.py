"""Errors of media: one sentence that says what is wrong with an item and what to change."""

from __future__ import annotations

import struct
import zlib
from importlib import import_module
from typing import Any

from multi_token.errors import MediaError, MultiTokenError

DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Errors that decoders written in Python raise on damaged bytes; found by tests that damage bytes.
A decoder may add its own."""


def undecodable(message: str) -> MediaError:
    """Return the error of an item that was read and cannot be decoded, or is over a limit."""
    return MediaError(message, kind="undecodable")


def missing_file(message: str) -> MediaError:
    """Return the error of an item whose bytes cannot be read."""
    return MediaError(message, kind="missing_file")


def require_package(package: str, extra: str) -> Any:
    """Import an optional package. Raises MultiTokenError with the line that installs it."""
    try:
        return import_module(package)
    except ModuleNotFoundError:
        raise MultiTokenError(
            f"this item needs the package {package}, which is not installed; "
            f'pip install "multi_token[{extra}]"'
        ) from None
