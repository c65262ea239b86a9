"""Dry run of a stage: a few steps at learning rate zero, measured in time and memory.

1. One step warms up: it makes the optimizer's state and whatever else is made once.
2. One step has the largest batch of the stage: its peak of memory counts.
3. `NUM_TIMED` ordinary steps: their median time counts.

Weights, buffers, gradients and random state are the same afterwards.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from multi_token.errors import MultiTokenError
from multi_token.train.dpo import PreferenceDataset
from multi_token.train.plan.oom import (
    bullet_list,
    is_out_of_memory,
    memory_capacity,
    memory_suggestions,
)
from multi_token.train.random_state import preserve_rng_state
from multi_token.types import IGNORE_INDEX

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer

NUM_TIMED = 3
"""Steps whose time is measured."""


@dataclass(frozen=True)
class DryRunResult:
    """Measurements on this device."""

    seconds_per_token: float
    """Waiting for a batch, forward and backward."""
    seconds_per_update: float
    """Clipping gradients and the optimizer's step, once per step."""
    flops_per_token: float
    num_bytes: int
    """Peak of a step with the largest batch, without weights and optimizer state."""
    fitted_fraction: float = 1.0
    """Part of the largest batch that fitted into memory, 0 to 1."""


def dry_run(trainer: MultiTokenTrainer) -> DryRunResult:
    """Run a few steps of a trainer that is ready to start.

    Where a batch does not fit into memory, half of its rows are tried, and so on; the memory of all
    rows is extrapolated. Raises MultiTokenError where one row, or a pack, does not fit.
    """
    args, is_pack = trainer.args, trainer.batches.pack_tokens is not None
    num_rows = size = args.per_device_train_batch_size
    largest = largest_batch(trainer)
    while True:
        try:
            with _batch_size(trainer, size):
                return _timed_steps(trainer, largest, size / num_rows)
        except Exception as error:
            # MemoryError, torch's own and RuntimeError; all others are raised again
            if not is_out_of_memory(error):
                raise
        # after `except`, which keeps the traceback and with it the tensors of the failed step
        trainer.step_metrics.reset()
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        if is_pack or size == 1:
            batch = "a pack" if is_pack else "a batch of one row"
            suggestions = memory_suggestions(trainer.oom_facts(), 0.5 if is_pack else 0.0)
            raise MultiTokenError(
                f"{batch} does not fit into the memory of {args.device}, with "
                f"{memory_capacity(args.device) / 2**30:,.1f} GiB. Change in the recipe:"
                f"{bullet_list(suggestions)}"
            )
        size //= 2


@contextmanager
def _batch_size(trainer: MultiTokenTrainer, size: int) -> Iterator[None]:
    """Batches of `size` rows within."""
    # transformers copies the argument into `_train_batch_size` when the trainer is made
    before = trainer.args.per_device_train_batch_size, trainer._train_batch_size
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
    try:
        yield
    finally:
        trainer.args.per_device_train_batch_size, trainer._train_batch_size = before


def _timed_steps(trainer: MultiTokenTrainer, largest: int, fitted: float) -> DryRunResult:
    model, metrics, device = trainer.multi_token_model, trainer.step_metrics, trainer.args.device
    batch_times: list[float] = []
    update_times: list[float] = []
    flops = num_tokens = 0
    with _state_restored(model), trainer.attention_mode(), _activation_checkpointing(trainer):
        optimizer = _zero_lr_optimizer(trainer)

        def update() -> None:
            if trainer.args.max_grad_norm:
                trainer._clip_grad_norm(model)
            optimizer.step()

        batches = _cycle(trainer)
        _forward_backward(trainer, next(batches))
        update()
        # with accumulation the gradients of earlier batches are there when the largest one comes
        if trainer.args.gradient_accumulation_steps == 1:
            model.zero_grad(set_to_none=True)
        kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        inputs = _largest(trainer, next(batches))
        # the batch at hand may be smaller than the largest of the stage: a stream is not read
        # ahead, and half of the rows may be all that fits
        scale = max(largest / inputs["input_ids"].numel(), 1.0)
        with peak_memory(device) as peak:
            _forward_backward(trainer, inputs)
            update()
        model.zero_grad(set_to_none=True)
        for _ in range(NUM_TIMED):
            start = _now(device)
            _forward_backward(trainer, next(batches))
            middle = _now(device)
            update()
            model.zero_grad(set_to_none=True)
            update_times.append(_now(device) - middle)
            batch_times.append((middle - start) / max(metrics.last_tokens, 1))
            flops += metrics.last_flops
            num_tokens += metrics.last_tokens
    metrics.reset()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # gradients have one size, whatever the batch; only the rest grows with it
    beside = max(kept + peak[0] - gradients, 0)
    return DryRunResult(
        median(batch_times),
        median(update_times),
        flops / max(num_tokens, 1),
        gradients + round(beside * scale),
        fitted,
    )


def largest_batch(trainer: MultiTokenTrainer) -> int:
    """Positions of the largest batch of the stage; padded, its longest row sets the length."""
    batches, rows = trainer.batches, trainer.train_dataset
    if batches.pack_tokens is not None:
        return batches.pack_tokens
    size = min(trainer.args.per_device_train_batch_size, len(batches.lengths))
    longest = 2 * rows.longest if isinstance(rows, PreferenceDataset) else max(batches.lengths)
    return size * longest


def _forward_backward(trainer: MultiTokenTrainer, inputs: dict[str, Any]) -> None:
    model = trainer.multi_token_model
    # dropout and activation checkpointing take memory in train mode only
    model.train()
    trainer.training_step(model, inputs, (inputs["labels"] != IGNORE_INDEX).sum())


def _cycle(trainer: MultiTokenTrainer) -> Iterator[dict[str, Any]]:
    """Batches of the stage, from the first again after the last."""
    while True:
        yield from trainer.get_train_dataloader()


def _largest(trainer: MultiTokenTrainer, other: dict[str, Any]) -> dict[str, Any]:
    """The batch of the longest rows, or the fullest pack.

    `other`: the batch to take of a stream, whose later rows are not read yet.
    """
    rows: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    # known rows of a stream are its first ones, which may be shorter than later ones
    if trainer.batches.streamed:
        return other
    chosen = trainer.batches.fullest_pack(trainer.args.seed)
    if chosen is None:
        pairs = isinstance(rows, PreferenceDataset)
        lengths = [max(pair) for pair in rows.lengths] if pairs else trainer.batches.lengths
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        chosen = by_length[: trainer.args.per_device_train_batch_size]
    return collate([rows[i] for i in chosen])


def _zero_lr_optimizer(trainer: MultiTokenTrainer) -> torch.optim.Optimizer:
    """Optimizer of the trainer's kind that changes no weight."""
    optimizer = trainer.create_optimizer()
    trainer.optimizer = None  # or the trainer would train with this one
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


@contextmanager
def _activation_checkpointing(trainer: MultiTokenTrainer) -> Iterator[None]:
    """Activation checkpointing, if the run uses it; transformers enables it only in `train()`."""
    args, model = trainer.args, trainer.multi_token_model
    if not args.activation_checkpointing:
        yield
        return
    given: Any = args.activation_checkpointing_kwargs or {}
    options: dict[str, Any] = dict(given)
    model.activation_checkpointing_enable(
        every_n_layers=options.pop("every_n_layers", 1),
        offload=options.pop("offload", False),
        activation_checkpointing_kwargs=options or None,
    )
    try:
        yield
    finally:
        model.activation_checkpointing_disable()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _state_restored(model: torch.nn.Module) -> Iterator[None]:
    """Put back buffers (BatchNorm counts even at learning rate zero), mode and random state."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    training = model.training
    try:
        with preserve_rng_state():
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
        model.zero_grad(set_to_none=True)
        model.train(training)


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[list[int]]:
    """Yield a list of one number: after the block, its peak of new tensor memory in bytes."""
    peak = [0]
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    # On a CPU torch keeps no peak, but its profiler records every allocation. The process's own
    # peak would not do: an earlier, larger moment hides all later ones.
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield peak
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: Any = profile.profiler.kineto_results.events()
    # the events come by thread, not by time
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    taken = 0
    for _, num_bytes in changes:
        taken += num_bytes
        peak[0] = max(peak[0], taken)
