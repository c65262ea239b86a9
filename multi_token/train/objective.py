"""Objective of a stage: the interface of its loss, and cross entropy.

The trainer calls an objective in this order for each batch:

    collator(...)         samples -> batch, with tensors of the objective's own     data worker
    countable(batches)    batches whose labels are counted: the loss's divisor
    before_forward(...)   batch -> inputs of the model; own tensors are kept aside
    loss(...)             the model's outputs -> loss []
    metrics()             means since the last log

`train.distillation` and `train.dpo` are the other two objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from multi_token.collate import Collator

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all devices."""


class Objective:
    """Interface of a stage's loss; every default is that of cross entropy."""

    loss: Callable[..., Tensor] | None = None
    """`(outputs, labels, num_items_in_batch)` -> loss [], the `compute_loss_func` of transformers'
    Trainer; None where the model's own forward returns the loss."""

    def collator(self, collator: Collator, *, packed: bool) -> Any:
        """Return the callable that turns samples into a batch."""
        # a bound method, not a lambda: data workers pickle the collator
        return collator.pack if packed else collator

    def countable(self, batches: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return batches whose labels transformers counts; their number divides the loss."""
        return list(batches)

    def before_forward(
        self, model: MultiTokenForConditionalGeneration, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a batch as the model takes it, without the objective's own tensors.

        Its `returns` tells the model what to compute: the loss, or values of each token.
        """
        return {**inputs, "returns": "loss"}

    @contextmanager
    def evaluation_mode(self, gather: Reduce) -> Iterator[None]:
        """Count what is evaluated apart from training.

        `gather`: tensor [rows, ...] of this device -> of all devices, each row once.
        """
        # an evaluation comes between two logs of training, whose sums it must not enter
        yield

    def metrics(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Return means since the last call, to be logged; `reduce` sums over all devices."""
        return {}


class CrossEntropy(Objective):
    """Cross entropy at supervised tokens, which the model's own forward computes."""
