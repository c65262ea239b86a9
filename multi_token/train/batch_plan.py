"""Batches of a stage: padded rows, packs, or a stream, each with its loader and resume state.

A `BatchPlan` is handed to the trainer, which therefore has no branch for how rows are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import seed_worker

from multi_token.data.packing import PackingPlan
from multi_token.data.stream_loader import StreamProgress, StreamState, save_states
from multi_token.data.streaming import StreamDataset
from multi_token.distributed import all_gather, is_main_process
from multi_token.errors import RecipeError
from multi_token.train.samplers import LengthGroupedSampler, PackSampler


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
        """Return the batches of this process, or None for transformers' own loader.

        Raises RecipeError for arguments that this plan excludes.
        """
        return None

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        """Return the numbers that a resumed run must share with the one before."""
        raise NotImplementedError

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
            seed=args.data_seed or args.seed,
        )

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        return _rows_per_step(args)


class PackedBatches(BatchPlan):
    """Packs: one plan of an epoch for all processes, of which each walks through its own part."""

    def __init__(self, packing: PackingPlan, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.packing = packing
        self.pack_tokens = packing.max_tokens

    def loader(
        self, args: TrainingArguments, dataset: Any, collate: Any, accelerator: Accelerator
    ) -> Any:
        _check_one_device(args)
        loader = DataLoader(
            dataset,
            batch_sampler=PackSampler(
                self.packing,
                seed=args.data_seed or args.seed,
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

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        return {
            "packs_per_step": args.world_size * args.gradient_accumulation_steps,
            "tokens_per_pack": self.packing.max_tokens,
        }

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
        if self.packing is not None:
            _check_one_device(args)
        return self.progress.loader(args, collate, self.packing)

    def batching_facts(self, args: TrainingArguments) -> dict[str, int]:
        if self.packing is None:
            return _rows_per_step(args)
        # each process packs the rows that it reads, so another number of them makes other packs
        return {
            "processes": args.world_size,
            "packs_per_step": args.world_size * args.gradient_accumulation_steps,
            "tokens_per_pack": self.packing.max_tokens,
        }

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


def _rows_per_step(args: TrainingArguments) -> dict[str, int]:
    each = args.train_batch_size * args.gradient_accumulation_steps
    return {"rows_per_step": each * args.world_size}


def _check_one_device(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise RecipeError(
            f"a pack is one row, which {args.n_gpu} devices of one process cannot share; start "
            "a process for each device (torchrun), or set train.packing to false"
        )
