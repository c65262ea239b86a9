"""collate.py: rows side by side or one after the other, and features of one kind in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multi_token.collate import FEATURES_KEY, Collator
from multi_token.errors import MultiTokenError
from multi_token.types import IGNORE_INDEX, MediaSpan, Prepared, Sample


def test_cached_features_of_different_lengths_are_padded_with_their_mask(model: Any) -> None:
    items = [Prepared({FEATURES_KEY: torch.ones(n, 4)}, num_features=n) for n in (1, 3)]
    batch = Collator(model.modalities, 0).inputs("vector", items)
    assert batch[FEATURES_KEY].shape == (2, 3, 4)
    assert batch["mask"].tolist() == [[True, False, False], [True, True, True]]


def test_items_of_which_only_some_are_cached_are_refused(model: Any) -> None:
    cached = Prepared({FEATURES_KEY: torch.ones(1, 5)}, num_features=1)
    plain = model.modalities["vector"].prepare([0.0, 1.0, 2.0, 3.0, 4.0])
    collate = Collator(model.modalities, 0)
    for items in ([cached, plain, plain], [plain, plain, cached]):
        with pytest.raises(MultiTokenError, match="1 of 3 items of 'vector' come with cached"):
            collate.inputs("vector", items)


def sample(ids: list[int], num_learned: int, place: int | None = None) -> Sample:
    """So many last ids are learned; a vector of two tokens stands at `place`."""
    labels = torch.tensor([IGNORE_INDEX] * (len(ids) - num_learned) + ids[-num_learned:])
    media = Prepared({FEATURES_KEY: torch.full((1, 5), float(ids[0]))}, num_features=1)
    return Sample(
        torch.tensor(ids),
        labels,
        media_spans=[] if place is None else [MediaSpan("vector", place, 2)],
        media=[] if place is None else [media],
    )


def test_a_pack_is_one_row_whose_positions_begin_anew(model: Any) -> None:
    samples = [sample([1, 2, 3, 4], 1, place=1), sample([5, 6], 1), sample([7, 8, 9], 1, place=0)]
    batch = Collator(model.modalities, 0).pack(samples)
    assert batch["input_ids"].tolist() == [list(range(1, 10))]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32, "what flash attention takes"
    assert batch["max_length_q"] == batch["max_length_k"] == 4
    assert "attention_mask" not in batch
    assert batch["media"]["vector"]["positions"].tolist() == [1, 2, 6, 7]
    assert batch["media"]["vector"]["inputs"][FEATURES_KEY][:, 0, 0].tolist() == [1.0, 7.0]


def test_the_last_token_of_a_sample_does_not_predict_the_first_of_the_next(model: Any) -> None:
    samples = [sample([1, 2, 3], 3), sample([4, 5], 2)]
    before = [s.labels.clone() for s in samples]
    batch = Collator(model.modalities, 0).pack(samples)
    assert batch["shift_labels"].tolist() == [[2, 3, IGNORE_INDEX, 5, IGNORE_INDEX]]
    padded = Collator(model.modalities, 0)(samples)
    num_padded = int((padded["shift_labels"] != IGNORE_INDEX).sum())
    assert int((batch["shift_labels"] != IGNORE_INDEX).sum()) == num_padded == 3
    assert all(torch.equal(s.labels, b) for s, b in zip(samples, before, strict=True))
