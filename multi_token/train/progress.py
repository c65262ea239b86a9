"""Progress bar of a stage, and its answer to Ctrl-C and SIGTERM: save, then stop."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multi_token.distributed import any_rank

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer


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

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.stop()


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    SIGTERM, by which a scheduler or torchrun ends a job, does the same; a second one changes
    nothing. All processes stop at the same step, whichever of them got the signal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
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

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # one reduction a step: a process that stops alone would leave the others in a collective
        self.interrupted = any_rank(self.interrupted, args.device)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Put back the signal handlers of before, however training ended."""
        while self.previous:
            signal.signal(*self.previous.popitem())
