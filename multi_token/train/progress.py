"""Output of a stage: lines about its parts, a progress bar, and an answer to Ctrl-C and SIGTERM."""

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

from multi_token.distributed import DelayedAny
from multi_token.language_model.quantization import module_bytes, quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.train.parameter_groups import ParameterGroup

if TYPE_CHECKING:
    from multi_token.recipe.train import TrainSpec
    from multi_token.train.trainer import MultiTokenTrainer

_MAX_WAIT = 0.05
"""Share of a stage spent waiting for data, above which the remedy is printed."""


def describe_parts(model: MultiTokenForConditionalGeneration) -> list[str]:
    """A line for each part (precision, size), and one for each unusual capability.

    Raises LanguageModelError for a language model that takes no embeddings.
    """
    parts: dict[str, nn.Module] = {
        f"language model {model.capabilities.name}": model.language_model
    }
    parts |= {f"encoder of {name}": encoder for name, encoder in model.encoders.items()}
    parts |= {f"projector of {name}": projector for name, projector in model.projectors.items()}
    lines = [
        f"{name}: {_precision(part)}, {_size(module_bytes(part))}" for name, part in parts.items()
    ]
    return [*lines, *(f"  {note}" for note in model.capabilities.notes())]


def _precision(part: nn.Module) -> str:
    """`float32`, or `bfloat16 and quantized` where weights differ."""
    # by identity: the storage dtype of a quantized weight (uint8) says nothing to a user
    quantized = {id(p) for p in quantized_parameters(part)}
    dtypes = {
        "quantized" if id(p) in quantized else str(p.dtype).removeprefix("torch.")
        for p in part.parameters()
    }
    return " and ".join(sorted(dtypes)) or "no weights"


def _size(num: int) -> str:
    return f"{num / 1e6:,.1f} MB" if num >= 1e5 else f"{num:,} bytes"


def describe_groups(groups: Sequence[ParameterGroup]) -> list[str]:
    """A line for each trainable group: parameters, precision, learning rate, weight decay."""
    return [
        f"  {group.name}: {sum(p.numel() for p in group.parameters):,} parameters in "
        f"{' and '.join(sorted({str(p.dtype).removeprefix('torch.') for p in group.parameters}))}, "
        f"learning rate {group.lr:g}"
        + (f", weight decay {group.weight_decay:g}" if group.weight_decay else "")
        for group in groups
    ]


def describe_loggers(args: TrainingArguments) -> str:
    """Loggers that get the metrics, besides the run's own report."""
    if args.report_to:
        return f"  logged to {', '.join(args.report_to)} every {args.logging_steps:g} steps"
    if find_spec("tensorboard") is None:
        return (
            "  logged to report.html alone: tensorboard is not installed (`pip install "
            "tensorboard`, or set train.args.report_to to another)"
        )
    return "  logged to report.html alone (train.args.report_to names others)"


def describe_data_wait(trainer: MultiTokenTrainer, spec: TrainSpec) -> str:
    """Share of a stage that was spent waiting for data, and the remedy in this recipe."""
    encoders = trainer.multi_token_model.encoders.values()
    # a cache spares nothing where encoders have no weights, and is wrong where they are trained
    encoded = any(p.numel() for encoder in encoders for p in encoder.parameters())
    trained = any(stage.learn.encoders for stage in spec.stages)
    return data_wait_line(
        trainer.step_metrics.data_wait,
        num_workers=trainer.args.dataloader_num_workers,
        streamed=trainer.batches.streamed,
        can_cache=encoded and not trained and not spec.feature_cache,
    )


def data_wait_line(
    share: float | None, *, num_workers: int, streamed: bool, can_cache: bool = True
) -> str:
    """The share as a line; `can_cache`: a feature cache would spare the encoders' work."""
    if share is None:
        return "  no step was taken"
    text = f"  {share:.1%} of the time was waiting for data"
    if share <= _MAX_WAIT:
        return text
    reader = f"{num_workers} data workers" if num_workers else "the process that trains"
    cache = "train.feature_cache" + (".path: a folder that is filled" if streamed else ": true")
    return (
        f"{text}: rows are read by {reader}; set train.args.dataloader_num_workers: "
        f"{max(2, 2 * num_workers)} if there are cores to spare" + f", or {cache}" * can_cache
    )


class ProgressBarCallback(TrainerCallback):
    """Progress bar on a terminal; a line for each logged step elsewhere."""

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
            # a bar redraws its line, which would fill a log file
            disable=not console.is_terminal,
        )
        self.title = title
        self.task: Any = None
        self.since = 0.0
        self.first = True

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self.since = time.perf_counter()
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, facts=""
        )

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
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
            # by the speed since the last log, which follows a run that slows down
            left = (state.max_steps - state.global_step) * (now - then) / args.logging_steps
            self.console.print(
                f"{self.title} {state.global_step}/{state.max_steps} · {text} · "
                f"{max(left, 0):.0f} s left",
                highlight=False,
            )

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.progress.stop()


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    SIGTERM, by which a scheduler or torchrun ends a job, does the same; a second one changes
    nothing. All processes stop at the same step, whichever of them got the signal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False
        self.flag: DelayedAny | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        # Python installs signal handlers from the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, *_: Any) -> None:
        by_hand = number == signal.SIGINT
        # a handler runs in the middle of any line, so it sets a flag that the next step reads
        if self.interrupted and by_hand:
            raise KeyboardInterrupt
        if not self.interrupted:
            what = "Ctrl-C" if by_hand else "SIGTERM"
            again = " (once more to stop at once)" if by_hand else ""
            self.console.print(f"{what}: saving after this step{again} ...")
        self.interrupted = True

    def on_step_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        # One reduction a step: a process that stops alone would leave the others in a collective.
        # Begun before the step and read after it, so that the host does not wait for its work.
        if args.world_size > 1:
            self.flag = DelayedAny(self.interrupted, args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.flag is None:
            is_agreed = self.interrupted
        else:
            is_agreed, self.flag = self.flag.read(), None
        if is_agreed:
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Put back the signal handlers of before, however training ended."""
        while self.previous:
            signal.signal(*self.previous.popitem())
