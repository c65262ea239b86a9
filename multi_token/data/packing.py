"""Packs: rows laid one after the other in one row of tokens, chosen by best fit.

Rows become packs buffer by buffer (`pack_buffer`), for an epoch and for a stream alike:

1. Rows of the buffer come longest first, after those that the buffer before left over.
2. Each row goes into the fullest pack that its tokens and media items fit.
3. If a row fits no pack, a new pack begins.
4. Where media items fill packs sooner than tokens do, rows are dealt evenly to as few packs as the
   items need.
5. The emptiest pack is left over, and its rows come with the next buffer.

`PackSampler` (train/batch_plan.py) calls it with the rows of an epoch, whose lengths are known, and
deals the packs to processes in steps of equal size. `StreamLoader` (data/stream_loader.py) calls it
with the rows of a window. collate.py lays the rows of a pack out as one row of tokens.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from multi_token.data.shared_prefix import SharedPrefixGroup
from multi_token.errors import RecipeError
from multi_token.recipe.train import TrainSpec

Pack = tuple[int, ...]
"""Indices of the rows that share a pack."""

_MAX_IMBALANCE = 0.03
"""Largest accepted difference between the packs of one step, as a fraction of the longest."""


@dataclass(frozen=True)
class PackingPlan:
    """Lengths of the rows to pack, and the budgets of a pack.

    `lengths`: tokens of each row. `num_items`: media items of each row; empty without `max_items`.
    Raises RecipeError for a row that exceeds a budget by itself.
    """

    lengths: Sequence[int]
    max_tokens: int
    num_items: Sequence[int] = ()
    max_items: int | None = None
    units: Sequence[Pack] = ()
    """Rows of the dataset that stay together. Empty where each row is a unit of its own."""

    def __post_init__(self) -> None:
        for noun, key, values, most in (
            ("tokens", "pack_tokens", self.lengths, self.max_tokens),
            ("items", "pack_items", self.num_items, self.max_items),
        ):
            if most is not None and max(values, default=0) > most:
                raise RecipeError(
                    f"train.{key} is {most}, but a row has {max(values)} {noun}; set it to at "
                    f"least {max(values)}, or leave such rows out (data.max_tokens with "
                    "data.on_bad_row=skip)"
                )

    def tokens_of(self, pack: Sequence[int]) -> int:
        """Return the number of tokens of a pack."""
        return sum(self.lengths[row] for row in pack)

    def items_of(self, pack: Sequence[int]) -> int:
        """Return the number of media items of a pack; 0 where items have no budget."""
        return 0 if self.max_items is None else sum(self.num_items[row] for row in pack)

    def dataset_rows(self, pack: Sequence[int]) -> list[int]:
        """Return the dataset rows of a pack; rows of one unit stand beside each other."""
        return [row for i in pack for row in (self.units[i] if self.units else (i,))]

    def fits(self, num_tokens: int, num_items: int) -> bool:
        """Return whether these counts are within both budgets."""
        return num_tokens <= self.max_tokens and num_items <= (self.max_items or num_items)


def pack_buffer(
    plan: PackingPlan, rows: Sequence[int], *, sizes: Sequence[float] | None = None
) -> tuple[list[Pack], Pack]:
    """Pack the rows of a buffer -> (packs by ascending length, the emptiest pack).

    The rows of the emptiest pack wait for companions from the next buffer. `sizes`: numbers by
    which `plan`'s rows are sorted, in place of their lengths; the largest is packed first.
    """
    order = plan.lengths if sizes is None else sizes
    longest_first = sorted(rows, key=lambda row: -order[row])
    packs = _balanced_by_items(plan, longest_first) or best_fit(plan, longest_first)
    packs.sort(key=plan.tokens_of)
    # the emptiest pack would waste most of its budget: a later buffer fills it
    return packs[1:], packs[0] if packs else ()


def best_fit(plan: PackingPlan, rows: Sequence[int]) -> list[Pack]:
    """Pack rows: each, in the order given, into the fullest pack that it fits.

    With the longest first this is best-fit decreasing, which needs at most 11/9 of the fewest
    possible packs plus one (Johnson et al., Worst-case performance bounds for simple
    one-dimensional packing algorithms, SIAM J. Comput. 1974), and hardly more than the fewest where
    rows are short.
    """
    packs: list[list[int]] = []
    items: list[int] = []
    space: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for row in rows:
        length, num = plan.lengths[row], plan.items_of([row])
        at = bisect_left(space, (length, 0))
        # packs with tokens left may be full of items, which the order of `space` does not know
        while (
            plan.max_items is not None
            and at < len(space)
            and items[space[at][1]] + num > plan.max_items
        ):
            at += 1
        if at < len(space):
            left, pack = space.pop(at)
        else:
            left, pack = plan.max_tokens, len(packs)
            packs.append([])
            items.append(0)
        packs[pack].append(row)
        items[pack] += num
        insort(space, (left - length, pack))
    return [tuple(pack) for pack in packs]


def balance(plan: PackingPlan, rows: Sequence[int], num_packs: int) -> list[Pack] | None:
    """Deal rows to `num_packs` packs of about equal size: the largest row first, each to the
    emptiest pack.

    Returns None where a row fits nowhere or a pack stays empty.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    tokens, items = np.zeros(num_packs, np.int64), np.zeros(num_packs, np.int64)
    loads = np.zeros(num_packs)
    mean_tokens = plan.tokens_of(rows) / num_packs
    mean_items = max(plan.items_of(rows), 1) / num_packs

    def load(num_tokens: int, num_items: int) -> float:
        # the budget that binds decides: a pack may be full of items and short of tokens
        return max(num_tokens / mean_tokens, num_items / mean_items)

    def size(row: int) -> float:
        return load(plan.lengths[row], plan.items_of([row]))

    for row in sorted(rows, key=size, reverse=True):
        length, num = plan.lengths[row], plan.items_of([row])
        pack = int(loads.argmin())
        if not plan.fits(int(tokens[pack]) + length, int(items[pack]) + num):
            # all packs at once: a loop would pass by every full pack again for each row
            fits = tokens <= plan.max_tokens - length
            if plan.max_items:
                fits &= items <= plan.max_items - num
            pack = int(np.where(fits, loads, np.inf).argmin())
            if not fits[pack]:
                return None
        packs[pack].append(row)
        tokens[pack] += length
        items[pack] += num
        loads[pack] = load(int(tokens[pack]), int(items[pack]))
    return [tuple(pack) for pack in packs] if all(packs) else None


def _balanced_by_items(plan: PackingPlan, rows: Sequence[int]) -> list[Pack] | None:
    """Deal rows evenly to as few packs as their media items need; None where tokens bind."""
    if plan.max_items is None:
        return None
    # best fit by tokens would fill some packs with items, and close them with few tokens
    num_packs = math.ceil(plan.items_of(rows) / plan.max_items)
    while num_packs * plan.max_tokens > plan.tokens_of(rows) and num_packs < len(rows):
        packs = balance(plan, rows, num_packs)
        if packs is not None:
            return packs
        # by 2 %: each attempt deals all rows, and the first ones mostly fail
        num_packs += 1 + num_packs // 50
    return None


def group_into_steps(plan: PackingPlan, packs: Sequence[Pack], per_step: int) -> list[list[Pack]]:
    """Group packs into steps of `per_step` packs that are about equally long within a step.

    Packs of one length come together. Where their lengths still differ, the rows of that step are
    dealt again, so each row stays in exactly one pack. Raises RecipeError for fewer rows than packs
    in a step.
    """
    ordered = sorted(packs, key=lambda pack: -plan.tokens_of(pack))
    steps = [ordered[i : i + per_step] for i in range(0, len(ordered), per_step)]
    done: list[list[Pack]] = []
    # from the shortest packs on: a last step that cannot be filled joins the one before it
    while steps:
        step = steps.pop()
        sizes = [plan.tokens_of(pack) for pack in step]
        if len(step) % per_step == 0 and min(sizes) >= (1 - _MAX_IMBALANCE) * max(sizes):
            done.append(step)
            continue
        # rounded up: every process needs a pack in every step
        num_packs = -(-len(step) // per_step) * per_step
        dealt = balance(plan, [row for pack in step for row in pack], num_packs)
        if dealt is not None:
            dealt.sort(key=plan.tokens_of)
            done += [dealt[i : i + per_step] for i in range(0, len(dealt), per_step)]
        elif len(step) % per_step == 0:
            done.append(step)  # unequal packs cost waiting, a missing pack would stop the run
        elif steps:
            steps[-1] = [*steps[-1], *step]
        else:
            raise RecipeError(
                f"{sum(map(len, packs))} rows cannot be {per_step} packs, one for each process at "
                "least; use fewer processes, or more rows"
            )
    return done[::-1]


def packing_plan(
    spec: TrainSpec,
    lengths: Sequence[int],
    num_items: Sequence[int],
    *,
    num_rows: int,
    groups: Sequence[SharedPrefixGroup] = (),
) -> PackingPlan | None:
    """Return the plan that a recipe asks for, or None for a recipe without packing.

    The default budget is the tokens of `num_rows` rows (`per_device_train_batch_size`) of mean
    length: a step then trains on as many rows as without packing, and learning rates stay right. At
    least the longest row has to fit. `groups` (`packing: {share: true}`) stay together as far as a
    pack holds them, and their common prefix counts once. Raises RecipeError for a budget below a
    row.
    """
    if spec.packing is None:
        return None
    # tokens that packs hold once instead of once for each row
    num_shared = sum(group.num_tokens * (len(group.rows) - 1) for group in groups)
    mean = (sum(lengths) - num_shared) / len(lengths)
    default = max(round(num_rows * mean), max(lengths))
    plan = PackingPlan(lengths, spec.pack_tokens or default, num_items, spec.pack_items)
    if not groups:
        return plan
    grouped = {row for group in groups for row in group.rows}
    units = [((row,), 0, 0) for row in range(len(lengths)) if row not in grouped]
    units += [
        (part, group.num_tokens, group.num_items)
        for group in groups
        for part in _split_group(plan, group)
    ]
    return dataclasses.replace(
        plan,
        units=[part for part, _, _ in units],
        lengths=[plan.tokens_of(part) - (len(part) - 1) * tokens for part, tokens, _ in units],
        num_items=[plan.items_of(part) - (len(part) - 1) * items for part, _, items in units]
        if plan.max_items is not None
        else (),
    )


def _split_group(plan: PackingPlan, group: SharedPrefixGroup) -> list[Pack]:
    """Split a group into as few parts as fit into one pack each."""
    parts: list[list[int]] = []
    num_tokens = num_items = 0
    for row in group.rows:
        # the first row of a part brings the prefix; each further row adds what is its own
        own_tokens = plan.lengths[row] - group.num_tokens
        own_items = plan.items_of([row]) - (group.num_items if plan.max_items is not None else 0)
        if not parts or not plan.fits(num_tokens + own_tokens, num_items + own_items):
            parts.append([])
            num_tokens, num_items = plan.lengths[row], plan.items_of([row])
        else:
            num_tokens, num_items = num_tokens + own_tokens, num_items + own_items
        parts[-1].append(row)
    return [tuple(part) for part in parts]
