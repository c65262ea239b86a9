"""A teacher that reads: the model's answers to media drawn to its own answers to their texts.

Border: the second input of a batch and the loss; rows and texts are processor.py's, the step is the
trainer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.language_model.lora import adapter_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import DistillationSpec
from multi_token.types import IGNORE_INDEX, Sample

TEACHER = "teacher"
"""The key of a batch under which the conversations stand as texts."""


@dataclass(frozen=True)
class DistillationCollator:
    """A collator whose batches also hold the teacher's inputs, padded or packed as its own."""

    collator: Collator
    packed: bool = False

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Samples -> their Batch or PackedBatch; under `teacher` another one, of their texts.

        There `teacher_mask` bool [num_supervised] says which of what is learned, in the order of
        the
        batch, belongs to samples that have a text.
        """
        if self.packed:
            samples = self.collator.pack_order(samples)
        batch: dict[str, Any] = {**self._batch(self.collator, samples)}
        texts = [s.teacher for s in samples if s.teacher is not None]
        if texts:
            # the teacher's logits are matched by position, so its rows keep the order of `samples`
            plain = replace(self.collator, share=False)
            read: dict[str, Any] = {**self._batch(plain, texts)}
            del read["media"], read["labels"]
            each = [torch.full((_num_supervised(s),), s.teacher is not None) for s in samples]
            batch[TEACHER] = {"taught": torch.cat(each), **read}
        return batch

    def _batch(self, collator: Collator, samples: Sequence[Sample]) -> Mapping[str, Any]:
        return collator.pack(samples) if self.packed else collator(samples)


def _num_supervised(sample: Sample) -> int:
    """Tokens that are predicted and learned; the first of all is predicted by nothing."""
    return int((sample.labels[1:] != IGNORE_INDEX).sum())


class DistillationLoss:
    """Reads one batch at a time, and then is part of its loss."""

    def __init__(self, spec: DistillationSpec) -> None:
        self.spec = spec
        self.ids = torch.zeros(0, dtype=torch.long)
        """What is learned, [num_supervised]."""
        self.teacher_mask = torch.zeros(0, dtype=torch.bool)
        """Where of that the teacher answered too, [num_supervised]."""
        self.logits: Tensor | None = None
        """Its answers, [num_taught, vocabulary]."""

    def read(
        self, model: MultiTokenForConditionalGeneration, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Let the teacher answer a batch; returns the batch without the teacher's inputs."""
        shift_labels = inputs["shift_labels"]
        keep = shift_labels != IGNORE_INDEX
        self.ids = shift_labels[keep]
        self.teacher_mask, self.logits = torch.zeros_like(self.ids, dtype=torch.bool), None
        texts = inputs.get(TEACHER)
        if texts is not None:
            self.teacher_mask = texts["taught"].to(keep.device)
            self.logits = teacher_logits(model, texts)
        return {key: value for key, value in inputs.items() if key != TEACHER}

    def loss(
        self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Of the batch that was read last, from the model's logits [num_supervised, vocabulary].

        `weight` of the divergence and the rest of cross entropy where the teacher answered, cross
        entropy elsewhere; summed, and divided by `num_items_in_batch`.
        """
        logits = outputs.logits.float()
        entropy = nn.functional.cross_entropy(logits, self.ids, reduction="none")
        total = entropy[~self.teacher_mask].sum()
        if self.logits is not None:
            drawn = kl_divergence(self.logits, logits[self.teacher_mask], self.spec.temperature)
            weight = self.spec.weight
            total = total + ((1 - weight) * entropy[self.teacher_mask] + weight * drawn).sum()
        return total / (max(1, len(self.ids)) if num_items_in_batch is None else num_items_in_batch)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits [positions, vocabulary] -> [positions].

    Times the squared temperature, so that gradients keep their size (Hinton et al.,
    arXiv:1503.02531); as a loss for senses: Ultravox (fixie.ai).
    """
    theirs = (teacher.float() / temperature).log_softmax(-1)
    ours = (student.float() / temperature).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1) * temperature**2


@torch.no_grad()
def teacher_logits(model: MultiTokenForConditionalGeneration, texts: Mapping[str, Any]) -> Tensor:
    """Logits [num_supervised, vocabulary] of the language model as it came, at the answers.

    `texts`: what a `DistillationCollator` made of them: a Batch or a PackedBatch without media.
    """
    with _adapter_disabled(model.language_model):
        # through the model's own forward, which puts together what is cut into pieces
        return model(**{key: value for key, value in texts.items() if key != "taught"}).logits


@contextmanager
def _adapter_disabled(language_model: Any) -> Iterator[None]:
    """In eval mode and without its adapter, if it has one."""
    was_training = language_model.training
    language_model.eval()
    try:
        if not hasattr(language_model, "peft_config"):
            yield
            return
        learning = [(p, p.requires_grad) for p in adapter_parameters(language_model)]
        try:
            with language_model.disable_adapter():
                yield
        finally:
            # PEFT freezes an adapter that it turns off, and lets it learn when it is on again
            for parameter, learns in learning:
                parameter.requires_grad_(learns)
    finally:
        language_model.train(was_training)
