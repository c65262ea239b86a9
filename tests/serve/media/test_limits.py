"""Limits of one media item: decoders refuse it early, with one sentence for the client."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits
from multi_token.serve.media.protocol import (
    decode_frame,
    encode_frame,
    serialize_source,
    tensor_blobs,
    tensors_of,
)
from multi_token.serve.media.worker import decode_item
from multi_token.serve.media.worker_process import _parse_result
from multi_token.serve.media_embeddings import content_key
from multi_token.testing.files import write_pdf
from multi_token.types import Prepared
from tests.serve.untrusted import MIB, little_memory, prepare, refusal

SETUP = {"max_bytes": 8 * MIB, "max_prepared_bytes": 64 * MIB}


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -1.0])
def test_a_size_that_is_no_size_is_refused(size: float) -> None:
    described, blobs = tensor_blobs({"values": torch.zeros(2)})
    blobs = [memoryview(blob) for blob in blobs]
    header = {"size": {"pixels": size}, "num_features": 1, "tensors": described, "facts": []}
    with pytest.raises(ServeError, match="cannot be decoded"):
        _parse_result(header, blobs)
    assert _parse_result({**header, "size": {"pixels": 4}}, blobs).sizes["pixels"] == 4


# --- limits of a modality


def test_limits_lower_what_a_modality_allows_and_raise_nothing(
    all_modalities: dict[str, Any],
) -> None:
    low = MediaLimits(max_pixels=100, max_seconds=1.0).model_dump()
    high = MediaLimits(max_pixels=10**12).model_dump()
    image, speech = all_modalities["image"], all_modalities["speech"]
    assert image.with_limits(low).max_pixels == 100
    assert speech.with_limits(low).max_seconds == 1.0
    assert image.with_limits(high) == image
    vector = all_modalities["vector"]
    assert vector.with_limits(low) == vector


def test_every_limit_of_a_built_in_modality_is_lowered_by_the_server(
    all_modalities: dict[str, Any],
) -> None:
    """A new field `max_...` has the name of a limit, is in its class's `limit_fields`, or is named
    here with the reason."""
    lowest = MediaLimits(**dict.fromkeys(MediaLimits.model_fields, 1)).model_dump()
    bounded_by_others = {"max_chunks", "max_length"}  # by max_characters
    for modality in all_modalities.values():
        fields = type(modality).model_fields
        if "num_frames" in fields:  # the limit is never below `num_frames`
            modality = modality.model_copy(update={"num_frames": 1})
        for name in fields:
            if name.startswith("max_") and name not in bounded_by_others:
                assert getattr(modality.with_limits(lowest), name) == 1, (modality.type, name)


def test_a_video_keeps_the_number_of_frames_that_its_encoder_takes(
    all_modalities: dict[str, Any],
) -> None:
    video = all_modalities["video"].model_copy(
        update={"fps": None, "num_frames": 8, "max_frames": 128}
    )
    low = video.with_limits(MediaLimits(max_frames=4, max_video_pixels=8_000).model_dump())
    assert (low.num_frames, low.max_frames) == (8, 8)
    assert low.max_pixels == 1_000
    assert type(low).model_validate(low.model_dump()) == low


# --- paths


def secret_sources(path: str) -> list[Any]:
    inner = [path, f"file://{path}", os.path.relpath(path), f"/../../../..{path}"]
    inner += [
        "/etc/passwd",
        "/proc/self/environ",
        "config.json",
        "~/config.json",
        "http://127.0.0.1/",
    ]
    shapes: list[Any] = []
    for text in inner:
        shapes += [text, {"path": text}, {"bytes": text}, {"array": text}, {"array": [text]}]
        shapes += [
            [text],
            [[text]],
            {"path": text, "start": 0},
            {"array": text, "sampling_rate": 1},
        ]
        shapes += [{kind: text} for kind in ("image", "audio", "video")]
        shapes += [{kind: {"path": text}} for kind in ("image", "audio", "video")]
    return shapes


def test_a_worker_does_not_read_a_path(all_modalities: dict[str, Any], tmp_path: Path) -> None:
    """The second check: the pool sends no path to a worker (test_pool.py)."""
    (tmp_path / "real").write_bytes(b"word " * 100)
    path = str(tmp_path / "link")
    os.symlink(tmp_path / "real", path)
    for name in all_modalities:
        for source in secret_sources(path):
            if name == "text" and isinstance(source, str):
                continue
            request = encode_frame(
                {"modality": name, "source": serialize_source(source, max_numbers=100)[0]}
            )
            header, _ = decode_frame(decode_item(all_modalities, request, SETUP)[0])
            assert header.get("fault") in ("media", "error"), (name, source, header)


def test_a_text_that_looks_like_a_path_is_a_text(
    all_modalities: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "./page.txt"
    Path(path).write_text("word " * 100)
    for name, source in (("document", {"text": path}), ("text", path), ("joint", {"text": path})):
        ids = [key for key in prepare(all_modalities[name], source).inputs if "input_ids" in key]
        request = encode_frame(
            {"modality": name, "source": serialize_source(source, max_numbers=9)[0]}
        )
        header, blobs = decode_frame(bytearray(decode_item(all_modalities, request, SETUP)[0]))
        found = tensors_of(header["tensors"], blobs)[ids[0]]
        assert torch.equal(found, prepare(all_modalities[name], source).inputs[ids[0]])
        assert found.numel() < 100  # the letters of the path, not the file's hundred words


# --- documents


def test_a_pdf_has_limits_of_pages_and_characters(
    all_modalities: dict[str, Any], tmp_path: Path
) -> None:
    few = write_pdf(tmp_path / "few.pdf", ["one two three"] * 5).read_bytes()
    many = write_pdf(tmp_path / "many.pdf", ["one two three"] * 6).read_bytes()
    long = write_pdf(tmp_path / "long.pdf", ["\n".join(["one two three"] * 500)]).read_bytes()
    document = all_modalities["document"]
    assert prepare(document, few).num_features > 0
    assert "6 pages" in refusal(document, many)
    assert "the limit is 5,000" in refusal(document, long)
    lies = many.replace(b"/Count 6", b"/Count 1")
    assert "6 pages" in refusal(document, lies)


def test_an_archive_is_not_unpacked(all_modalities: dict[str, Any]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", bytes(2 * MIB))
    with little_memory(2):
        assert "ZIP" in refusal(all_modalities["document"], file.getvalue())


def test_a_long_text_is_refused(all_modalities: dict[str, Any]) -> None:
    for name, source in (
        ("document", b"word " * 2_000),
        ("document", {"text": "word " * 2_000}),
        ("text", "word " * 2_000),
        ("document", b"<html><body>" + b"<p>word " * 2_000),
        ("joint", {"text": "word " * 2_000}),
    ):
        assert "the limit is 5,000" in refusal(all_modalities[name], source)


# --- numbers


def npy(array: Any, **header: str) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    data = file.getvalue()
    for old, new in header.items():
        before, after = {"shape": (str(array.shape), new)}[old]
        # the header is padded with blanks, so that its length stays
        longer = len(after) - len(before)
        data = data.replace(before.encode() + b", }" + b" " * longer, after.encode() + b", }")
    return data


@pytest.mark.parametrize("name", ["vector", "timeseries"])
def test_an_array_whose_header_claims_missing_bytes_is_refused(
    all_modalities: dict[str, Any], name: str
) -> None:
    array = np.zeros((8, 4 if name == "vector" else 2), np.float32)
    for shape in ("(1099511627776,)", "(1099511627776, 4)", "(16777216, 1048576)", "(-1, 4)"):
        data = npy(array, shape=shape)
        assert shape.encode() in data
        with little_memory(2):
            assert "not a .npy file of numbers" in refusal(all_modalities[name], data)


@pytest.mark.parametrize("name", ["vector", "timeseries"])
def test_an_array_holds_finite_numbers_and_nothing_else(
    all_modalities: dict[str, Any], name: str, tmp_path: Path
) -> None:
    width = 4 if name == "vector" else 2
    good = np.random.default_rng(0).normal(size=(8, width)).astype(np.float32)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    several = io.BytesIO()
    np.savez(several, a=good)
    nest = npy(good).replace(b"'fortran_order': False", b"'fortran_order': " + b"(" * 5)
    for data in (
        pickled.getvalue(),
        several.getvalue(),
        npy(np.full((8, width), np.nan)),
        npy(np.full((8, width), -np.inf)),
        npy(np.full((8, width), 1e300)),
        npy(np.zeros((8, width), complex)),
        npy(np.array([["a"] * width])),
        npy(np.zeros(8, [("a", "f4"), ("b", "f4")])),
        npy(np.zeros((0, width))),
        nest,
        npy(good)[:-1],
        b"\x93NUMPY\x09\x00",
        b"\x93NUMPY",
    ):
        refusal(all_modalities[name], data)
    for same in (np.asfortranarray(good), good.astype(">f4"), good.astype(np.float64)):
        found = prepare(all_modalities[name], npy(same)).inputs
        here = prepare(all_modalities[name], npy(good)).inputs
        assert all(torch.allclose(found[key], here[key]) for key in here)


# --- cache keys of items


def test_items_that_differ_only_in_palette_or_shape_have_different_keys(
    all_modalities: dict[str, Any],
) -> None:
    def palette(colour: tuple[int, int, int]) -> bytes:
        image = Image.new("P", (8, 8))
        image.putpalette(colour * 256)
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    def key(name: str, source: Any) -> str:
        return content_key(name, prepare(all_modalities[name], source), "tenant")

    assert key("image", palette((255, 0, 0))) != key("image", palette((0, 0, 255)))
    assert key("image", palette((255, 0, 0))) == key("image", palette((255, 0, 0)))
    numbers = np.arange(8, dtype=np.float32)
    assert key("vector", npy(numbers.reshape(2, 4))) != key("vector", npy(numbers[:4]))
    one = Prepared({"values": torch.arange(8.0).reshape(2, 4)}, 2)
    other = Prepared({"values": torch.arange(8.0).reshape(4, 2)}, 2)
    bits = Prepared({"values": torch.arange(8.0).reshape(2, 4).view(torch.int32)}, 2)
    assert len({content_key("vector", p, "t") for p in (one, other, bits)}) == 3
