"""Frames between server and media workers: round trips, and damaged frames that are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multi_token.errors import MediaError
from multi_token.serve.media.protocol import (
    decode_frame,
    deserialize_source,
    encode_frame,
    read_frame,
    serialize_source,
    tensor_blobs,
    tensors_of,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
# "bytes" and "object" are keys of the protocol too
KEYS = st.sampled_from(["bytes", "object", "sizes", "a"]) | st.text(max_size=3)
SOURCES = st.recursive(
    LEAVES | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(SOURCES)
def test_a_source_comes_out_as_it_went_in(source: Any) -> None:
    tree, blobs = serialize_source(source, max_numbers=1_000)
    whole = encode_frame({"source": tree}, blobs)
    read = read_frame(io.BytesIO(whole).read, most=len(whole))
    assert read == whole
    header, again = decode_frame(whole)
    assert deserialize_source(header["source"], again) == source


@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=3), st.integers(min_value=1, max_value=7)
)
def test_frames_are_read_one_by_one_however_they_arrive(blobs: list[bytes], piece: int) -> None:
    stream = io.BytesIO(encode_frame({"a": 1}, blobs) + encode_frame({"b": 2}))

    def read(size: int) -> bytes:
        return stream.read(min(size, piece))

    assert decode_frame(read_frame(read, most=1_000) or b"") == ({"a": 1}, blobs)
    assert decode_frame(read_frame(read, most=1_000) or b"") == ({"b": 2}, [])
    assert read_frame(read, most=1_000) is None


def test_half_a_frame_and_one_that_is_too_long_are_refused() -> None:
    whole = encode_frame({"a": 1}, [b"xyz"])
    for size in range(1, len(whole)):
        with pytest.raises(EOFError):
            read_frame(io.BytesIO(whole[:size]).read, most=1_000)
    with pytest.raises(ValueError, match="a frame of"):
        read_frame(io.BytesIO(whole).read, most=10)


def test_blobs_that_are_not_there_are_not_made_up() -> None:
    whole = encode_frame({"a": 1}, [b"xyz"])
    with pytest.raises(ValueError, match="differs from the sum"):
        decode_frame(whole.replace(b"[3]", b"[9]"))


@pytest.mark.parametrize("source", [object(), {1: 2}, {"a": {3, 4}}, [1.0] * 11, [[0] * 6] * 2])
def test_invalid_sources_are_refused(source: Any) -> None:
    with pytest.raises(MediaError):
        serialize_source(source, max_numbers=10)


def test_tensors_come_out_as_they_went_in_and_share_the_memory_of_their_frame() -> None:
    tensors = {
        "ids": torch.arange(6).reshape(2, 3),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(3, 2).bfloat16(),
        "turned": torch.randn(2, 3).T,
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(1.5),
    }
    described, blobs = tensor_blobs(tensors)
    frame = read_frame(io.BytesIO(encode_frame({"tensors": described}, blobs)).read, most=100_000)
    assert frame is not None
    header, views = decode_frame(frame)
    found = tensors_of(header["tensors"], views)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].data_ptr() % tensor.element_size() == 0
    at = frame.index(bytes(views[0]))
    frame[at : at + len(views[0])] = bytes(len(views[0]))
    assert not found[header["tensors"][0][0]].any()


@pytest.mark.parametrize(
    "described",
    [
        [["x", "float32", [3]]],
        [["x", "float32", [-2, -1]]],
        [["x", "float32", [2.0]]],
        [["x", "float32", [True, 2]]],
        [["x", "complex64", [1]]],
        [["x", "float32"]],
        [["x", "float32", 2]],
        [["x", "float32", [2]], ["y", "float32", [2]]],
        [[7, "float32", [2]]],
        [],
    ],
)
def test_a_description_that_does_not_fit_the_bytes_is_refused(described: Any) -> None:
    with pytest.raises((ValueError, LookupError, TypeError)):
        tensors_of(described, [memoryview(bytearray(8))])


def test_the_length_of_a_frame_is_reported_before_it_is_read() -> None:
    stream = io.BytesIO(encode_frame({"a": 1}, [bytes(100)]))
    reported: list[tuple[int, int]] = []
    frame = read_frame(
        stream.read, most=1_000, before_body=lambda size: reported.append((size, stream.tell()))
    )
    assert frame is not None and reported == [(len(frame) - 8, 8)]
