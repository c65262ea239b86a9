"""Content of items as bytes that are equal only for equal items, and stamps of their sources."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from multi_token.media.biosignal import wfdb_files
from multi_token.media.decoders import encoded_source
from multi_token.media.fetch import Fetch

_READ = ("path", "bytes", "array")
"""Keys of a mapping whose values are sources; the others are settings."""


def digest(*parts: bytes | memoryview) -> str:
    """Hash of several parts, as 32 hexadecimal digits: 128 bits, at which no two items collide."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        # each part is hashed alone: (b"ab", b"c") and (b"a", b"bc") must differ
        total.update(hashlib.blake2b(part, digest_size=32).digest())
    return total.hexdigest()


def content_bytes(source: Any, fetch: Fetch) -> bytes:
    """Return the bytes of a file, or the values of an image or array.

    A mapping (`{"path": ..., "start": 1.5}`) counts with all its keys. Raises MediaError for a
    source that cannot be read.
    """
    source = encoded_source(source)
    if isinstance(source, Image.Image):
        palette = source.getpalette() or []  # one index has different colours in two palettes
        return f"{source.mode}{source.size}{palette}".encode() + source.tobytes()
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray) and source.dtype != object:
        return f"{source.dtype}{source.shape}".encode() + source.tobytes()
    if isinstance(source, Mapping):
        # Sorted, so that the order of keys in a row does not matter.
        pieces = [
            content_bytes(value, fetch)
            if key in _READ and value is not None
            else repr(value).encode()
            for key, value in sorted(source.items())
        ]
        # Digests have one length, so two pieces cannot be mistaken for one longer piece.
        digests = b"".join(hashlib.sha256(piece).digest() for piece in pieces)
        return repr(sorted(source)).encode() + digests
    if isinstance(source, (list, tuple, np.ndarray)):  # an array of objects: a column of a table
        try:
            array = np.asarray(source, dtype=np.float64)
        except (TypeError, ValueError):
            return repr(source).encode()  # other values: loading them raises
        return f"{array.shape}".encode() + array.tobytes()
    return fetch.read(source)


class NoStamp(Exception):
    """A source without a value that changes with its content."""


def source_stamp(source: Any, fetch: Fetch) -> Any:
    """Return a value for JSON that changes with the content of a source, which is not decoded.

    A local file counts by path, size and time of change, as does each file of a folder or of a WFDB
    record; a URL by its text, so a changed file there is not noticed; bytes, arrays and images by a
    hash. Raises NoStamp for any other object.
    """
    source = encoded_source(source)
    if isinstance(source, (str, os.PathLike)):
        stamp = fetch.stamp(source)
        # A WFDB record is a header and files of samples, and any of them may change.
        for file in wfdb_files(source, fetch):
            stamp += fetch.stamp(file)
        return [os.fspath(source), *stamp]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return digest(bytes(source))
    if isinstance(source, (Image.Image, np.ndarray, Tensor)):
        return digest(content_bytes(source, fetch))
    if isinstance(source, (bool, int, float)):
        return repr(source)
    if isinstance(source, Mapping):
        # tables write every column into every row, so a null field is an absent one
        pairs = sorted((str(key), value) for key, value in source.items() if value is not None)
        return [[key, source_stamp(value, fetch)] for key, value in pairs]
    if isinstance(source, (list, tuple)):
        try:
            return digest(content_bytes(np.asarray(source, dtype=np.float64), fetch))
        except (TypeError, ValueError):  # a list of paths or mappings
            return [source_stamp(value, fetch) for value in source]
    raise NoStamp
