"""Rows of about one length in one batch, in an order that epoch and seed decide alone.

Border: indices of rows. That a sampler hears of its epoch is seen to here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedSampler(Sampler[int]):
    """Batches of rows of about one length, in random order; the same again after a resume."""

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch, also when a run resumes within one (see `SetEpochCallback`)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        # within a megabatch the longest come first, which would be a curriculum
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        # a batch that is not full stays last, or it would shift the borders of those behind it
        full = [i for i in shuffled if len(batches[i]) == self.batch_size]
        rest = [i for i in shuffled if len(batches[i]) < self.batch_size]
        return iter([index for i in (*full, *rest) for index in batches[i]])


class SetEpochCallback(TrainerCallback):
    """Tells the sampler of the rows its epoch, however deep it lies below the loader.

    accelerate's loader looks three layers deep. A run of several processes that resumes within an
    epoch has four (skip, share, batch, sampler), and would get the rows of the first epoch again.
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """`state.epoch` has a fraction where a run resumes within an epoch."""
        at = getattr(train_dataloader, "batch_sampler", None)
        while at is not None:
            if hasattr(at, "set_epoch"):
                at.set_epoch(int(state.epoch or 0))
            layers = (getattr(at, "batch_sampler", None), getattr(at, "sampler", None))
            at = next((x for x in layers if x is not None and x is not at), None)
