"""train/packing.py: what a pack may hold, to the last token and item, and how equal packs are.

Border: numbers alone; what packs do to training is test_packing.py's.
"""

from __future__ import annotations

import pytest

from multi_token.errors import RecipeError
from multi_token.train.packing import PackingPlan, PackSampler, balance, best_fit


def test_a_pack_holds_what_both_budgets_allow_and_no_more() -> None:
    rows = PackingPlan([1], max_tokens=10, num_items=[1], max_items=3)
    assert rows.fits(10, 3)
    assert not rows.fits(11, 3)
    assert not rows.fits(10, 4)
    assert not rows.fits(11, 0)


def test_items_without_a_budget_do_not_matter() -> None:
    rows = PackingPlan([1, 2], max_tokens=10, num_items=[100, 200])
    assert rows.fits(10, 1000)
    assert rows.items_of([0, 1]) == 0
    assert rows.tokens_of([0, 1]) == 3


def test_a_row_as_large_as_a_budget_is_taken() -> None:
    rows = PackingPlan([10, 1], max_tokens=10, num_items=[0, 3], max_items=3)
    assert sorted(best_fit(rows, [0, 1])) == [(0,), (1,)]
    with pytest.raises(RecipeError, match=r"pack_tokens is 9, but a row has 10 tokens"):
        PackingPlan([10, 1], max_tokens=9)
    with pytest.raises(RecipeError, match=r"pack_items is 2, but a row has 3 items"):
        PackingPlan([10, 1], max_tokens=10, num_items=[0, 3], max_items=2)


def test_packs_are_filled_to_the_last_token_and_item() -> None:
    rows = PackingPlan([6, 4, 5, 5], max_tokens=10)
    assert sorted(best_fit(rows, [0, 2, 3, 1])) == [(0, 1), (2, 3)]
    rows = PackingPlan([1] * 4, max_tokens=10, num_items=[2, 1, 1, 2], max_items=3)
    packs = best_fit(rows, [0, 3, 1, 2])
    assert [rows.items_of(pack) for pack in packs] == [3, 3]


def test_rows_are_dealt_into_packs_of_equal_length_though_items_are_the_same() -> None:
    rows = PackingPlan([100, 60, 100, 60], max_tokens=200, num_items=[1] * 4, max_items=4)
    dealt = balance(rows, range(4), 2)
    assert dealt is not None
    assert [rows.tokens_of(pack) for pack in dealt] == [160, 160]


def test_rows_are_dealt_into_packs_of_equally_many_items_though_lengths_are_the_same() -> None:
    rows = PackingPlan([60] * 4, max_tokens=200, num_items=[5, 1, 5, 1], max_items=10)
    dealt = balance(rows, range(4), 2)
    assert dealt is not None
    assert [rows.items_of(pack) for pack in dealt] == [6, 6]


def test_what_does_not_fit_or_leaves_a_pack_empty_is_not_dealt() -> None:
    rows = PackingPlan([6, 6, 6], max_tokens=10)
    assert balance(rows, range(3), 2) is None
    assert balance(rows, range(3), 3) is not None
    assert balance(rows, range(3), 4) is None


@pytest.mark.parametrize(
    ("lengths", "num_processes", "use"),
    [([5] * 8, 1, 1.0), ([5] * 8, 2, 1.0), ([10, 10, 5], 1, 25 / 30), ([10, 10], 2, 1.0)],
)
def test_the_use_is_the_share_of_all_budgets_that_is_filled(
    lengths: list[int], num_processes: int, use: float
) -> None:
    sampler = PackSampler(PackingPlan(lengths, max_tokens=10), seed=0, num_processes=num_processes)
    assert sampler.use == pytest.approx(use)
