"""Order of rows and packs in an epoch: decided by seed and epoch alone, so a resume repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from multi_token.data.packing import Pack, PackingPlan, balance, group_into_steps, pack_buffer

BUFFER = 4096
"""Rows that are packed together. More make fuller packs, fewer keep the order more random."""
_JITTER = 0.3
"""Largest factor by which a row may count as longer when the longest are packed first. Without it
few rows would meet other companions in another epoch."""
_ATTEMPTS = 4


class PackSampler(Sampler[list[int]]):
    """Batch sampler: the packs of one process, in another order with other companions each epoch.

    The plan depends on seed, epoch and the packs of a step alone. All processes have the same plan,
    and so does a resumed run, which skips the packs that are trained on. Two processes with a pack
    each take what one process takes with two packs a step (`num_accumulated`). Every epoch has the
    same number of packs, from which transformers counts its steps.
    """

    def __init__(
        self,
        plan: PackingPlan,
        *,
        seed: int,
        num_processes: int = 1,
        process: int = 0,
        num_accumulated: int = 1,
        buffer: int = BUFFER,
    ) -> None:
        """`num_accumulated`: packs of a step that a process takes one after the other.

        Raises RecipeError with fewer rows than processes.
        """
        self.plan = plan
        self.seed = seed
        self.num_processes = num_processes
        self.process = process
        # with fewer rows than packs in a step, an epoch is one smaller step
        self.num_accumulated = min(num_accumulated, max(1, len(plan.lengths) // num_processes))
        self.num_packs = num_processes * self.num_accumulated
        self.buffer = buffer
        self.epoch = 0
        self._planned: tuple[int, list[list[Pack]]] | None = None
        # packs of a step must be equally long: a spare percent lets their rows be dealt again
        aim = plan.max_tokens if self.num_packs == 1 else round(0.99 * plan.max_tokens)
        self._tight = dataclasses.replace(plan, max_tokens=max(aim, max(plan.lengths)))
        self.first = self._plan_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.first) * self.num_accumulated

    @property
    def use(self) -> float:
        """Share of the token budget that packs fill."""
        num_packs = len(self.first) * self.num_packs
        return sum(self.plan.lengths) / (num_packs * self.plan.max_tokens)

    @property
    def sampler(self) -> PackSampler:
        """The sampler itself: accelerate looks here for `set_epoch`, also when it skips batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the loader calls this before each, also when it resumes within one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        own = slice(self.process, None, self.num_processes)
        return iter(
            [self.plan.dataset_rows(p) for step in self.steps(self.epoch) for p in step[own]]
        )

    def steps(self, epoch: int) -> list[list[Pack]]:
        """Return the packs of each step of an epoch, those of all processes."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._steps(epoch)
        return self._planned[1]

    def _steps(self, epoch: int) -> list[list[Pack]]:
        """Plan an epoch with exactly as many steps as the first one."""
        num_steps = len(self.first)
        for attempt in range(_ATTEMPTS):
            steps = self._plan_epoch(epoch, attempt)
            if len(steps) < num_steps:
                steps = self._split(steps, num_steps)
            if len(steps) == num_steps:
                return steps
        # the first epoch was luckier: its packs in another order, since transformers has already
        # counted on their number
        return _shuffled(self.first, self._generator(epoch, _ATTEMPTS))

    def _plan_epoch(self, epoch: int, attempt: int) -> list[list[Pack]]:
        generator = self._generator(epoch, attempt)
        order = torch.randperm(len(self.plan.lengths), generator=generator).tolist()
        jitter = 1 + _JITTER * torch.rand(len(order), generator=generator)
        sizes = (jitter * torch.tensor(self.plan.lengths)).tolist()
        packs: list[Pack] = []
        carried: Pack = ()
        for i in range(0, len(order), self.buffer):
            rows = [*carried, *order[i : i + self.buffer]]
            more, carried = pack_buffer(self._tight, rows, sizes=sizes)
            packs += more
        steps = group_into_steps(self.plan, [carried, *packs], self.num_packs)
        return _shuffled(steps, generator)

    def _split(self, steps: list[list[Pack]], num_steps: int) -> list[list[Pack]]:
        """Deal the rows of one step after another to two steps, until there are enough."""
        steps = list(steps)
        for at in range(len(steps)):
            if len(steps) == num_steps:
                break
            rows = [row for pack in steps[at] for row in pack]
            dealt = balance(self.plan, rows, 2 * self.num_packs)
            if dealt is not None:
                dealt.sort(key=self.plan.tokens_of)
                steps[at] = dealt[: self.num_packs]
                steps.append(dealt[self.num_packs :])
        return steps

    def _generator(self, epoch: int, attempt: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * _ATTEMPTS + attempt)


def _shuffled(steps: Sequence[list[Pack]], generator: torch.Generator) -> list[list[Pack]]:
    """Shuffle the steps, and the packs within each: no rank always has the longest one."""
    shuffled = []
    for i in torch.randperm(len(steps), generator=generator).tolist():
        step = steps[i]
        order = torch.randperm(len(step), generator=generator).tolist()
        shuffled.append([step[j] for j in order])
    return shuffled


class LengthGroupedSampler(Sampler[int]):
    """Batches of rows of about one length, in random order; a resume repeats the order."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; `SetEpochCallback` calls this before each one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # transformers puts the longest of a megabatch first, which would be a curriculum
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        # an incomplete batch stays last, or it would shift the borders of all batches after it
        full = [i for i in shuffled if len(batches[i]) == self.batch_size]
        rest = [i for i in shuffled if len(batches[i]) < self.batch_size]
        return iter([index for i in (*full, *rest) for index in batches[i]])


class SetEpochCallback(TrainerCallback):
    """Callback that hands the epoch to the sampler, at any depth below the loader.

    accelerate's loader (1.15) looks three layers deep. A run of several processes that resumes
    within an epoch has four (skip, shard, batch, sampler), and would repeat the first epoch's rows.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Set the epoch; `state.epoch` has a fraction where a run resumes within an epoch."""
        at = getattr(train_dataloader, "batch_sampler", None)
        while at is not None:
            if hasattr(at, "set_epoch"):
                at.set_epoch(int(state.epoch or 0))
            layers = (getattr(at, "batch_sampler", None), getattr(at, "sampler", None))
            at = next((x for x in layers if x is not None and x is not at), None)
