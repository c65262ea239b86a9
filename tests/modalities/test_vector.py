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


def test_a_row_of_a_large_array_is_read_alone(tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    path = str(tmp_path / "embeddings.npy")
    np.save(path, table)
    few = Fetch(max_bytes=1000)  # less than the file: only the row counts
    for row in (0, 123, 499):
        source = {"path": path, "row": row}
        assert np.array_equal(VECTOR.load(source, few), table[row])
        assert VECTOR.num_features_from_header(source, few) == 1
        assert VECTOR.content(source, few) == VECTOR.content(table[row], few)
    sequences = VectorModality(dim=3)
    np.save(path, table.reshape(50, 10, 3))
    assert np.array_equal(sequences.load({"path": path, "row": 7}, few), table[70:80])
    assert sequences.num_features_from_header({"path": path, "row": 7}, few) == 10
    np.save(path, np.asfortranarray(table))
    assert np.array_equal(VECTOR.load({"path": path, "row": 7}, Fetch()), table[7])
    with pytest.raises(MediaError, match="500 rows, from 0, and the item names row 500"):
        VECTOR.load({"path": path, "row": 500}, Fetch())
    for wrong in ({"path": path, "row": 1.5}, {"row": 1}, {"path": path, "line": 1}):
        with pytest.raises(MediaError, match="expected a list of numbers, a .npy file or"):
            VECTOR.load(wrong, Fetch())


def test_columns_of_tables_are_read_as_pandas_writes_them(tmp_path: Path) -> None:
    assert prepared("[1.0, -2.5, 3e0]").tolist() == [[1.0, -2.5, 3.0]]
    assert VECTOR.named_file("[1.0]") is None and VECTOR.named_file("x.npy") == "x.npy"
    assert prepared(np.array([1, 2, 3], dtype=object)).tolist() == [[1.0, 2.0, 3.0]]
    with pytest.raises(MediaError, match=r"expected a list of numbers, got '\[1.0, ...'"):
        VECTOR.load("[1.0, ...", Fetch())


def test_a_list_in_a_text_that_is_nested_without_end_is_refused() -> None:
    for read in (VECTOR.load, VECTOR.size_from_header, VECTOR.content):
        with pytest.raises(MediaError, match=r"expected a list of numbers, got '\[\[\[\[.* \(max"):
            read("[" * 100_000, Fetch())
