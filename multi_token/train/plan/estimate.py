"""Plan of a stage that is ready to start: steps, tokens, memory and time, from a dry run.

A dry run takes a few steps at learning rate zero:

1. One step warms up: it makes the optimizer's state and whatever else is made once.
2. One step has the largest batch of the stage: its peak of memory counts.
3. `NUM_TIMED` ordinary steps: their median time counts.

Weights, buffers, gradients and random state are the same afterwards.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor
from transformers.training_args import OptimizerNames

from multi_token.errors import MultiTokenError
from multi_token.language_model.loss import num_bytes_per_token
from multi_token.language_model.quantization import module_bytes
from multi_token.train.dpo import PreferenceDataset
from multi_token.train.flops import format_count
from multi_token.train.plan.oom import (
    bullet_list,
    is_out_of_memory,
    memory_capacity,
    memory_suggestions,
)
from multi_token.train.random_state import preserve_rng_state
from multi_token.train.training_args import checkpointing_options, data_seed
from multi_token.types import IGNORE_INDEX

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.train.trainer import MultiTokenTrainer

NUM_TIMED = 3
"""Steps whose time is measured."""
_FULL = 0.9
"""Share of a device's memory that a run may be planned for; fragmentation takes the rest."""


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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device. All but `activations` are counted, not estimated."""

    weights: dict[str, int]
    """By part: `language model`, `encoder of image`, ..."""
    gradients: int
    optimizer: int
    activations: int | None = None
    """Activations of a step with the largest batch; None if no step was tried."""

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return sum(self.weights.values()) + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.fixed + (self.activations or 0)


@dataclass(frozen=True)
class StagePlan:
    """Work of a stage, with measurements if its steps were tried."""

    name: str
    num_rows: int
    num_tokens: int
    """Tokens of all rows, once."""
    num_steps: int
    tokens_per_step: float
    """Over all devices."""
    tokens_per_device: float
    """Tokens per step on one device."""
    memory: MemoryEstimate
    dry_run: DryRunResult | None = None


def plan_stage(trainer: MultiTokenTrainer, name: str, *, try_steps: bool) -> StagePlan:
    """Plan a stage; `try_steps`: measure time and activations by a dry run, too."""
    args, lengths = trainer.args, trainer.batches.lengths
    # making a sampler draws its seed, and a planned run has to draw the same numbers as another
    with preserve_rng_state():
        loader: Any = trainer.get_train_dataloader()
        num_batches = max(len(loader), 1)
    per_epoch = max(num_batches // args.gradient_accumulation_steps, 1)
    num_steps = (
        args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    )
    num_rows, num_tokens = len(lengths), sum(lengths)
    if trainer.batches.streamed:
        # lengths are those of its first rows, and a stream's number of batches is that of its steps
        num_batches_of_all = num_batches * args.world_size
        num_tokens = round(num_batches_of_all * loader.tokens_per_batch(lengths))
        num_rows = round(num_tokens * len(lengths) / sum(lengths))
    mean = num_tokens / num_batches / args.world_size  # of a batch on one device
    per_device = mean * args.gradient_accumulation_steps
    measured = dry_run(trainer) if try_steps else None
    memory = estimate_memory(trainer)
    if measured is not None:
        memory = replace(memory, activations=max(measured.num_bytes - memory.gradients, 0))
    return StagePlan(
        name,
        num_rows,
        num_tokens,
        num_steps,
        per_device * args.world_size,
        per_device,
        memory,
        measured,
    )


def estimate_memory(trainer: MultiTokenTrainer) -> MemoryEstimate:
    """Count bytes of weights as they are stored, gradients, and optimizer state."""
    model = trainer.multi_token_model
    weights = {"language model": module_bytes(model.language_model)}
    weights |= {f"encoder of {name}": module_bytes(e) for name, e in model.encoders.items()}
    weights |= {f"projector of {name}": module_bytes(p) for name, p in model.projectors.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return MemoryEstimate(
        weights, gradients, optimizer_bytes(OptimizerNames(trainer.args.optim).value, trained)
    )


def optimizer_bytes(optim: str, trainable: Sequence[Tensor]) -> int:
    """Bytes that an optimizer, by its name in transformers, keeps for these parameters."""
    numel = sum(p.numel() for p in trainable)
    own = sum(p.numel() * p.element_size() for p in trainable)
    if "8bit" in optim:
        # two moments of one byte; the scales of their blocks are left out
        return 2 * numel
    if optim == "adafactor":
        return sum(
            # a row and a column of second moments, in float32, in place of a matrix
            4 * (p.numel() // max(p.shape[-1], 1) + p.shape[-1])
            for p in trainable
            if p.ndim
        )
    if optim == "sgd":
        return 0
    if any(optim.startswith(kind) for kind in ("lion", "rmsprop", "adagrad")):
        return own
    return 2 * own  # Adam's two moments, in the precision of the parameters


def print_plan(plan: StagePlan, trainer: MultiTokenTrainer, console: Console) -> None:
    """Print steps, tokens and memory, warnings, and what the dry run measured if there was one."""
    memory, measured = plan.memory, plan.dry_run
    weights, gradients, optimizer = map(
        format_bytes, (sum(memory.weights.values()), memory.gradients, memory.optimizer)
    )
    lines = [
        f"  {plan.num_steps:,} steps of about {plan.tokens_per_step:,.0f} tokens, from "
        f"{plan.num_rows:,} rows of {plan.num_tokens:,} tokens",
        f"  memory per device: {format_bytes(memory.fixed)} before any batch (weights {weights}, "
        f"gradients {gradients}, optimizer {optimizer})",
    ]
    if measured is not None:
        flops = measured.flops_per_token * plan.tokens_per_step
        seconds = measured.seconds_per_token * plan.tokens_per_device + measured.seconds_per_update
        lines += [
            *(f"    {name}: {format_bytes(num)}" for name, num in memory.weights.items()),
            f"    activations of the largest batch: about {format_bytes(memory.activations or 0)}, "
            f"in all {format_bytes(memory.total)}",
            f"  {format_count(flops)}FLOP a step, "
            f"{format_count(flops * plan.num_steps)}FLOP in all",
            f"  about {seconds:.3g} s a step ({NUM_TIMED} steps were tried), "
            f"{format_duration(seconds * plan.num_steps)} in all without evaluation and saving",
        ]
    if trainer.batches.pack_tokens is not None:
        lines.append(f"  {trainer.describe_attention()}")
    lines += plan_warnings(plan, trainer, capacity=memory_capacity(trainer.args.device))
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def plan_warnings(plan: StagePlan, trainer: MultiTokenTrainer, *, capacity: int) -> list[str]:
    """Warn of more than `capacity` bytes, with the lines of the recipe to change."""
    memory, measured = plan.memory, plan.dry_run
    fitted = 1.0 if measured is None else measured.fitted_fraction
    if memory.total <= _FULL * capacity and fitted == 1.0:
        return []
    part = None
    if memory.activations:
        part = min(max(_FULL * capacity - memory.fixed, 0) / memory.activations, fitted)
    needed, present = format_bytes(memory.total), format_bytes(capacity)
    verdict = f"needs about {needed} a device, which has {present}; it will not fit"
    if memory.total <= _FULL * capacity:
        verdict = (
            f"needs about {needed} a device, and of its {present} there was not enough left when "
            "it was tried"
        )
    return [
        f"warning: stage {plan.name} {verdict}. Change in the recipe:"
        f"{bullet_list(memory_suggestions(trainer.oom_facts(), part))}"
    ]


def format_bytes(num: float) -> str:
    """`1.5 GiB`, `700 bytes`."""
    if num < 1024:
        return f"{num:,.0f} bytes"
    power = min((int(num).bit_length() - 1) // 10, 3)
    return f"{num / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def format_duration(seconds: float) -> str:
    """`2 h 5 min`, `41 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


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
            # transformers copies the argument into `_train_batch_size` when the trainer is made
            args.per_device_train_batch_size = trainer._train_batch_size = size
            return _timed_steps(trainer, largest, size / num_rows)
        except Exception as error:
            # MemoryError, torch's own and RuntimeError; all others are raised again
            if not is_out_of_memory(error):
                raise
        finally:
            args.per_device_train_batch_size = num_rows
            trainer._train_batch_size = args.train_batch_size
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


def _timed_steps(trainer: MultiTokenTrainer, largest: int, fitted: float) -> DryRunResult:
    model, metrics, device = trainer.multi_token_model, trainer.step_metrics, trainer.args.device
    batch_times: list[float] = []
    update_times: list[float] = []
    flops = num_tokens = 0
    with _state_restored(model), trainer.attention_mode(), _activation_checkpointing(trainer):
        optimizer = trainer.create_optimizer()
        trainer.optimizer = None  # or the trainer would train with this one
        for group in optimizer.param_groups:
            group["lr"] = 0.0

        def update() -> None:
            if trainer.args.max_grad_norm:
                trainer._clip_grad_norm(model)
            optimizer.step()

        # from the first batch again after the last
        batches = (batch for _ in itertools.count() for batch in trainer.get_train_dataloader())
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
        logits, bound = logits_bytes(model, len(inputs["supervised"]))
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
    trainer.finish_step_check()
    metrics.reset()
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # gradients have one size, whatever the batch, and logits a bound; the rest grows with it
    beside = max(kept + peak[0] - gradients - min(logits, bound), 0)
    return DryRunResult(
        median(batch_times),
        median(update_times),
        flops / max(num_tokens, 1),
        gradients + round(beside * scale + min(logits * scale, bound)),
        fitted,
    )


def logits_bytes(
    model: MultiTokenForConditionalGeneration, num_supervised: int
) -> tuple[int, float]:
    """Return bytes of the logits of a step if all are held at once, and most bytes of a chunk's.

    Both of the three float32 tensors of their size that a loss holds.
    """
    of_token = num_bytes_per_token(model.language_model)
    is_bounded = model.capabilities.supports_chunked_logits
    most = 3 * max(model.logits_bytes, of_token) if is_bounded else math.inf
    return 3 * of_token * num_supervised, most


def largest_batch(trainer: MultiTokenTrainer) -> int:
    """Positions of the largest batch of the stage; padded, its longest row sets the length."""
    batches, rows = trainer.batches, trainer.train_dataset
    if batches.pack_tokens is not None:
        return batches.pack_tokens
    size = min(trainer.args.per_device_train_batch_size, len(batches.lengths))
    if isinstance(rows, PreferenceDataset):
        return size * 2 * max(map(max, rows.lengths))
    return size * max(batches.lengths)


def _forward_backward(trainer: MultiTokenTrainer, inputs: dict[str, Any]) -> None:
    model = trainer.multi_token_model
    # dropout and activation checkpointing take memory in train mode only
    model.train()
    trainer.training_step(model, inputs, (inputs["labels"] != IGNORE_INDEX).sum())


def _largest(trainer: MultiTokenTrainer, other: dict[str, Any]) -> dict[str, Any]:
    """The batch of the longest rows, or the fullest pack.

    `other`: the batch to take of a stream, whose later rows are not read yet.
    """
    rows: Any = trainer.train_dataset
    collate: Any = trainer.data_collator
    # known rows of a stream are its first ones, which may be shorter than later ones
    if trainer.batches.streamed:
        return other
    chosen = trainer.batches.fullest_pack(data_seed(trainer.args))
    if chosen is None:
        pairs = isinstance(rows, PreferenceDataset)
        lengths = [max(pair) for pair in rows.lengths] if pairs else trainer.batches.lengths
        by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        chosen = by_length[: trainer.args.per_device_train_batch_size]
    return collate([rows[i] for i in chosen])


@contextmanager
def _activation_checkpointing(trainer: MultiTokenTrainer) -> Iterator[None]:
    """Activation checkpointing, if the run uses it; transformers enables it only in `train()`."""
    options, model = checkpointing_options(trainer.args), trainer.multi_token_model
    if options is None:
        yield
        return
    # transformers 5.17 has the older name alone
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    every, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    getattr(model, f"{name}_checkpointing_enable")(
        every_n_layers=every, offload=offload, **{f"{name}_checkpointing_kwargs": options or None}
    )
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


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
