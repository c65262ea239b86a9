"""Which rows share a pack: best-fit decreasing under two budgets, equal for all processes.

Border: numbers only, lengths to lists of row indices. collate.py lays a pack out as one row.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch.utils.data import Sampler

from multi_token.errors import RecipeError
from multi_token.recipe.train import TrainSpec
from multi_token.train.families import SharedMediaGroup

Pack = tuple[int, ...]
"""Indices of the rows that share a pack."""

WINDOW = 4096
"""Rows among which companions are looked for. The more, the fuller; the fewer, the more random."""
_MAX_IMBALANCE = 0.03
"""By how much of the largest the packs of one step may differ, before their rows are dealt anew."""
_JITTER = 0.3
"""By how much a row may count as longer when the longest are packed first, so that few rows have
the same companions in every epoch."""
_ATTEMPTS = 4


@dataclass(frozen=True)
class PackingPlan:
    """What packing needs to know of the rows, and what a pack may hold.

    `lengths`: tokens of each row. `num_items`: media items of each row, or nothing where they do
    not matter. Raises RecipeError for a row that exceeds a budget by itself.
    """

    lengths: Sequence[int]
    max_tokens: int
    num_items: Sequence[int] = ()
    max_items: int | None = None
    units: Sequence[Pack] = ()
    """Rows of the data set that stay together, where what is packed is not single rows."""

    def __post_init__(self) -> None:
        for what, key, values, most in (
            ("tokens", "pack_tokens", self.lengths, self.max_tokens),
            ("items", "pack_items", self.num_items, self.max_items),
        ):
            if most is not None and max(values, default=0) > most:
                raise RecipeError(
                    f"train.{key} is {most}, but a row has {max(values)} {what}; set it to at "
                    f"least {max(values)}, or leave such rows out (data.max_tokens with "
                    "data.on_bad_row=skip)"
                )

    def tokens_of(self, pack: Sequence[int]) -> int:
        """The length of a pack."""
        return sum(self.lengths[row] for row in pack)

    def dataset_rows(self, pack: Sequence[int]) -> list[int]:
        """The rows of the data set that a pack holds, those of a unit beside each other."""
        return [row for i in pack for row in (self.units[i] if self.units else (i,))]

    def items_of(self, pack: Sequence[int]) -> int:
        """How many media items a pack has; 0 where they have no budget."""
        return 0 if self.max_items is None else sum(self.num_items[row] for row in pack)

    def fits(self, num_tokens: int, num_items: int) -> bool:
        """Whether so much stays within both budgets."""
        return num_tokens <= self.max_tokens and num_items <= (self.max_items or num_items)


def packing_plan(
    spec: TrainSpec,
    lengths: Sequence[int],
    num_items: Sequence[int],
    *,
    num_rows: int,
    shared_media: Sequence[SharedMediaGroup] = (),
) -> PackingPlan | None:
    """What a recipe says of packing, or None if it does not pack.

    By default a pack has the tokens of `num_rows` rows (`per_device_train_batch_size`) of mean
    length: a step learns from as many as without packing, and learning rates stay right. At least
    the longest row has to fit. `families` (`train.share_media`) stay together as far as a pack
    holds them, and count what they share once. Raises RecipeError for a budget below a row.
    """
    if not spec.packing:
        return None
    related = {row for family in shared_media for row in family.rows}
    num_shared = sum(family.num_tokens * (len(family.rows) - 1) for family in shared_media)
    mean = (sum(lengths) - num_shared) / len(lengths)
    default = max(round(num_rows * mean), max(lengths))
    rows = PackingPlan(lengths, spec.pack_tokens or default, num_items, spec.pack_items)
    if not shared_media:
        return rows
    units = [((row,), 0, 0) for row in range(len(lengths)) if row not in related]
    units += [
        (part, family.num_tokens, family.num_items)
        for family in shared_media
        for part in _split_group(rows, family)
    ]
    return dataclasses.replace(
        rows,
        units=[part for part, _, _ in units],
        lengths=[rows.tokens_of(part) - (len(part) - 1) * tokens for part, tokens, _ in units],
        num_items=[rows.items_of(part) - (len(part) - 1) * items for part, _, items in units]
        if rows.max_items is not None
        else (),
    )


def _split_group(rows: PackingPlan, family: SharedMediaGroup) -> list[Pack]:
    """A family in as few parts as fit into a pack each."""
    parts: list[list[int]] = []
    num_tokens = num_items = 0
    for row in family.rows:
        own_tokens = rows.lengths[row] - family.num_tokens
        own_items = rows.items_of([row]) - (family.num_items if rows.max_items is not None else 0)
        if not parts or not rows.fits(num_tokens + own_tokens, num_items + own_items):
            parts.append([])
            num_tokens, num_items = rows.lengths[row], rows.items_of([row])
        else:
            num_tokens, num_items = num_tokens + own_tokens, num_items + own_items
        parts[-1].append(row)
    return [tuple(part) for part in parts]


def best_fit(rows: PackingPlan, chosen: Sequence[int]) -> list[Pack]:
    """Packs of the chosen rows: each, in the order given, into the fullest pack that it fits into.

    With the longest first that is best-fit decreasing, which needs at most 11/9 of the fewest
    possible packs plus one (Johnson et al., Worst-case performance bounds for simple
    one-dimensional packing algorithms, SIAM J. Comput. 1974), and hardly more than the fewest where
    rows are short.
    """
    packs: list[list[int]] = []
    items: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), ascending
    for row in chosen:
        length, num = rows.lengths[row], rows.items_of([row])
        at = bisect_left(room, (length, 0))
        while (
            rows.max_items is not None
            and at < len(room)
            and items[room[at][1]] + num > rows.max_items
        ):
            at += 1
        if at < len(room):
            left, pack = room.pop(at)
        else:
            left, pack = rows.max_tokens, len(packs)
            packs.append([])
            items.append(0)
        packs[pack].append(row)
        items[pack] += num
        insort(room, (left - length, pack))
    return [tuple(pack) for pack in packs]


def balance(rows: PackingPlan, chosen: Sequence[int], num_packs: int) -> list[Pack] | None:
    """The chosen rows in so many packs that are about equally full, none of them empty, or None if
    that does not fit: the largest first, each to the emptiest pack.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    tokens, items = [0] * num_packs, [0] * num_packs
    emptiest = [(0.0, pack) for pack in range(num_packs)]
    mean_tokens = rows.tokens_of(chosen) / num_packs
    mean_items = max(rows.items_of(chosen), 1) / num_packs

    def load(num_tokens: int, num_items: int) -> float:
        return max(num_tokens / mean_tokens, num_items / mean_items)

    def size(row: int) -> float:
        return load(rows.lengths[row], rows.items_of([row]))

    for row in sorted(chosen, key=size, reverse=True):
        length, num = rows.lengths[row], rows.items_of([row])
        tried = []
        while emptiest:
            tried.append(heappop(emptiest))
            pack = tried[-1][-1]
            if rows.fits(tokens[pack] + length, items[pack] + num):
                break
        else:
            return None
        tried.pop()
        packs[pack].append(row)
        tokens[pack] += length
        items[pack] += num
        tried.append((load(tokens[pack], items[pack]), pack))
        for entry in tried:
            heappush(emptiest, entry)
    return [tuple(pack) for pack in packs] if all(packs) else None


def group_into_steps(rows: PackingPlan, packs: Sequence[Pack], per_step: int) -> list[list[Pack]]:
    """Packs -> steps of so many packs, about equally long within a step.

    Packs of one length come together. Where that is not enough, the rows of a step are dealt anew,
    so every row is in one pack still. Raises RecipeError with fewer rows than packs in a step.
    """
    ordered = sorted(packs, key=lambda pack: -rows.tokens_of(pack))
    steps = [ordered[i : i + per_step] for i in range(0, len(ordered), per_step)]
    done: list[list[Pack]] = []
    while steps:
        step = steps.pop()
        sizes = [rows.tokens_of(pack) for pack in step]
        if len(step) % per_step == 0 and min(sizes) >= (1 - _MAX_IMBALANCE) * max(sizes):
            done.append(step)
            continue
        num_packs = -(-len(step) // per_step) * per_step
        chosen = [row for pack in step for row in pack]
        dealt = balance(rows, chosen, num_packs)
        if dealt is not None:
            dealt.sort(key=rows.tokens_of)
            done += [dealt[i : i + per_step] for i in range(0, len(dealt), per_step)]
        elif len(step) % per_step == 0:
            done.append(step)  # no better, but it is a step
        elif steps:
            steps[-1] = [*steps[-1], *step]  # too few rows for all: with those of another step
        else:
            raise RecipeError(
                f"{sum(map(len, packs))} rows cannot be {per_step} packs, one for each process at "
                "least; use fewer processes, or more rows"
            )
    return done[::-1]


class PackSampler(Sampler[list[int]]):
    """The packs of one process, in another order with other companions each epoch: a batch sampler.

    The plan depends on seed, epoch and the packs of a step alone: all processes have the same one,
    and so has a resumed run, which skips what it has seen. Two processes with a pack each take from
    it what one takes with two packs a step (`num_accumulated`). Every epoch has the same number of
    packs, from which transformers counts its steps.
    """

    def __init__(
        self,
        rows: PackingPlan,
        *,
        seed: int,
        num_processes: int = 1,
        process: int = 0,
        num_accumulated: int = 1,
        window: int = WINDOW,
    ) -> None:
        """`num_accumulated`: packs of a step that a process takes one after the other.

        Raises RecipeError with fewer rows than processes.
        """
        self.rows = rows
        self.seed = seed
        self.num_processes = num_processes
        self.process = process
        # where there are fewer rows than packs in a step, an epoch is one smaller step
        self.num_accumulated = min(num_accumulated, max(1, len(rows.lengths) // num_processes))
        self.num_packs = num_processes * self.num_accumulated
        self.window = window
        self.epoch = 0
        self._planned: tuple[int, list[list[Pack]]] | None = None
        # with several packs a step a little is left, so that its rows can be dealt anew
        aim = rows.max_tokens if self.num_packs == 1 else round(0.99 * rows.max_tokens)
        self._tight = dataclasses.replace(rows, max_tokens=max(aim, max(rows.lengths)))
        self.first = self._plan(0, 0)

    def __len__(self) -> int:
        return len(self.first) * self.num_accumulated

    @property
    def use(self) -> float:
        """The share of the token budget that packs fill."""
        num_packs = len(self.first) * self.num_packs
        return sum(self.rows.lengths) / (num_packs * self.rows.max_tokens)

    @property
    def sampler(self) -> PackSampler:
        """Itself: where accelerate looks for `set_epoch`, also when it skips batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The trainer's loader calls this before each epoch, also when it resumes within one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        own = slice(self.process, None, self.num_processes)
        return iter(
            [self.rows.dataset_rows(p) for step in self.steps(self.epoch) for p in step[own]]
        )

    def steps(self, epoch: int) -> list[list[Pack]]:
        """The plan of an epoch: the packs of each step, of all processes."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._steps(epoch)
        return self._planned[1]

    def _steps(self, epoch: int) -> list[list[Pack]]:
        num_steps = len(self.first)
        for attempt in range(_ATTEMPTS):
            steps = self._plan(epoch, attempt)
            if len(steps) < num_steps:
                steps = self._split(steps, num_steps)
            if len(steps) == num_steps:
                return steps
        # luck was better in the first epoch: its packs again, in another order
        return _shuffled(self.first, self._generator(epoch, _ATTEMPTS))

    def _plan(self, epoch: int, attempt: int) -> list[list[Pack]]:
        generator = self._generator(epoch, attempt)
        order = torch.randperm(len(self.rows.lengths), generator=generator).tolist()
        jitter = 1 + _JITTER * torch.rand(len(order), generator=generator)
        by_length = (jitter * torch.tensor(self.rows.lengths)).tolist()
        packs = [
            pack
            for i in range(0, len(order), self.window)
            for pack in self._packed(
                sorted(order[i : i + self.window], key=lambda row: -by_length[row])
            )
        ]
        return _shuffled(group_into_steps(self.rows, packs, self.num_packs), generator)

    def _packed(self, window: Sequence[int]) -> list[Pack]:
        """The rows of a window, the longest first: as full as can be, or where items are what fills
        packs, as many as items need and equally full.
        """
        rows = self._tight
        if rows.max_items is not None:
            num_packs = math.ceil(rows.items_of(window) / rows.max_items)
            while num_packs * rows.max_tokens > rows.tokens_of(window) and num_packs < len(window):
                dealt = balance(rows, window, num_packs)
                if dealt is not None:
                    return dealt
                num_packs += 1 + num_packs // 50
        return best_fit(rows, window)

    def _split(self, steps: list[list[Pack]], num_steps: int) -> list[list[Pack]]:
        """The rows of one step more over two, until there are enough."""
        steps = list(steps)
        for at in range(len(steps)):
            if len(steps) == num_steps:
                break
            chosen = [row for pack in steps[at] for row in pack]
            dealt = balance(self.rows, chosen, 2 * self.num_packs)
            if dealt is not None:
                dealt.sort(key=self.rows.tokens_of)
                steps[at] = dealt[: self.num_packs]
                steps.append(dealt[self.num_packs :])
        return steps

    def _generator(self, epoch: int, attempt: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * _ATTEMPTS + attempt)


def _shuffled(steps: Sequence[list[Pack]], generator: torch.Generator) -> list[list[Pack]]:
    """In another order, and which process has which pack of a step as well: no rank always has
    the longest.
    """
    shuffled = []
    for i in torch.randperm(len(steps), generator=generator).tolist():
        step = steps[i]
        order = torch.randperm(len(step), generator=generator).tolist()
        shuffled.append([step[j] for j in order])
    return shuffled
