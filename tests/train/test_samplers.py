"""PackSampler: packs equal for all processes, every row once, the same again on a resume."""

from __future__ import annotations

import math

import pytest
import torch

from multi_token.data.packing import PackingPlan
from multi_token.errors import RecipeError
from multi_token.train.batch_plan import PackSampler


def realistic(num_rows: int, seed: int = 0) -> list[int]:
    """Log-normal, median 120 tokens, a few long ones, as conversations have."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(torch.randn(num_rows, generator=generator) * 0.7 + math.log(120))
    return [int(n) for n in drawn.clamp(16, 1024)]


def rows_of(sampler: PackSampler, epoch: int) -> list[int]:
    return sorted(row for step in sampler.steps(epoch) for pack in step for row in pack)


def share_used(sampler: PackSampler) -> float:
    """Share of the token budget that the packs of an epoch fill."""
    num_packs = sum(map(len, sampler.steps(0)))
    return sum(sampler.plan.lengths) / (num_packs * sampler.plan.max_tokens)


@pytest.mark.parametrize("num_processes", [1, 2, 8])
def test_packs_of_realistic_rows_are_full_equal_and_hold_every_row_once(num_processes: int) -> None:
    rows = PackingPlan(realistic(4000), max_tokens=2048)
    sampler = PackSampler(rows, seed=0, num_processes=num_processes)
    assert share_used(sampler) >= 0.97
    for epoch in range(3):
        steps = sampler.steps(epoch)
        assert len(steps) == len(sampler)
        assert rows_of(sampler, epoch) == list(range(4000))
        for step in steps:
            sizes = [rows.tokens_of(pack) for pack in step]
            assert len(step) == num_processes
            assert max(sizes) <= 2048 and min(sizes) >= 0.97 * max(sizes)


def test_items_have_a_budget_of_their_own() -> None:
    lengths = realistic(500)
    num_items = [i % 3 for i in range(500)]
    rows = PackingPlan(lengths, 2048, num_items, max_items=10)
    sampler = PackSampler(rows, seed=0, num_processes=2)
    packs = [pack for step in sampler.steps(0) for pack in step]
    assert rows_of(sampler, 0) == list(range(500))
    assert all(sum(num_items[row] for row in pack) <= 10 for pack in packs)
    assert max(rows.tokens_of(pack) for pack in packs) <= 2048
    fewest = sum(num_items) / 10
    assert sum(lengths) / 2048 < 0.9 * fewest, "items are what fills a pack here"
    assert len(packs) <= 1.06 * fewest


def test_the_plan_depends_on_seed_and_epoch_alone() -> None:
    rows = PackingPlan(realistic(300), max_tokens=1024)
    one, other = (PackSampler(rows, seed=3, num_processes=2, process=p) for p in (0, 1))
    mine, theirs = list(one), list(other)
    assert len(mine) == len(theirs) == len(one)
    assert sorted(row for pack in (*mine, *theirs) for row in pack) == list(range(300))
    one.set_epoch(1)
    second = list(one)
    assert second != mine
    companions = [{frozenset(pack) for pack in epoch} for epoch in (mine, second)]
    assert len(companions[0] & companions[1]) <= 0.1 * len(mine)
    again = PackSampler(rows, seed=3, num_processes=2)
    again.set_epoch(1)
    assert list(again) == second
    assert list(PackSampler(rows, seed=4, num_processes=2)) != mine


def test_the_first_epoch_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = PackSampler(PackingPlan([3, 4, 5, 6], max_tokens=10), seed=0)
    monkeypatch.setattr(sampler, "_plan_epoch", lambda *_: pytest.fail("planned again"))
    assert rows_of(sampler, 0) == [0, 1, 2, 3]


def test_every_epoch_has_as_many_packs_as_the_first() -> None:
    """With buffers so small that luck differs between epochs."""
    lengths = torch.randint(300, 701, (60,), generator=torch.Generator().manual_seed(0))
    rows = PackingPlan(lengths.tolist(), max_tokens=1400)
    numbers = set()
    for seed in range(10):
        sampler = PackSampler(rows, seed=seed, num_processes=2, buffer=6)
        numbers.add(len(sampler))
        for epoch in range(6):
            assert len(sampler.steps(epoch)) == len(sampler)
            assert rows_of(sampler, epoch) == list(range(60))
    assert len(numbers) > 1, "the buffers were not small enough for this test"


@pytest.mark.parametrize(
    ("lengths", "num_processes", "use"),
    [([5] * 8, 1, 1.0), ([5] * 8, 2, 1.0), ([10, 10, 5], 1, 25 / 30), ([10, 10], 2, 1.0)],
)
def test_packs_fill_all_budgets_except_where_rows_are_missing(
    lengths: list[int], num_processes: int, use: float
) -> None:
    sampler = PackSampler(PackingPlan(lengths, max_tokens=10), seed=0, num_processes=num_processes)
    assert share_used(sampler) == pytest.approx(use)


def test_fewer_rows_than_processes_are_refused() -> None:
    with pytest.raises(RecipeError, match="4 rows cannot be 5 packs"):
        PackSampler(PackingPlan([10, 20, 30, 40], max_tokens=100), seed=0, num_processes=5)
