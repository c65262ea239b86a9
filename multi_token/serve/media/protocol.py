"""Frames between the server and its media workers: a JSON header and raw bytes, no pickles.

    frame length (8 bytes) | header length (8 bytes) | header (JSON, with "sizes") | blobs

Blobs are not copied on the way: a frame is written in parts, and read into one buffer. Both sides
parse frames with bounds, since a decoder that was taken over may write any bytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multi_token.media.errors import undecodable
from multi_token.media.fetch import MIB

_LENGTH = struct.Struct(">Q")
_CHUNK_BYTES = MIB
_MAX_DEPTH = 16
_ALIGNMENT = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}
"""Types of the tensors in a reply, by name."""

Buffer = bytes | bytearray | memoryview


def frame_parts(header: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> list[Buffer]:
    """Return the parts of a frame in their order."""
    text = json.dumps({**header, "sizes": [len(blob) for blob in blobs]}).encode("ascii")
    # Blanks after the JSON: the first blob starts where tensors of any type may start.
    text += b" " * (-(2 * _LENGTH.size + len(text)) % _ALIGNMENT)
    body = [_LENGTH.pack(len(text)), text, *blobs]
    return [_LENGTH.pack(sum(map(len, body))), *body]


def encode_frame(header: Mapping[str, Any], blobs: Sequence[Buffer] = ()) -> bytes:
    """Encode a header and its blobs as one frame."""
    return b"".join(frame_parts(header, blobs))


def read_frame(
    read: Callable[[int], bytes],
    *,
    most: int,
    before_body: Callable[[int], object] | None = None,
) -> bytearray | None:
    """Read the next frame; None at the end of the input.

    `read(n)` returns up to n bytes, and none at the end. `before_body` is called with the frame's
    length before the frame is read. Raises EOFError for an incomplete frame and ValueError for one
    longer than `most` bytes.
    """
    frame = bytearray(read(_LENGTH.size))
    if not frame:
        return None
    _read_until(read, frame, _LENGTH.size)
    (length,) = _LENGTH.unpack(frame)
    if length > most:
        raise ValueError(f"a frame of {length} bytes, more than {most}")
    if before_body is not None:
        before_body(length)
    _read_until(read, frame, _LENGTH.size + length)
    return frame


def decode_frame(frame: bytes | bytearray) -> tuple[dict[str, Any], list[memoryview]]:
    """Split a frame into header and blobs, which share its memory.

    Raises ValueError, LookupError or TypeError.
    """
    start = 2 * _LENGTH.size
    (length,) = _LENGTH.unpack(frame[_LENGTH.size : start])
    header = json.loads(frame[start : start + length])
    at = start + length
    blobs: list[memoryview] = []
    for size in header.pop("sizes"):
        blobs.append(memoryview(frame)[at : at + size])
        at += size
    if at != len(frame):
        raise ValueError("the frame's length differs from the sum of its header's sizes")
    return header, blobs


def _read_until(read: Callable[[int], bytes], frame: bytearray, size: int) -> None:
    # In chunks: a header that claims a huge size must not allocate it before the bytes arrive.
    while len(frame) < size:
        chunk = read(min(size - len(frame), _CHUNK_BYTES))
        if not chunk:
            raise EOFError("an incomplete frame")
        frame += chunk


def drop_frame(read: Callable[[int], bytes], length: int) -> None:
    """Read the `length` bytes after a frame's first length, and keep none. Raises EOFError."""
    while length:
        chunk = read(min(length, _CHUNK_BYTES))
        if not chunk:
            raise EOFError("an incomplete frame")
        length -= len(chunk)


def tensor_blobs(tensors: Mapping[str, Tensor]) -> tuple[list[list[Any]], list[Buffer]]:
    """Return the name, dtype and shape of each tensor, and its bytes."""
    described: list[list[Any]] = []
    blobs: list[Buffer] = []
    # The widest first, so that each starts at a multiple of its own size.
    for name, tensor in sorted(tensors.items(), key=lambda pair: -pair[1].element_size()):
        values = tensor.detach().cpu().contiguous()
        described.append([name, str(values.dtype).removeprefix("torch."), list(values.shape)])
        blobs.append(values.reshape(-1).view(torch.uint8).numpy().data)
    return described, blobs


def tensors_of(described: Sequence[Any], blobs: Sequence[memoryview]) -> dict[str, Tensor]:
    """Rebuild the tensors of `tensor_blobs`, which share the memory of the blobs.

    Raises ValueError, LookupError or TypeError if anything does not fit.
    """
    tensors: dict[str, Tensor] = {}
    for (name, kind, shape), blob in zip(described, blobs, strict=True):
        dtype = _DTYPES[kind]
        if not isinstance(name, str) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("a tensor without a name or with a wrong shape")
        if math.prod(shape) * dtype.itemsize != len(blob):
            raise ValueError(f"{len(blob)} bytes for a tensor of shape {shape} and type {kind}")
        # `frombuffer` refuses an empty buffer.
        tensors[name] = (
            torch.frombuffer(blob, dtype=dtype).reshape(shape)
            if blob
            else torch.empty(shape, dtype=dtype)
        )
    return tensors


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


def deserialize_source(tree: Any, blobs: Sequence[Buffer]) -> Any:
    """Rebuild the source from its tree and blobs."""
    if isinstance(tree, list):
        return [deserialize_source(inner, blobs) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    if "bytes" in tree:
        return bytes(blobs[tree["bytes"]])
    return {key: deserialize_source(inner, blobs) for key, inner in tree["object"].items()}
