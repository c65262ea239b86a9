"""Frames between the server and its media workers: a JSON header and raw bytes, no pickles.

    frame length (8 bytes) | header length (8 bytes) | header (JSON, with "sizes") | blobs

Both sides parse frames with bounds, since a decoder that was taken over may write any bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multi_token.media.errors import undecodable
from multi_token.media.fetch import MIB

_LENGTH = struct.Struct(">Q")
_CHUNK_BYTES = MIB
_MAX_DEPTH = 16


def encode_frame(header: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Encode a header and its blobs as one frame."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode("ascii")
    body = [_LENGTH.pack(len(text)), text, *blobs]
    return b"".join([_LENGTH.pack(sum(map(len, body))), *body])


def read_frame(read: Callable[[int], bytes], *, most: int) -> bytes | None:
    """Read the next frame; None at the end of the input.

    `read(n)` returns up to n bytes, and none at the end. Raises EOFError for an incomplete frame
    and ValueError for one longer than `most` bytes.
    """
    start = read(_LENGTH.size)
    if not start:
        return None
    start += _read_exactly(read, _LENGTH.size - len(start))
    (length,) = _LENGTH.unpack(start)
    if length > most:
        raise ValueError(f"a frame of {length} bytes, more than {most}")
    return start + _read_exactly(read, length)


def decode_frame(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Split a frame into header and blobs. Raises ValueError, LookupError or TypeError."""
    start = 2 * _LENGTH.size
    (length,) = _LENGTH.unpack(frame[_LENGTH.size : start])
    header = json.loads(frame[start : start + length])
    at = start + length
    blobs: list[bytes] = []
    for size in header.pop("sizes"):
        blobs.append(frame[at : at + size])
        at += size
    if at != len(frame):
        raise ValueError("the frame's length differs from the sum of its header's sizes")
    return header, blobs


def _read_exactly(read: Callable[[int], bytes], size: int) -> bytes:
    # In chunks: a header that claims a huge size must not allocate it before the bytes arrive.
    data = bytearray()
    while len(data) < size:
        chunk = read(min(size - len(data), _CHUNK_BYTES))
        if not chunk:
            raise EOFError("an incomplete frame")
        data += chunk
    return bytes(data)


def serialize_source(source: Any, *, max_numbers: int) -> tuple[Any, list[bytes]]:
    """Split a source into a JSON tree and its bytes; the tree holds the index of each blob.

    A source is bytes, text, a number, or nested lists and mappings of them. Raises MediaError for
    anything else, and for more than `max_numbers` list items.
    """
    blobs: list[bytes] = []
    num_left = max_numbers

    def pack(value: Any, depth: int) -> Any:
        nonlocal num_left
        if depth > _MAX_DEPTH:
            raise undecodable(f"lists are nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, (bytes, bytearray, memoryview)):
            blobs.append(bytes(value))
            return {"bytes": len(blobs) - 1}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise undecodable("expected strings as keys of an object")
            return {"object": {key: pack(inner, depth + 1) for key, inner in value.items()}}
        if isinstance(value, (list, tuple)):
            num_left -= len(value)
            if num_left < 0:
                raise undecodable(
                    f"the item has more than {max_numbers:,} numbers, the limit; send a part of it"
                )
            # Long series: one check instead of a call of `pack` for each number.
            if all(type(inner) in (int, float) for inner in value):
                return list(value)
            return [pack(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise undecodable(
            f"expected bytes, text, numbers, lists or objects of them, got {type(value).__name__}"
        )

    return pack(source, 0), blobs


def deserialize_source(tree: Any, blobs: Sequence[bytes]) -> Any:
    """Rebuild the source from its tree and blobs."""
    if isinstance(tree, list):
        return [deserialize_source(inner, blobs) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    if "bytes" in tree:
        return blobs[tree["bytes"]]
    return {key: deserialize_source(inner, blobs) for key, inner in tree["object"].items()}
