"""Distillation: KL divergence from the model's own answers to texts in place of its media.

The teacher is the frozen language model without adapter; it gets the same conversation with each
media item replaced by its text (`media_texts` of a row). Both see the same answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.lora import adapter_parameters
from multi_token.language_model.loss import SupervisedLogits
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import DistillationSpec
from multi_token.train.objective import Objective
from multi_token.types import IGNORE_INDEX, Sample

TEACHER = "teacher"
"""Key of a batch that holds the teacher's inputs."""
_TAUGHT, _UNTAUGHT = "taught", "untaught"
"""Keys of the teacher's inputs: supervised tokens that the teacher predicted, and all others."""
_NUM_TAUGHT = "num_taught"
"""Key of the teacher's inputs: supervised tokens of each sample, and of these the taught ones."""


@dataclass(frozen=True)
class DistillationCollator:
    """Collator whose batches also hold the teacher's inputs, padded or packed as its own."""

    collator: Collator
    packed: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Samples -> their Batch or PackedBatch; under `teacher` another one, of their texts.

        There `taught` int64 [num_taught] numbers the supervised tokens, in the order of the batch,
        that belong to samples with a text, and `untaught` the others.
        """
        if self.packed:
            samples = self.collator.pack_order(samples)
        batch: dict[str, Any] = {**self._batch(self.collator, samples)}
        texts = [s.teacher for s in samples if s.teacher is not None]
        if texts:
            # the teacher's logits are matched by position, so its rows keep the order of `samples`
            plain = replace(self.collator, share=False)
            inputs: dict[str, Any] = {**self._batch(plain, texts)}
            # the rows are text alone, and with labels forward would compute a loss that is not used
            del inputs["media"], inputs["labels"]
            nums = [_num_supervised(sample) for sample in samples]
            is_taught = [sample.teacher is not None for sample in samples]
            taught = torch.tensor(is_taught).repeat_interleave(torch.tensor(nums))
            # numbers and not the mask, which would make the host wait for the device
            batch[TEACHER] = {
                _TAUGHT: taught.nonzero().flatten(),
                _UNTAUGHT: (~taught).nonzero().flatten(),
                _NUM_TAUGHT: [(n, n * of) for n, of in zip(nums, is_taught, strict=True)],
                **inputs,
            }
        return batch

    def _batch(self, collator: Collator, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return collator.pack(samples) if self.packed else collator(samples)


def _num_supervised(sample: Sample) -> int:
    """Supervised tokens that are predicted; no position predicts the first token."""
    return int((sample.labels[1:] != IGNORE_INDEX).sum())


class DistillationLoss(Objective):
    """Loss of one batch at a time: KL to the teacher where there is one, cross entropy elsewhere.

    The teacher runs in `before_forward`, whose results `loss` uses.
    """

    def __init__(self, spec: DistillationSpec) -> None:
        self.spec = spec
        self.ids = torch.zeros(0, dtype=torch.long)
        """Ids of the supervised tokens, [num_supervised]."""
        self.taught = self.untaught = torch.zeros(0, dtype=torch.long)
        """Numbers of the supervised tokens that the teacher predicted too, and of the others."""
        self.num_taught: list[tuple[int, int]] = []
        """Supervised tokens of each sample, and of these the taught ones."""
        self.logits: Callable[[slice], Tensor] | None = None
        """The teacher's logits [rows, vocabulary] of a slice of `taught`."""

    def collator(self, collator: Collator, *, packed: bool) -> DistillationCollator:
        return DistillationCollator(collator, packed=packed)

    def before_forward(
        self, model: MultiTokenForConditionalGeneration, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run the teacher on a batch; return the batch without the teacher's inputs."""
        self.ids = inputs["shift_labels"].flatten().index_select(0, inputs["supervised"])
        self.logits = None
        texts = inputs.get(TEACHER)
        if texts is not None:
            self.taught, self.untaught = texts[_TAUGHT], texts[_UNTAUGHT]
            self.num_taught = texts[_NUM_TAUGHT]
            self.logits = teacher_logits(model, texts)
        own = {key: value for key, value in inputs.items() if key != TEACHER}
        return {**own, "returns": self._token_losses}

    def loss(
        self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss [] of the batch of `before_forward`, from `_token_losses`.

        `weight` of the divergence and the rest of cross entropy where there is a teacher, cross
        entropy elsewhere; summed, and divided by `num_items_in_batch`.
        """
        losses = outputs.per_token
        if self.logits is None:
            total = losses.sum()
        else:
            total = losses.index_select(0, self.untaught).sum()
            total = total + losses.index_select(0, self.taught).sum()
        return total / (max(1, len(self.ids)) if num_items_in_batch is None else num_items_in_batch)

    def _token_losses(self, logits: Tensor, rows: slice) -> Tensor:
        """Losses [rows] of student's logits [rows, vocabulary], at a slice of all tokens."""
        logits = logits.float()
        entropy = nn.functional.cross_entropy(logits, self.ids[rows], reduction="none")
        first, last = self._num_taught_before(rows.start), self._num_taught_before(rows.stop)
        if self.logits is None or first == last:
            return entropy
        taught = self.taught[first:last] - rows.start
        # After the student's: autocast keeps a cast of the head's weights, and one that is made
        # without gradients would cut the student off from them.
        teacher = self.logits(slice(first, last))
        student = logits.index_select(0, taught)
        divergence = kl_divergence(teacher, student, self.spec.temperature)
        weight = self.spec.weight
        mixed = (1 - weight) * entropy.index_select(0, taught) + weight * divergence
        return entropy.index_copy(0, taught, mixed)

    def _num_taught_before(self, token: int) -> int:
        """Taught tokens among the first `token` supervised ones, counted on the host."""
        found = 0
        for num, taught in self.num_taught:
            found += min(token, taught)
            token = max(token - num, 0)
        return found


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits [positions, vocabulary] -> [positions].

    Times the squared temperature, so that gradients keep their size (Hinton et al.,
    arXiv:1503.02531). As a loss for modalities: Ultravox (fixie.ai).
    """
    # in float32: 16 bits would round small probabilities to zero
    theirs = (teacher.float() / temperature).log_softmax(-1)
    ours = (student.float() / temperature).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1) * temperature**2


@torch.no_grad()
def teacher_logits(
    model: MultiTokenForConditionalGeneration, texts: Mapping[str, Any]
) -> Callable[[slice], Tensor]:
    """Run the language model without adapter on texts; return its logits at slices of the answers.

    `texts`: the `teacher` entry of a batch of `DistillationCollator`.
    """
    child = model.language_model
    with _adapter_disabled(child):
        # through the model's own forward: FSDP gathers its shards only there
        own = (_TAUGHT, _UNTAUGHT, _NUM_TAUGHT)
        inputs = {key: value for key, value in texts.items() if key not in own}
        logits: SupervisedLogits = model(**inputs, returns="logits").logits
    head = base_language_model(child).get_output_embeddings()
    # a walk over all layers, for each chunk
    has_adapter = head is not None and bool(adapter_parameters(head))

    @torch.no_grad()
    def rows_of(rows: slice) -> Tensor:
        with _adapter_disabled(child) if has_adapter else nullcontext():
            return logits.rows(rows)

    return rows_of


@contextmanager
def _adapter_disabled(language_model: Any) -> Iterator[None]:
    """Eval mode, and no adapter if the language model has one."""
    was_training, adapted = language_model.training, hasattr(language_model, "peft_config")
    trainable = [(p, p.requires_grad) for p in adapter_parameters(language_model)]
    language_model.eval()
    try:
        with language_model.disable_adapter() if adapted else nullcontext():
            yield
    finally:
        # PEFT freezes an adapter that it disables, and unfreezes all of it when it enables it
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        language_model.train(was_training)
