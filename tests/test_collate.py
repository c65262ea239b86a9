"""collate.py: rows side by side or one after the other, and features of one kind in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multi_token.collate import FEATURES_KEY, NEWLINES_KEY, Collator, shared_prefix
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


def sample(ids: list[int], num_supervised: int, start: int | None = None) -> Sample:
    """Return a sample whose last ids are supervised, with a vector of two tokens at `start`."""
    labels = torch.tensor([IGNORE_INDEX] * (len(ids) - num_supervised) + ids[-num_supervised:])
    media = Prepared({FEATURES_KEY: torch.full((1, 5), float(ids[0]))}, num_features=1)
    return Sample(
        torch.tensor(ids),
        labels,
        media_spans=[] if start is None else [MediaSpan("vector", start, 2)],
        media=[] if start is None else [media],
    )


def test_a_pack_is_one_row_whose_positions_begin_again_at_zero(model: Any) -> None:
    samples = [sample([1, 2, 3, 4], 1, start=1), sample([5, 6], 1), sample([7, 8, 9], 1, start=0)]
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


def test_rows_are_padded_on_either_side_and_media_are_placed_in_the_flat_batch(model: Any) -> None:
    samples = [sample([1, 2, 3, 4], 1, start=1), sample([5, 6], 1, start=0)]
    right = Collator(model.modalities, 9)(samples)
    left = Collator(model.modalities, 9, padding_side="left")(samples)
    no = IGNORE_INDEX
    assert right["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert left["input_ids"].tolist() == [[1, 2, 3, 4], [9, 9, 5, 6]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert left["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert right["labels"].tolist() == [[no, no, no, 4], [no, 6, no, no]]
    assert left["labels"].tolist() == [[no, no, no, 4], [no, no, no, 6]]
    assert right["shift_labels"].tolist() == [[no, no, 4, no], [6, no, no, no]]
    assert left["shift_labels"].tolist() == [[no, no, 4, no], [no, no, 6, no]]
    assert right["supervised"].tolist() == [2, 4] and left["supervised"].tolist() == [2, 6]
    assert left["counts"] == right["counts"] and right["counts"].num_supervised == 2
    assert right["media"]["vector"]["positions"].tolist() == [1, 2, 4, 5]
    assert left["media"]["vector"]["positions"].tolist() == [1, 2, 6, 7]
    assert right["input_ids"].dtype == right["labels"].dtype == torch.long
    assert right["media"]["vector"]["positions"].dtype == torch.long


def test_line_ends_of_cached_features_are_padded_beside_them(model: Any) -> None:
    def item(breaks: list[bool]) -> Prepared:
        features = torch.ones(len(breaks), 4)
        return Prepared({FEATURES_KEY: features, NEWLINES_KEY: torch.tensor(breaks)}, len(breaks))

    collate = Collator(model.modalities, 0)
    batch = collate.inputs("vector", [item([False, True]), item([True])])
    assert batch[NEWLINES_KEY].tolist() == [[False, True], [True, False]]
    assert collate.inputs("vector", [item([True])])[NEWLINES_KEY].tolist() == [[True]]
    plain = Prepared({FEATURES_KEY: torch.ones(1, 4)}, 1)
    assert NEWLINES_KEY not in collate.inputs("vector", [plain])


def shown(ids: list[int], num_supervised: int, *vectors: tuple[int, float]) -> Sample:
    """Return a sample with vectors: (start, number in all of its values), two tokens each."""
    labels = torch.tensor(
        [IGNORE_INDEX] * (len(ids) - num_supervised) + ids[len(ids) - num_supervised :]
    )
    return Sample(
        torch.tensor(ids),
        labels,
        media_spans=[MediaSpan("vector", start, 2) for start, _ in vectors],
        media=[Prepared({"values": torch.full((1, 5), number)}, 1) for _, number in vectors],
    )


FIRST = shown([1, 0, 0, 2, 3, 4, 5], 2, (1, 7.0))


@pytest.mark.parametrize(
    ("others", "tokens", "items"),
    [
        # up to where ids differ, or a token is supervised, or the shorter one has its last token
        ([shown([1, 0, 0, 2, 9, 4, 5], 2, (1, 7.0))], 4, 1),
        ([shown([1, 0, 0, 2, 3, 4, 9], 2, (1, 7.0))], 4, 1),
        ([shown([1, 0, 0, 2, 3, 4, 5], 3, (1, 7.0))], 3, 1),
        ([shown([1, 0, 0, 2], 0, (1, 7.0))], 3, 1),
        # before media that are cut by the end, are others, are not there or stand elsewhere
        ([shown([1, 0, 0], 0, (1, 7.0))], 1, 0),
        ([shown([1, 0, 0, 2, 3, 4, 5], 2, (1, 8.0))], 1, 0),
        ([shown([1, 0, 0, 2, 3, 4, 5], 2)], 1, 0),
        ([shown([0, 0, 0, 2, 3, 4, 5], 2, (1, 7.0))], 0, 0),
        ([shown([1, 0, 0, 0, 3, 4, 5], 2, (2, 7.0))], 1, 0),
        # of all, not of the first two alone
        ([shown([1, 0, 0, 2, 9, 4, 5], 2, (1, 7.0)), shown([1, 0, 0, 9, 9], 1, (1, 7.0))], 3, 1),
    ],
)
def test_a_shared_prefix_ends_before_anything_that_is_not_shared(
    others: list[Sample], tokens: int, items: int
) -> None:
    assert shared_prefix([FIRST, *others]) == (tokens, items)
    assert shared_prefix([*others, FIRST]) == (tokens, items)


def test_a_shared_prefix_ends_before_an_item_that_is_not_shared() -> None:
    ids = [1, 0, 0, 2, 0, 0, 3, 4]
    two = shown(ids, 1, (1, 7.0), (4, 8.0))
    assert shared_prefix([two, shown(ids, 1, (1, 7.0), (4, 8.0))]) == (6, 2)
    assert shared_prefix([two, shown(ids, 1, (1, 7.0), (4, 9.0))]) == (4, 1)
    assert shared_prefix([two, shown(ids, 1, (1, 7.0))]) == (4, 1)
    assert shared_prefix([shown(ids, 1, (1, 7.0)), two]) == (4, 1)


def test_items_are_compared_by_all_of_their_values() -> None:
    """The value that differs, of 100, is not among the few that are compared first."""
    one, other = torch.zeros(1, 100), torch.zeros(1, 100)
    other[0, 99] = 1.0
    samples = [shown([1, 0, 0, 2, 3, 4], 1, (1, 0.0)) for _ in range(3)]
    for sample_, values in zip(samples, (one, other, one.clone()), strict=True):
        sample_.media[0] = Prepared({"values": values}, 1)
    assert shared_prefix(samples[:2]) == (1, 0)
    assert shared_prefix(samples[::2]) == (4, 1)


def test_samples_with_the_same_prefix_become_a_tree_in_a_pack(model: Any) -> None:
    other = shown([1, 0, 0, 2, 9, 6], 1, (1, 7.0))
    alone = shown([8, 9], 1)
    batch = Collator(model.modalities, 0, share=True).pack([alone, FIRST, other])
    assert batch["input_ids"].tolist() == [[8, 9, 1, 0, 0, 2, 3, 4, 5, 9, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3, 4, 5, 6, 4, 5]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 6, 9, 11]
    counts = batch["counts"]
    assert counts.segments == ((0, 2, 0, 0), (2, 6, 0, 0), (6, 9, 2, 6), (9, 11, 2, 6))
    assert counts.lengths == (2, 4, 3, 2) and counts.num_before == (0, 0, 4, 4)
    assert counts.shares_prefix
    assert batch["media"]["vector"]["positions"].tolist() == [3, 4]
    plain = Collator(model.modalities, 0).pack([alone, FIRST, other])
    assert plain["counts"].segments == ((0, 2, 0, 0), (2, 9, 0, 0), (9, 15, 0, 0))
    assert not plain["counts"].shares_prefix


def test_media_after_a_shared_prefix_have_their_positions_in_the_pack(model: Any) -> None:
    ids = [1, 0, 0, 2, 0, 0, 3, 4]
    samples = [shown(ids, 1, (1, 7.0), (4, 8.0)), shown(ids, 1, (1, 7.0), (4, 9.0))]
    batch = Collator(model.modalities, 0, share=True).pack(samples)
    assert batch["input_ids"].tolist() == [[1, 0, 0, 2, 0, 0, 3, 4, 0, 0, 3, 4]]
    assert batch["media"]["vector"]["positions"].tolist() == [1, 2, 4, 5, 8, 9]
    values = batch["media"]["vector"]["inputs"]["values"]
    assert values.flatten()[::5].tolist() == [7.0, 8.0, 9.0]


def test_text_is_shared_from_eight_tokens_on_and_media_after_it_once_more(model: Any) -> None:
    system = list(range(10, 18))
    one, other = (shown([*system, 0, 0, 2, n], 1, (8, 7.0)) for n in (3, 4))
    text, short = shown([*system, 5, 6], 1), shown([*system[:7], 5, 6], 1)
    collate = Collator(model.modalities, 0, share=True)
    batch = collate.pack([one, text, other])
    assert batch["input_ids"].tolist() == [[*system, 0, 0, 2, 3, 2, 4, 5, 6]]
    assert batch["position_ids"].tolist() == [[*range(12), 10, 11, 8, 9]]
    assert batch["counts"].segments == (
        (0, 8, 0, 0),
        (8, 10, 0, 8),
        (10, 12, 8, 10),
        (12, 14, 8, 10),
        (14, 16, 0, 8),
    )
    assert batch["media"]["vector"]["positions"].tolist() == [8, 9]
    counts = collate.pack([short, text])["counts"]
    assert not counts.shares_prefix, "seven tokens are too few"
    order = collate.pack_order([one, text, other, short])
    assert [id(sample) for sample in order] == [id(s) for s in (one, other, text, short)]
