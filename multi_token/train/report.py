"""What a run shows while it learns: a bar with loss, tokens a second, supervised share, time left.

Border: callbacks of the trainer; it changes nothing but the answer to Ctrl-C (save, then stop).
"""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer


class Bar(TrainerCallback):
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
        self.since = (0.0, 0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.since = (time.perf_counter(), self.trainer.num_tokens, self.trainer.num_supervised)
        self.progress.start()
        self.task = self.progress.add_task(
            "", total=state.max_steps, completed=state.global_step, facts=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """The log of a step, with counts since the last one written into the run's history."""
        if not logs or "loss" not in logs:
            return
        now, then = time.perf_counter(), self.since
        tokens = self.trainer.num_tokens - then[1]
        supervised = self.trainer.num_supervised - then[2]
        self.since = (now, self.trainer.num_tokens, self.trainer.num_supervised)
        facts = {
            "tokens_per_second": round(tokens / max(now - then[0], 1e-9), 1),
            "supervised_fraction": round(supervised / max(tokens, 1), 4),
        }
        state.log_history[-1].update(facts)
        text = (
            f"loss {logs['loss']:.3f} · {facts['tokens_per_second']:.0f} tok/s · "
            f"{facts['supervised_fraction']:.0%} supervised"
        )
        self.progress.update(self.task, facts=text)
        if self.progress.disable:
            left = (state.max_steps - state.global_step) * (now - then[0]) / args.logging_steps
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
    """Ctrl-C ends the current step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.interrupted = False
        self.previous: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("Ctrl-C: saving after this step (once more to stop at once) ...")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
            self.previous = None
