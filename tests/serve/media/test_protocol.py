"""Frames between server and media workers: round trips, and damaged frames that are refused."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multi_token.errors import MediaError
from multi_token.serve.media.protocol import (
    decode_frame,
    deserialize_source,
    encode_frame,
    read_frame,
    serialize_source,
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
