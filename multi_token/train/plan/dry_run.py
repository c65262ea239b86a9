"""A few steps that are tried before a run: how long they take, and how much memory.

Border: tries steps of a trainer that is ready to go, without leaving a trace in weights or random
numbers. What follows from them for a whole stage is plan.py's.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from multi_token.errors import MultiTokenError
from multi_token.language_model.segment_attention import segment_attention_enabled
from multi_token.train.dpo import PreferenceDataset
from multi_token.train.plan.oom import (
    bullet_list,
    is_out_of_memory,
    memory_capacity,
    memory_suggestions,
)
from multi_token.train.samplers import PackSampler

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer

NUM_TIMED = 3
"""Steps whose time counts; one warms up before them, and one has the largest batch."""


@dataclass(frozen=True)
class DryRunResult:
    """What a few tried steps told, on this device."""

    seconds_per_token: float
    """Waiting for a batch, forward and backward."""
    seconds_per_update: float
    """Clipping gradients and the optimizer's step, which come once a step."""
    flops_per_token: float
    num_bytes: int
    """The most that a step with the largest batch takes beside weights and optimizer."""
    fitted_fraction: float = 1.0
    """How much of the largest batch was tried, since more of it did not fit, 0 to 1."""


def dry_run(trainer: MultiTokenTrainer) -> DryRunResult:
    """A few real steps: forward, backward and optimizer, at a learning rate of zero.

    Weights, buffers, gradients and random numbers are afterwards as they were. Where a batch does
    not fit into memory, half of its rows are tried, and so on; what a whole one would take follows
    from that. Raises MultiTokenError where one row, or a pack, does not fit.
    """
    whole = size = trainer.args.per_device_train_batch_size
    largest = largest_batch(trainer)
    while True:
        trial = _try_batch_size(trainer, size, largest, whole)
        if trial is not None:
            return trial
        gc.collect()  # what the failed step made may hang in cycles
        if trainer.args.device.type == "cuda":
            torch.cuda.empty_cache()
        if trainer.packing is not None or size == 1:
            is_pack = trainer.packing is not None
            what = "a pack" if is_pack else "a batch of one row"
            raise MultiTokenError(
                f"{what} does not fit into the memory of {trainer.args.device}, with "
                f"{memory_capacity(trainer.args.device) / 2**30:,.1f} GiB. Change in the recipe:"
                f"{bullet_list(memory_suggestions(trainer.oom_facts(), 0.5 if is_pack else 0.0))}"
            )
        size //= 2


def _try_batch_size(
    trainer: MultiTokenTrainer, size: int, largest: int, whole: int
) -> DryRunResult | None:
    """With batches of so many rows, of which a `whole` one has up to `largest` positions; None if
    memory is not enough.
    """
    try:
        with _batch_size_override(trainer, size):
            return _timed_steps(trainer, largest, size / whole)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        trainer.step_metrics.detach()
        trainer.step_metrics.reset()
        return None


@contextmanager
def _batch_size_override(trainer: MultiTokenTrainer, size: int) -> Iterator[None]:
    """Within, the trainer makes batches of so many rows."""
    before = trainer.args.per_device_train_batch_size, trainer._train_batch_size
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
    try:
        yield
    finally:
        trainer.args.per_device_train_batch_size, trainer._train_batch_size = before


def _timed_steps(trainer: MultiTokenTrainer, largest: int, fitted: float) -> DryRunResult:
    model, device, step_metrics = (
        trainer._multi_token_model(),
        trainer.args.device,
        trainer.step_metrics,
    )
    learning: list[float] = []
    updating: list[float] = []
    flops = num_tokens = 0
    with state_restored(model), ExitStack() as stack:
        by_segment = trainer.packing is not None and model.capabilities.supports_segment_attention
        stack.enter_context(
            segment_attention_enabled(model.language_model) if by_segment else nullcontext()
        )
        stack.enter_context(_activation_checkpointing(trainer))
        optimizer = _zero_lr_optimizer(trainer)

        def update() -> None:
            if trainer.args.max_grad_norm:
                trainer._clip_grad_norm(model)
            optimizer.step()

        batches = _cycle(trainer)
        _forward_backward(
            trainer, next(batches)
        )  # makes the optimizer's state, and whatever is made once
        update()
        if trainer.args.gradient_accumulation_steps == 1:
            model.zero_grad(set_to_none=True)  # else gradients are there as a batch comes
        kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        inputs = _largest(trainer, next(batches))
        share = max(largest / inputs["input_ids"].numel(), 1.0)
        with peak_memory(device) as peak:
            _forward_backward(trainer, inputs)
            update()
        model.zero_grad(set_to_none=True)
        for _ in range(NUM_TIMED):
            start = _now(device)
            _forward_backward(trainer, next(batches))
            learned = _now(device)
            update()
            model.zero_grad(set_to_none=True)
            updating.append(_now(device) - learned)
            learning.append((learned - start) / max(step_metrics.last_tokens, 1))
            flops += step_metrics.last_flops
            num_tokens += step_metrics.last_tokens
        step_metrics.detach()
    step_metrics.reset()
    learned_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    beside = max(kept + peak[0] - learned_bytes, 0)
    return DryRunResult(
        median(learning),  # what else the machine does may disturb one of them
        median(updating),
        flops / max(num_tokens, 1),
        learned_bytes + round(beside * share),
        fitted,
    )


def largest_batch(trainer: MultiTokenTrainer) -> int:
    """Positions of the largest batch that may come: padded, its longest row sets the length."""
    if trainer.packing is not None:
        return trainer.packing.max_tokens
    size = min(trainer.args.per_device_train_batch_size, len(trainer.lengths))
    rows: Any = trainer.train_dataset
    return size * (
        2 * rows.longest if isinstance(rows, PreferenceDataset) else max(trainer.lengths)
    )


def _forward_backward(trainer: MultiTokenTrainer, inputs: dict[str, Any]) -> None:
    """Forward and backward of a batch."""
    model = trainer._multi_token_model()
    model.train()
    trainer.training_step(model, inputs, (inputs["labels"] != -100).sum())


def _cycle(trainer: MultiTokenTrainer) -> Iterator[dict[str, Any]]:
    """Batches of a run, from the beginning again where they end."""
    while True:
        yield from trainer.get_train_dataloader()


def _largest(trainer: MultiTokenTrainer, other: dict[str, Any]) -> dict[str, Any]:
    """The batch of the longest rows or the fullest pack; the `other` one of a stream, whose rows
    come as they will.
    """
    rows: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    if trainer.streamed is not None:
        inputs = other
    elif trainer.packing is not None:
        packs = list(PackSampler(trainer.packing, seed=trainer.args.seed))
        fullest = max(packs, key=lambda pack: sum(trainer.lengths[i] for i in pack))
        inputs = collate([rows[i] for i in fullest])
    else:
        lengths = (
            [max(pair) for pair in rows.lengths]
            if isinstance(rows, PreferenceDataset)
            else trainer.lengths
        )
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        longest = by_length[: trainer.args.per_device_train_batch_size]
        inputs = collate([rows[i] for i in longest])
    return inputs


def _zero_lr_optimizer(trainer: MultiTokenTrainer) -> torch.optim.Optimizer:
    """An optimizer of the trainer's kind that moves nothing; the trainer's own is made later."""
    optimizer = trainer.create_optimizer()
    trainer.optimizer = None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


@contextmanager
def _activation_checkpointing(trainer: MultiTokenTrainer) -> Iterator[None]:
    """Activation checkpointing, if the run will have it: transformers turns it on as it begins."""
    args, model = trainer.args, trainer._multi_token_model()
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
def state_restored(model: torch.nn.Module) -> Iterator[None]:
    """Within, steps may be tried: buffers, mode and random numbers are put back at the end."""
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
def preserve_rng_state() -> Iterator[None]:
    """What is drawn within leaves no trace in what is drawn afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[list[int]]:
    """[bytes]: the most that tensors took inside beside what they took before.

    On a GPU its allocator says it; for a CPU (the default) torch's profiler, which hears of every
    allocation. The process's memory would not do: a longer past has made it large already.
    """
    peak = [0]
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        yield peak
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: Any = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    taken = 0
    for _, num_bytes in changes:
        taken += num_bytes
        peak[0] = max(peak[0], taken)
