"""modalities/vector.py: numbers from lists, arrays and files; anything else is a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.modalities.vector import VectorModality

VECTOR = VectorModality(dim=3)


def prepared(source: Any) -> torch.Tensor:
    return VECTOR.prepare(VECTOR.load(source, Fetch())).inputs["values"]


def test_lists_arrays_tensors_and_npy_files_are_read_alike(tmp_path: Path) -> None:
    numbers = [1.0, -2.5, 3.0]
    path = tmp_path / "x.npy"
    np.save(path, np.array(numbers))
    for source in (numbers, np.array(numbers), torch.tensor(numbers), str(path), path.read_bytes()):
        assert torch.equal(prepared(source), torch.tensor([numbers]))


def test_a_sequence_of_vectors_is_one_item_with_as_many_features() -> None:
    item = VECTOR.prepare(np.zeros((7, 3)))
    assert item.num_features == 7


def test_sequences_of_mixed_lengths_are_batched_with_a_mask() -> None:
    items = [VECTOR.prepare(np.ones((n, 3))) for n in (2, 4)]
    features = VECTOR.build_encoder()(**VECTOR.collate(items))
    assert features.mask is not None
    assert features.mask.sum(1).tolist() == [2, 4]
    assert features.values[0, 2:].abs().sum() == 0


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ([1.0, float("nan"), 2.0], "holds nan at position 1"),
        ([1.0, 2.0, float("inf")], "holds inf at position 2"),
        ([1.0, 2.0], r"vector of 3 numbers or a sequence of them, got shape \(2,\)"),
        ([[[1.0]]], r"got shape \(1, 1, 1\)"),
        ([], r"got shape \(0,\)"),
        (["a", "b", "c"], "expected numbers in the row's list"),
        (b"no array", "not a .npy file"),
    ],
)
def test_bad_vectors_are_refused_with_a_sentence(source: Any, sentence: str) -> None:
    with pytest.raises(MediaError, match=sentence) as caught:
        prepared(source)
    assert caught.value.kind == "undecodable"


def test_a_pickled_npy_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match="not a .npy file"):
        prepared(str(path))
