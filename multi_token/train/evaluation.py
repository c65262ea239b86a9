"""Evaluation during training: sample answers to held-out rows, the blind test, and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multi_token.data.sources import TrainingSource, build_dataset
from multi_token.distributed import is_main_process, num_processes
from multi_token.errors import MultiTokenError
from multi_token.evaluate.blind import BlindReport, EvaluationRow, blind
from multi_token.evaluate.scores import evenly_spaced
from multi_token.generate import decode, generate_ids
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import TrainSpec
from multi_token.train.fsdp import is_sharded
from multi_token.train.run_report import RunReport
from multi_token.train.training_args import mixed_precision
from multi_token.types import Conversation, Text

if TYPE_CHECKING:
    from multi_token.train.trainer import MultiTokenTrainer

_BLIND_DURING, _BLIND_AFTER = 64, 256
"""Up to N rows in the blind test of an evaluation, and of the end."""
_LONGEST_ANSWER = 128


class EvaluationCallback(TrainerCallback):
    """Callback of a run, to which each stage attaches its trainer.

    Without held-out rows it only writes the report.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        held_out: Sequence[TrainingSource],
        spec: TrainSpec,
        report: RunReport,
        console: Console,
    ) -> None:
        self.model = model
        self.spec = spec
        self.report = report
        self.console = console
        self.held_out = held_out
        self.dataset = build_dataset(held_out, model.modalities) if held_out else None
        self.num_rows = sum(source.num_rows for source in held_out)
        self.blind = spec.blind and self.num_rows > 0
        self.trainer: MultiTokenTrainer | None = None
        self.args: TrainingArguments | None = None
        self.runs_generation = False

    def attach(self, trainer: MultiTokenTrainer, stage: str, trainable: Sequence[str]) -> None:
        """Add the callback to a stage's trainer; `trainable`: lines that name its groups."""
        self.trainer, self.model = trainer, trainer.multi_token_model
        self.args = trainer.args
        self.report.start_stage(stage, Path(str(trainer.args.output_dir)), trainable)
        trainer.add_callback(self)
        sharded = trainer.is_deepspeed_enabled or (
            num_processes() > 1 and (self.spec.fsdp is not None or trainer.is_fsdp_enabled)
        )
        if self.num_rows and sharded and (self.blind or self.spec.num_samples):
            self.console.print(
                "the language model is sharded, so answers to held-out rows and the blind test "
                "are left out during training (run `multi-token evaluate blind` afterwards)"
            )
        # Answers come from the main process alone. With a sharded language model every forward is a
        # collective, in which the other processes would be missing.
        self.runs_generation = not sharded and is_main_process()

    def some_rows(self, most: int) -> list[EvaluationRow]:
        """Return up to `most` held-out rows, evenly spread; the others are not read."""
        found = []
        for number in evenly_spaced(self.num_rows, most):
            for source in self.held_out:
                if number < source.num_rows:
                    found.append(source.conversation(number))
                    break
                number -= source.num_rows
        return found

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate after the last step, whatever `eval_steps` is."""
        if self.dataset is not None and args.eval_strategy != "no":
            # otherwise the result of a stage would be the one state that is never evaluated
            control.should_evaluate |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            wait = None if self.trainer is None else self.trainer.step_metrics.data_wait
            self.report.log(state.log_history, state.max_steps, data_wait=wait)

    def on_evaluate(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if not self.runs_generation or self.trainer is None:
            return
        if self.spec.num_samples:
            rows = self.some_rows(self.spec.num_samples)
            with mixed_precision(self.trainer.args):
                shown = sample_answers(self.model, rows)
            self.report.add_samples(state.global_step, shown)
            for one in shown:
                self.console.print(
                    f"  {one['question']!r} -> {one['answer']!r} (truth: {one['truth']!r})",
                    highlight=False,
                    markup=False,
                )
        found = self._blind(_BLIND_DURING)
        if found is not None:
            # through the trainer, so that loggers and the curves of the report get them too
            self.trainer.log(
                {
                    "eval_exact_answers": found["original"].accuracy,
                    "eval_shuffled_loss_increase": found["shuffled"].loss_increase,
                    "eval_ablated_loss_increase": found["ablated"].loss_increase,
                }
            )

    def save_report(self) -> None:
        """Write the last state of the report, however training ended."""
        if is_main_process():
            self.report.write(at_once=True)

    def detach(self, model: MultiTokenForConditionalGeneration) -> None:
        """Let go of a stage's trainer, with its shards; `model` takes the place of its model."""
        self.trainer, self.model = None, model

    def finish(self, model: MultiTokenForConditionalGeneration) -> None:
        """Run the blind test on more rows after the last stage, and print and report it."""
        # the forward of a sharded model is a collective: all processes score the same rows
        if self.args is None or not (is_main_process() or is_sharded(self.spec)):
            return
        # a stage with FSDP leaves shards in the model it was attached with; this one was loaded
        # since
        self.model = model
        found = self._blind(_BLIND_AFTER)
        if not is_main_process():
            return
        if found is not None:
            self.report.blind(found.to_json())
            self.console.print(*blind_lines(found), sep="\n", highlight=False, soft_wrap=True)
        self.report.write(at_once=True)
        self.report.raise_if_unwritten()

    def _blind(self, num_rows: int) -> BlindReport | None:
        if not self.blind or self.args is None:
            return None
        batch_size = self.args.per_device_eval_batch_size
        try:
            rows = self.some_rows(num_rows)
            with mixed_precision(self.args):
                return blind(self.model, rows, batch_size=batch_size)
        except MultiTokenError as error:
            # rows that the test cannot use (all media alike, say) must not end a training run
            self.blind = False
            self.console.print(f"no blind test: {error}", highlight=False, markup=False)
            return None


def blind_lines(found: BlindReport) -> list[str]:
    """Return the blind test as text, one line per condition of the media."""
    lines = [f"blind test, {found.num_rows} held-out rows:"]
    for condition in found.conditions:
        change = ""
        if condition is not found.conditions[0]:
            change = f" ({condition.loss_increase:+.3f} ± {2 * condition.standard_error:.3f})"
        lines.append(
            f"  media {condition.media}: loss {condition.loss:.3f}{change}, "
            f"{condition.accuracy:.0%} of answers exact"
        )
    return [*lines, *(f"warning: {warning}" for warning in found.warnings)]


def sample_answers(
    model: MultiTokenForConditionalGeneration, rows: Sequence[EvaluationRow]
) -> list[dict[str, str]]:
    """Return the last question of each row, the model's greedy answer, and the true answer."""
    training = model.training
    model.eval()
    try:
        prompts = []
        for c, processor in rows:
            last = max(i for i, m in enumerate(c.messages) if m.role == "assistant")
            prompts.append(processor(replace(c, messages=c.messages[:last]), prompt_only=True))
        truths = [_text(c, "assistant") for c, _ in rows]
        processor = model.require_processor()
        longest = max(len(processor.tokenizer(truth).input_ids) for truth in truths)
        # 8 tokens over the longest true answer: enough to see an answer that does not end
        new_ids = generate_ids(model, prompts, max_new_tokens=min(longest + 8, _LONGEST_ANSWER))
        answers = [text for ids in new_ids for text in decode(processor, ids[None])]
    finally:
        model.train(training)
    return [
        {"id": c.id, "question": _text(c, "user"), "answer": answer.strip(), "truth": truth}
        for (c, _), answer, truth in zip(rows, answers, truths, strict=True)
    ]


def _text(conversation: Conversation, role: str) -> str:
    """Return the last message of a role, with `<name>` in place of each media item."""
    message = [m for m in conversation.messages if m.role == role][-1:]
    parts = [
        part.text if isinstance(part, Text) else f"<{part.modality}>"
        for one in message
        for part in one.parts
    ]
    return "".join(parts).strip()
