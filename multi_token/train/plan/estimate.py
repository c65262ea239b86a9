"""Plan of a stage: steps, tokens, memory and time, from a trainer that is ready to start."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor
from transformers.training_args import OptimizerNames

from multi_token.language_model.quantization import module_bytes
from multi_token.train.flops import format_count
from multi_token.train.plan.dry_run import NUM_TIMED, DryRunResult, dry_run
from multi_token.train.plan.oom import bullet_list, memory_capacity, memory_suggestions
from multi_token.train.random_state import preserve_rng_state

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer

_FULL = 0.9
"""Share of a device's memory that a run may be planned for; fragmentation takes the rest."""


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

    @property
    def seconds(self) -> float | None:
        """Seconds of the stage; None where no step was tried."""
        per_step = self.seconds_per_step
        return None if per_step is None else per_step * self.num_steps

    @property
    def seconds_per_step(self) -> float | None:
        if self.dry_run is None:
            return None
        of_tokens = self.dry_run.seconds_per_token * self.tokens_per_device
        return of_tokens + self.dry_run.seconds_per_update


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
    """Print steps, tokens and memory, details if steps were tried, and warnings."""
    lines = [*summary_lines(plan), *detail_lines(plan)]
    warnings = plan_warnings(plan, trainer, capacity=memory_capacity(trainer.args.device))
    console.print(*lines, *warnings, sep="\n", highlight=False, markup=False, soft_wrap=True)


def summary_lines(plan: StagePlan) -> list[str]:
    """Return the two lines with which every stage starts."""
    memory = plan.memory
    weights, gradients, optimizer = map(
        format_bytes, (sum(memory.weights.values()), memory.gradients, memory.optimizer)
    )
    return [
        f"  {plan.num_steps:,} steps of about {plan.tokens_per_step:,.0f} tokens, from "
        f"{plan.num_rows:,} rows of {plan.num_tokens:,} tokens",
        f"  memory per device: {format_bytes(memory.fixed)} before any batch (weights {weights}, "
        f"gradients {gradients}, optimizer {optimizer})",
    ]


def detail_lines(plan: StagePlan) -> list[str]:
    """Return weights by part, activations, FLOPs and time; nothing if no step was tried."""
    memory, measured = plan.memory, plan.dry_run
    if measured is None or plan.seconds is None or plan.seconds_per_step is None:
        return []
    flops = measured.flops_per_token * plan.tokens_per_step
    return [
        *(f"    {name}: {format_bytes(num)}" for name, num in memory.weights.items()),
        f"    activations of the largest batch: about {format_bytes(memory.activations or 0)}, "
        f"in all {format_bytes(memory.total)}",
        f"  {format_count(flops)}FLOP a step, {format_count(flops * plan.num_steps)}FLOP in all",
        f"  about {plan.seconds_per_step:.3g} s a step ({NUM_TIMED} steps were tried), "
        f"{format_duration(plan.seconds)} in all without evaluation and saving",
    ]


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
