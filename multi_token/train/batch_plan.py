"""Batches of a stage: padded rows, packs, or a stream, each with its order and resume state.

Seed and epoch alone decide the order of rows and packs, so a resume repeats it.
A `BatchPlan` is handed to the trainer, which therefore has no branch for how rows are grouped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import seed_worker

from multi_token.data.packing import Pack, PackingPlan, balance, group_into_steps, pack_buffer
from multi_token.data.stream_loader import StreamProgress, StreamState, save_states
from multi_token.data.streaming import StreamDataset
from multi_token.distributed import all_gather, is_main_process
from multi_token.train.training_args import data_seed

BUFFER = 4096
"""Rows that are packed together. More make fuller packs, fewer keep the order more random."""
_JITTER = 0.3
"""Largest factor by which a row may count as longer when the longest are packed first. Without it
few rows would meet other companions in another epoch."""
_ATTEMPTS = 4


class BatchPlan:
    """Interface: grouping and order of a stage's rows. The defaults are those of padded rows."""

    pack_tokens: int | None = None
    """Token budget of a pack; None where rows are padded."""
    streamed = False
    """True for a stream: no epochs, and `lengths` are those of its first rows only."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each row of the dataset."""
        self.lengths = list(lengths)

    def configure(self, args: TrainingArguments) -> None:
        """Set the arguments that this plan needs, before training."""

    def sampler(self, args: TrainingArguments) -> Sampler[int] | None:
        """Return the sampler of rows, or None for transformers' own."""
        return None

    def loader(
        self, args: TrainingArguments, dataset: Any, collate: Any, accelerator: Accelerator
    ) -> Any:
        """Return the batches of this process, or None for transformers' own loader."""
        return None

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        """Return the numbers that a resumed run must share with the one before."""
        num_batches = args.world_size * args.gradient_accumulation_steps
        if self.pack_tokens is None:
            return {"rows_per_step": args.train_batch_size * num_batches}
        return {"packs_per_step": num_batches, "tokens_per_pack": self.pack_tokens}

    def fullest_pack(self, seed: int) -> list[int] | None:
        """Return the rows of the largest pack of an epoch; None where rows are not packed."""
        return None

    def resume(self, checkpoint: str, args: TrainingArguments) -> None:
        """Continue after the rows that a checkpoint has trained on."""

    def finish(self) -> None:
        """Report what the stage left out, after its last step."""

    def set_epoch(self, state: TrainerState) -> None:
        """Correct the epoch that is logged."""

    def metrics(self, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """Return what is logged of the rows; `reduce` sums over all devices."""
        return {}

    def gather_state(self) -> Any:
        """Return the position of every process in its rows, for `save_state`; collective."""
        return None

    def save_state(self, folder: Path, step: int, state: Any) -> None:
        """Write what `gather_state` returned into a checkpoint."""


class PaddedBatches(BatchPlan):
    """Rows padded to the longest of their batch, in transformers' order or grouped by length."""

    def sampler(self, args: TrainingArguments) -> Sampler[int] | None:
        if args.train_sampling_strategy != "group_by_length":
            return None
        # transformers would take the lengths from the samples, which decodes all media
        return LengthGroupedSampler(
            self.lengths,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            seed=data_seed(args),
        )


class PackedBatches(BatchPlan):
    """Packs: one plan of an epoch for all processes, of which each walks through its own part."""

    def __init__(self, packing: PackingPlan, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.packing = packing
        self.pack_tokens = packing.max_tokens

    def loader(
        self, args: TrainingArguments, dataset: Any, collate: Any, accelerator: Accelerator
    ) -> Any:
        loader = DataLoader(
            dataset,
            batch_sampler=PackSampler(
                self.packing,
                seed=data_seed(args),
                num_processes=args.world_size,
                process=args.process_index,
                num_accumulated=args.gradient_accumulation_steps,
            ),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        # The sampler has dealt the packs to processes already. accelerate would do so once more
        # and drop packs, so it gets one process.
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            non_blocking=accelerator.non_blocking,
        )

    def fullest_pack(self, seed: int) -> list[int] | None:
        packs = PackSampler(self.packing, seed=seed)
        return max(packs, key=lambda pack: sum(self.lengths[i] for i in pack))


class StreamedBatches(BatchPlan):
    """Rows of a stream, padded or packed by each process as it reads them."""

    streamed = True

    def __init__(
        self,
        streams: StreamDataset,
        lengths: Sequence[int],
        *,
        packing: PackingPlan | None,
        print_fn: Callable[[str], object],
    ) -> None:
        """`lengths`: those of the first rows. `print_fn` gets reports of bad rows."""
        super().__init__(lengths)
        self.packing = packing
        self.pack_tokens = None if packing is None else packing.max_tokens
        self.progress = StreamProgress(streams, print_fn)

    def configure(self, args: TrainingArguments) -> None:
        # the loader continues at its own position; transformers would read and drop every batch
        args.ignore_data_skip = True

    def loader(
        self, args: TrainingArguments, dataset: Any, collate: Any, accelerator: Accelerator
    ) -> Any:
        return self.progress.loader(args, collate, self.packing)

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        facts = super().batching_facts(args)
        # each process packs the rows that it reads, so another number of them makes other packs
        return facts if self.packing is None else {"processes": args.world_size, **facts}

    def resume(self, checkpoint: str, args: TrainingArguments) -> None:
        self.progress.resume(checkpoint, args)

    def finish(self) -> None:
        self.progress.finish()

    def set_epoch(self, state: TrainerState) -> None:
        # a stream has no epochs, and transformers counts from the start of this process
        state.epoch = state.global_step / state.max_steps

    def metrics(self, reduce: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        if not self.progress.streams.skip_bad:
            return {}
        bad = torch.tensor([float(self.progress.state.num_bad)])
        return {"bad_rows": float(bad if reduce is None else reduce(bad))}

    def gather_state(self) -> list[StreamState]:
        # each process reads rows of its own, so a resume needs the position of every one
        return all_gather(self.progress.state)

    def save_state(self, folder: Path, step: int, state: Any) -> None:
        if is_main_process():
            save_states(folder, step, state)


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
        # packs of a step must be equally long: a spare percent lets their rows be dealt again
        aim = plan.max_tokens if self.num_packs == 1 else round(0.99 * plan.max_tokens)
        self._tight = dataclasses.replace(plan, max_tokens=max(aim, max(plan.lengths)))
        self.first = self._plan_epoch(0, 0)

    def __len__(self) -> int:
        return len(self.first) * self.num_accumulated

    @property
    def sampler(self) -> PackSampler:
        """The sampler itself: accelerate looks here for `set_epoch`, also when it skips batches."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        own = slice(self.process, None, self.num_processes)
        return iter(
            [self.plan.dataset_rows(p) for step in self.steps(self.epoch) for p in step[own]]
        )

    def steps(self, epoch: int) -> list[list[Pack]]:
        """Return the packs of all processes for each step: as many steps as the first epoch has."""
        if epoch == 0:
            return self.first
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

    def on_epoch_begin(self, args: Any, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        at = getattr(kwargs.get("train_dataloader"), "batch_sampler", None)
        while at is not None:
            if hasattr(at, "set_epoch"):
                # `state.epoch` has a fraction where a run resumes within an epoch
                at.set_epoch(int(state.epoch or 0))
            layers = (getattr(at, "batch_sampler", None), getattr(at, "sampler", None))
            at = next((x for x in layers if x is not None and x is not at), None)
