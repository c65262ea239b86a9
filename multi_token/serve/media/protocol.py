"""What travels between the server and its media workers: frames, and sources without their bytes.

Border: JSON and raw bytes, nothing that could run. Who sends what is media_pool.py's and
media_worker.py's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from multi_token.errors import MediaError

_LENGTH = struct.Struct(">Q")
_PIECE = 1024 * 1024
_MAX_DEPTH = 16


def encode_frame(header: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """The length of all that follows, the length of the header, it in JSON, and the blobs."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode("ascii")
    body = [_LENGTH.pack(len(text)), text, *blobs]
    return b"".join([_LENGTH.pack(sum(map(len, body))), *body])


def read_frame(read: Callable[[int], bytes], *, most: int) -> bytes | None:
    """The next frame, as `encode_frame` made it; None where the input ends.

    `read`: at most so many bytes, none at the end. Raises EOFError for half a frame and ValueError
    for one longer than `most`.
    """
    start = read(_LENGTH.size)
    if not start:
        return None
    start += _read_exactly(read, _LENGTH.size - len(start))
    (length,) = _LENGTH.unpack(start)
    if length > most:
        raise ValueError(f"a frame of {length} bytes")
    return start + _read_exactly(read, length)


def decode_frame(whole: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """The header and the blobs of a frame. Raises ValueError, LookupError or TypeError."""
    start = 2 * _LENGTH.size
    (length,) = _LENGTH.unpack(whole[_LENGTH.size : start])
    header = json.loads(whole[start : start + length])
    at = start + length
    blobs: list[bytes] = []
    for size in header.pop("sizes"):
        blobs.append(whole[at : at + size])
        at += size
    if at != len(whole):
        raise ValueError("a frame of another length than its header says")
    return header, blobs


def _read_exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = read(min(size - len(data), _PIECE))
        if not piece:
            raise EOFError("half a frame")
        data += piece
    return bytes(data)


def serialize_source(source: Any, *, max_numbers: int) -> tuple[Any, list[bytes]]:
    """A source as JSON, and the bytes in it, which the JSON names by their place.

    Lists, mappings with names as keys, texts, numbers and bytes may be nested. Raises MediaError
    for anything else, and for more than `max_numbers` numbers.
    """
    blobs: list[bytes] = []
    num_left = max_numbers

    def pack(value: Any, depth: int) -> Any:
        nonlocal num_left
        if depth > _MAX_DEPTH:
            raise _frame_error(f"expected at most {_MAX_DEPTH} lists inside each other, got more")
        if isinstance(value, (bytes, bytearray, memoryview)):
            blobs.append(bytes(value))
            return {"bytes": len(blobs) - 1}
        if isinstance(value, Mapping):
            if not all(isinstance(key, str) for key in value):
                raise _frame_error("expected names as keys of an object")
            return {"object": {key: pack(inner, depth + 1) for key, inner in value.items()}}
        if isinstance(value, (list, tuple)):
            num_left -= len(value)
            if num_left < 0:
                raise _frame_error(
                    f"there are more than {max_numbers:,} numbers, which is the limit; give a part"
                )
            if all(type(inner) in (int, float) for inner in value):
                return list(value)
            return [pack(inner, depth + 1) for inner in value]
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        raise _frame_error(
            f"expected bytes, text, numbers, lists or objects of them, got {type(value).__name__}"
        )

    return pack(source, 0), blobs


def deserialize_source(tree: Any, blobs: Sequence[bytes]) -> Any:
    """The source again."""
    if isinstance(tree, list):
        return [deserialize_source(inner, blobs) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    if "bytes" in tree:
        return blobs[tree["bytes"]]
    return {key: deserialize_source(inner, blobs) for key, inner in tree["object"].items()}


def _frame_error(message: str) -> MediaError:
    return MediaError(message, kind="undecodable")
