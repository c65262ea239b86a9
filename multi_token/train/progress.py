"""What a run shows: its parts and what learns before it starts, a bar with loss and speed then.

Border: words about a model, and callbacks of the trainer; it changes nothing but the answer to
Ctrl-C (save, then stop).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multi_token.distributed import any_rank
from multi_token.language_model.quantization import module_bytes, quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.train.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from multi_token.recipe.train import TrainSpec
    from multi_token.train.trainer import MultiTokenTrainer


_WAITS = 0.05
"""The share of a stage that may be spent waiting for data before it is spoken of."""


def describe_parts(model: MultiTokenForConditionalGeneration) -> list[str]:
    """A line for each part (precision, size), and one for all that the probe found unusual.

    Raises LanguageModelError for a language model that cannot be driven by embeddings.
    """
    parts: dict[str, nn.Module] = {
        f"language model {model.capabilities.name}": model.language_model
    }
    parts |= {f"encoder of {name}": encoder for name, encoder in model.encoders.items()}
    parts |= {f"projector of {name}": projector for name, projector in model.projectors.items()}
    lines = [
        f"{name}: {_precision(part)}, {_size(module_bytes(part))}" for name, part in parts.items()
    ]
    return [*lines, *(f"  {finding}" for finding in model.capabilities.notes())]


def _precision(part: nn.Module) -> str:
    """`float32`, or `bfloat16 and quantized` where weights differ."""
    quantized = {id(p) for p in quantized_parameters(part)}
    dtypes = {
        "quantized" if id(p) in quantized else str(p.dtype).removeprefix("torch.")
        for p in part.parameters()
    }
    return " and ".join(sorted(dtypes)) or "no weights"


def _size(num: int) -> str:
    return f"{num / 1e6:,.1f} MB" if num >= 1e5 else f"{num:,} bytes"


def describe_groups(groups: Sequence[ParameterGroup]) -> list[str]:
    """A line for each group that learns: how many parameters, in what precision, how fast."""
    return [
        f"  {group.name}: {sum(p.numel() for p in group.parameters):,} parameters in "
        f"{' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in group.parameters}))}, "
        f"learning rate {group.lr:g}"
        + (f", weight decay {group.weight_decay:g}" if group.weight_decay else "")
        for group in groups
    ]


def describe_loggers(args: TrainingArguments) -> str:
    """Where the numbers go that are logged, besides the run's own report."""
    if args.report_to:
        return f"  logged to {', '.join(args.report_to)} every {args.logging_steps:g} steps"
    if find_spec("tensorboard") is None:
        return (
            "  logged to report.html alone: tensorboard is not installed (`pip install "
            "tensorboard`, or set train.args.report_to to another)"
        )
    return "  logged to report.html alone (train.args.report_to names others)"


def describe_data_wait(trainer: MultiTokenTrainer, spec: TrainSpec) -> str:
    """How much of its stage a trainer was waiting for data, and what helps in this recipe."""
    model = trainer._multi_token_model()
    encoded = any(p.numel() for e in model.encoders.values() for p in e.parameters())
    learns = any(stage.learn.encoders for stage in spec.stages)
    return data_wait_line(
        trainer.step_metrics.data_wait,
        num_workers=trainer.args.dataloader_num_workers,
        streamed=trainer.streamed is not None,
        can_cache=encoded and not learns and not spec.feature_cache,
    )


def data_wait_line(
    share: float | None, *, num_workers: int, streamed: bool, can_cache: bool = True
) -> str:
    """How much of a stage was waiting for data, and what helps where it was a lot."""
    if share is None:
        return "  no step was taken"
    text = f"  {share:.1%} of the time was waiting for data"
    if share <= _WAITS:
        return text
    who = f"{num_workers} processes beside it" if num_workers else "the process that trains"
    kept = "train.feature_cache" + (".path: a folder that is filled" if streamed else ": true")
    return (
        f"{text}: rows are read by {who}; set train.args.dataloader_num_workers: "
        f"{max(2, 2 * num_workers)} if there are cores to spare" + f", or {kept}" * can_cache
    )


class ProgressBarCallback(TrainerCallback):
    """A bar on a terminal, a line for each logged step elsewhere."""

    def __init__(self, trainer: MultiTokenTrainer, console: Console, title: str) -> None:
        self.trainer = trainer
        self.console = console
        self.progress = Progress(
            TextColumn(title),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.title = title
        self.task: Any = None
        self.since = 0.0
        self.first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.since = time.perf_counter()
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, facts=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)
        if self.first:
            self.first = False
            num_tokens = round(self.trainer.step_metrics.total("tokens"))
            num_supervised = round(self.trainer.step_metrics.total("supervised"))
            self.console.print(
                f"first batch: {num_tokens:,} tokens, {num_supervised:,} "
                f"({num_supervised / max(num_tokens, 1):.0%}) supervised",
                highlight=False,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """The log of a step."""
        if not logs or "loss" not in logs:
            return
        now, then = time.perf_counter(), self.since
        self.since = now
        text = (
            f"loss {logs['loss']:.3f} · {logs.get('tokens_per_second', 0):.0f} tok/s · "
            f"{logs.get('supervised_fraction', 0):.0%} supervised"
        )
        self.progress.update(self.task, facts=text)
        if self.progress.disable:
            left = (state.max_steps - state.global_step) * (now - then) / args.logging_steps
            self.console.print(
                f"{self.title} {state.global_step}/{state.max_steps} · {text} · "
                f"{max(left, 0):.0f} s left",
                highlight=False,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.stop()


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    SIGTERM, by which a scheduler or torchrun ends a job, does the same; a second one changes
    nothing. All processes stop at one step, whichever of them the signal reached.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, *_: Any) -> None:
        by_hand = number == signal.SIGINT
        if self.interrupted and by_hand:
            raise KeyboardInterrupt
        if not self.interrupted:
            what = "Ctrl-C" if by_hand else "SIGTERM"
            again = " (once more to stop at once)" if by_hand else ""
            self.console.print(f"{what}: saving after this step{again} ...")
        self.interrupted = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.interrupted = any_rank(self.interrupted, args.device)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Signals do again what they did before, however training ended."""
        while self.previous:
            signal.signal(*self.previous.popitem())
