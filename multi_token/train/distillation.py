"""Distillation: KL divergence from the model's own answers to texts in place of its media.

The teacher is the frozen language model without adapter; it gets the same conversation with each
media item replaced by its text (`media_texts` of a row). Both see the same answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.language_model.lora import adapter_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.train import DistillationSpec
from multi_token.train.objective import Objective
from multi_token.types import IGNORE_INDEX, Sample

TEACHER = "teacher"
"""Key of a batch that holds the teacher's inputs."""
_TAUGHT, _UNTAUGHT = "taught", "untaught"
"""Keys of the teacher's inputs: supervised tokens that the teacher predicted, and all others."""


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
            each = [torch.full((_num_supervised(s),), s.teacher is not None) for s in samples]
            taught = torch.cat(each)
            # numbers and not the mask, which would make the host wait for the device
            batch[TEACHER] = {
                _TAUGHT: taught.nonzero().flatten(),
                _UNTAUGHT: (~taught).nonzero().flatten(),
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
        self.logits: Tensor | None = None
        """The teacher's logits, [num_taught, vocabulary]."""

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
            self.logits = teacher_logits(model, texts)
        return {key: value for key, value in inputs.items() if key != TEACHER}

    def loss(
        self, outputs: Any, labels: Any = None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss [] of the batch of `before_forward`, from logits [num_supervised, vocabulary].

        `weight` of the divergence and the rest of cross entropy where there is a teacher, cross
        entropy elsewhere; summed, and divided by `num_items_in_batch`.
        """
        logits = outputs.logits.float()
        entropy = nn.functional.cross_entropy(logits, self.ids, reduction="none")
        if self.logits is None:
            total = entropy.sum()
        else:
            total = entropy.index_select(0, self.untaught).sum()
            found = logits.index_select(0, self.taught)
            divergence = kl_divergence(self.logits, found, self.spec.temperature)
            weight, taught = self.spec.weight, entropy.index_select(0, self.taught)
            total = total + ((1 - weight) * taught + weight * divergence).sum()
        return total / (max(1, len(self.ids)) if num_items_in_batch is None else num_items_in_batch)


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
def teacher_logits(model: MultiTokenForConditionalGeneration, texts: Mapping[str, Any]) -> Tensor:
    """Logits [num_supervised, vocabulary] of the language model without adapter, at the answers.

    `texts`: the `teacher` entry of a batch of `DistillationCollator`.
    """
    with _adapter_disabled(model.language_model):
        # through the model's own forward: FSDP gathers its shards only there
        inputs = {key: v for key, v in texts.items() if key not in (_TAUGHT, _UNTAUGHT)}
        return model(**inputs).logits


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
