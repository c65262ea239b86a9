"""data/packing.py: full packs within both budgets, and rows that stay together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import pytest

from multi_token.data.packing import (
    Pack,
    PackingPlan,
    balance,
    best_fit,
    group_into_steps,
    pack_buffer,
    packing_plan,
)
from multi_token.data.shared_prefix import SharedPrefixGroup
from multi_token.errors import RecipeError
from multi_token.recipe.train import TrainSpec


def test_a_pack_stays_within_both_budgets() -> None:
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


def test_without_rows_there_are_no_packs() -> None:
    assert best_fit(PackingPlan([], max_tokens=10), []) == []


def test_packs_that_are_full_of_items_are_passed_over() -> None:
    rows = PackingPlan([8, 7, 6, 2], max_tokens=10, num_items=[1, 1, 0, 1], max_items=1)
    assert best_fit(rows, range(4)) == [(0,), (1,), (2, 3)]


def test_rows_are_dealt_into_packs_that_are_full_to_the_last_token() -> None:
    plan = PackingPlan([6, 4, 6, 4], max_tokens=10)
    dealt = balance(plan, range(4), 2)
    assert dealt is not None
    assert [plan.tokens_of(pack) for pack in dealt] == [10, 10]


@pytest.mark.parametrize(
    ("lengths", "num_items", "max_items", "num_packs"),
    [
        ([1, 2, 9], [3, 1, 0], 3, 2),  # dealing would need a pack for each row
        ([1, 7, 9, 3], [2, 0, 0, 1], 2, 2),  # tokens fill two packs exactly, dealing needs three
        ([1, 1, 1, 7, 8], [0, 1, 2, 1, 0], 2, 3),  # dealing needs one pack more than the items do
    ],
)
def test_a_buffer_with_many_items_takes_no_more_packs_than_needed(
    lengths: list[int], num_items: list[int], max_items: int, num_packs: int
) -> None:
    plan = PackingPlan(lengths, 10, num_items, max_items)
    packs, emptiest = pack_buffer(plan, range(len(lengths)))
    assert len([*packs, emptiest]) == num_packs


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


def test_rows_that_do_not_fit_or_leave_a_pack_empty_are_not_dealt() -> None:
    rows = PackingPlan([6, 6, 6], max_tokens=10)
    assert balance(rows, range(3), 2) is None
    assert balance(rows, range(3), 3) is not None
    assert balance(rows, range(3), 4) is None


def dealt_by_heap(plan: PackingPlan, rows: Sequence[int], num_packs: int) -> list[Pack] | None:
    """The same as `balance`: try the packs from the emptiest on, for each row."""
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    emptiest = [(0.0, pack) for pack in range(num_packs)]
    mean_tokens = plan.tokens_of(rows) / num_packs
    mean_items = max(plan.items_of(rows), 1) / num_packs

    def load(pack: Sequence[int]) -> float:
        return max(plan.tokens_of(pack) / mean_tokens, plan.items_of(pack) / mean_items)

    for row in sorted(rows, key=lambda row: load([row]), reverse=True):
        tried = []
        while emptiest:
            tried.append(heappop(emptiest)[1])
            grown = [*packs[tried[-1]], row]
            if plan.fits(plan.tokens_of(grown), plan.items_of(grown)):
                packs[tried[-1]] = grown
                break
        else:
            return None
        for pack in tried:
            heappush(emptiest, (load(packs[pack]), pack))
    return [tuple(pack) for pack in packs] if all(packs) else None


def test_each_row_is_dealt_to_the_emptiest_pack_that_it_fits() -> None:
    draw = random.Random(0)
    num_refused = 0
    for _ in range(300):
        num_rows, max_items = draw.randint(1, 40), draw.choice((None, 1, 2, 4))
        lengths = [draw.randint(1, 30) for _ in range(num_rows)]
        num_items = [] if max_items is None else [draw.randint(0, max_items) for _ in lengths]
        most = draw.randint(max(lengths), 3 * max(lengths))
        plan = PackingPlan(lengths, most, num_items, max_items)
        fewest = -(-max(sum(lengths), most * sum(num_items) // (max_items or 1)) // most)
        num_packs = fewest + draw.randint(0, 3)
        expected = dealt_by_heap(plan, range(num_rows), num_packs)
        assert balance(plan, range(num_rows), num_packs) == expected
        num_refused += expected is None
    assert 50 < num_refused < 250, "both outcomes are tested"


def test_packs_that_are_full_of_items_cost_nothing_for_later_rows() -> None:
    class CountingPlan(PackingPlan):
        num_asked = 0

        def fits(self, num_tokens: int, num_items: int) -> bool:
            type(self).num_asked += 1
            return super().fits(num_tokens, num_items)

    draw = random.Random(0)
    lengths = [draw.randint(50, 300) for _ in range(1024)]
    num_items = [draw.choice((0, 1, 1, 2, 4)) for _ in lengths]
    dealt = balance(CountingPlan(lengths, 4096, num_items, 4), range(1024), sum(num_items) // 4 + 1)
    assert dealt is not None
    assert CountingPlan.num_asked <= 2 * len(lengths)


def test_a_row_goes_into_the_fullest_pack_it_fits() -> None:
    rows = PackingPlan([6, 5, 4, 3, 2], max_tokens=10)
    assert best_fit(rows, range(5)) == [(0, 2), (1, 3, 4)]


def test_the_emptiest_pack_of_a_buffer_waits_for_the_next_one() -> None:
    rows = PackingPlan([6, 5, 4, 3], max_tokens=10)
    assert pack_buffer(rows, range(4)) == ([(0, 2)], (1, 3))
    assert pack_buffer(rows, range(4), sizes=[1, 2, 3, 4]) == ([(0,), (3, 2)], (1,))
    assert pack_buffer(rows, []) == ([], ())


def test_a_buffer_full_of_items_is_dealt_evenly() -> None:
    rows = PackingPlan([4, 1, 1, 1, 1], 10, [2, 2, 2, 2, 0], max_items=4)
    packs, emptiest = pack_buffer(rows, range(5))
    assert sorted(map(rows.tokens_of, [*packs, emptiest])) == [3, 5]


def test_few_rows_are_dealt_to_all_packs_of_a_step_or_refused() -> None:
    rows = PackingPlan([10, 20, 30, 40], max_tokens=100)
    (step,) = group_into_steps(rows, best_fit(rows, range(4)), 4)
    assert sorted(step) == [(0,), (1,), (2,), (3,)]
    with pytest.raises(RecipeError, match="4 rows cannot be 5 packs"):
        group_into_steps(rows, best_fit(rows, range(4)), 5)


def test_a_pack_has_by_default_the_tokens_of_a_batch() -> None:
    stages = [{"name": "one", "learn": {"projectors": 1e-3}}]

    def budget(lengths: list[int], **fields: Any) -> Any:
        spec = TrainSpec.model_validate({"output_dir": "run", "stages": stages, **fields})
        return packing_plan(spec, lengths, [], num_rows=4)

    assert budget([10, 20, 30]) is None
    assert budget([10, 20, 30], packing=True).max_tokens == 80
    assert budget([10, 20, 300], packing=True).max_tokens == 440
    assert budget([1, 1, 1, 1, 1, 100], packing=True).max_tokens == 100
    assert budget([10, 20, 30], packing=True, pack_tokens=64).max_tokens == 64


def sharing(pack_items: int) -> TrainSpec:
    return TrainSpec.model_validate(
        {
            "output_dir": "run",
            "stages": [{"name": "one", "learn": {"projectors": 1e-3}}],
            "packing": {"share": True},
            "pack_tokens": 100,
            "pack_items": pack_items,
        }
    )


def test_rows_of_a_group_stay_together_and_their_prefix_counts_once() -> None:
    spec = sharing(pack_items=4)
    lengths, num_items = [50, 40, 60, 70, 30, 80, 90], [1, 1, 1, 2, 1, 0, 1]
    groups = [SharedPrefixGroup((0, 2), 40, 1), SharedPrefixGroup((1, 3, 4, 6), 25, 1)]
    rows = packing_plan(spec, lengths, num_items, num_rows=4, groups=groups)
    assert rows is not None
    assert list(rows.units) == [(5,), (0, 2), (1, 3, 4), (6,)], "the second one fills two packs"
    assert list(rows.lengths) == [80, 70, 90, 90]
    assert list(rows.num_items) == [0, 1, 2, 1]
    packs = [rows.dataset_rows(pack) for pack in best_fit(rows, range(4))]
    assert sorted(row for pack in packs for row in pack) == list(range(7))
    assert [0, 2] in packs and [1, 3, 4] in packs


def test_an_item_that_a_group_shares_counts_once_against_the_budget_of_items() -> None:
    spec = sharing(pack_items=1)
    group = SharedPrefixGroup((0, 1, 2), 10, 1)
    rows = packing_plan(spec, [20, 20, 20], [1, 1, 1], num_rows=4, groups=[group])
    assert rows is not None and list(rows.units) == [(0, 1, 2)]
    assert list(rows.num_items) == [1] and list(rows.lengths) == [40]
