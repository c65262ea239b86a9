"""Loss and exact answers of rows, from one pass over what is known of them.

Border: samples in, a number a row out; what they are compared with is blind.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.errors import MultiTokenError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.types import IGNORE_INDEX, Sample


@dataclass(frozen=True)
class RowScores:
    """Of each row, in order, on the CPU."""

    loss: Tensor
    """float32 [rows]: mean cross entropy of its learned tokens."""
    accuracy: Tensor
    """float32 [rows]: the share of its answers whose every token is the most likely one."""


@torch.no_grad()
def score_rows(
    model: MultiTokenForConditionalGeneration, samples: Sequence[Sample], *, batch_size: int = 8
) -> RowScores:
    """Loss and exact answers of samples with labels.

    An answer is a run of learned tokens: what the assistant says in one turn, with the token that
    ends it. It counts as right if each of its tokens is the most likely one behind the true tokens
    before it. That is exactly when greedy decoding, given the turns before as they are, would
    write this answer and stop, so nothing has to be generated. Raises MultiTokenError for a sample
    with nothing learned.
    """
    collate = Collator(model.modalities, model.require_processor().chat.filler_id)
    training = model.training
    model.eval()
    losses: list[Tensor] = []
    accuracies: list[Tensor] = []
    try:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            batch = send_to_device(dict(collate(chunk)), model.device)
            logits = model(**batch).logits.float()
            loss, accuracy = _by_row(logits, batch["shift_labels"], [s.id for s in chunk])
            losses.append(loss)
            accuracies.append(accuracy)
    finally:
        model.train(training)
    return RowScores(torch.cat(losses), torch.cat(accuracies))


def _by_row(logits: Tensor, shift_labels: Tensor, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """logits [num_supervised, vocabulary], shift_labels [rows, time] -> two of [rows]."""
    keep = shift_labels != IGNORE_INDEX
    rows, times = keep.nonzero(as_tuple=True)
    labels = shift_labels[keep]
    num_learned = keep.sum(1)
    if bool((num_learned == 0).any()):
        empty = ids[int((num_learned == 0).nonzero()[0])]
        raise MultiTokenError(f"row {empty}: expected an answer to compare with, it has none")
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = torch.zeros(len(ids), device=logits.device).index_add_(0, rows, losses) / num_learned
    # a new answer begins where learned tokens do not follow each other
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (rows[1:] != rows[:-1]) | (times[1:] != times[:-1] + 1)
    answer = begins.cumsum(0) - 1
    num_wrong = torch.zeros(int(begins.sum()), device=logits.device)
    num_wrong.index_add_(0, answer, (logits.argmax(-1) != labels).float())
    of_row = rows[begins]
    num_answers = torch.zeros_like(loss).index_add_(0, of_row, torch.ones_like(num_wrong))
    num_right = torch.zeros_like(loss).index_add_(0, of_row, (num_wrong == 0).float())
    return loss.cpu(), (num_right / num_answers).cpu()
