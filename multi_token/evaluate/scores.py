"""Scores of rows: loss and exact match from one forward pass, and the choice of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from multi_token.collate import Collator
from multi_token.data.formats import to_conversation
from multi_token.data.row_source import RowSource
from multi_token.data.rows import row_id_of
from multi_token.errors import MultiTokenError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.types import IGNORE_INDEX, Conversation, Sample


@dataclass(frozen=True)
class RowScores:
    """Scores of rows, in order, on the CPU."""

    loss: Tensor
    """float32 [rows]: mean cross entropy of the supervised tokens."""
    accuracy: Tensor
    """float32 [rows]: share of a row's answers in which every token is the most likely one."""


def evenly_spaced(num_rows: int, most: int) -> list[int]:
    """Return up to `most` indices, evenly over `num_rows` rows."""
    num = min(num_rows, most)
    return [i * num_rows // num for i in range(num)]


def with_processor(
    source: RowSource, model: MultiTokenForConditionalGeneration, indices: Sequence[int]
) -> list[tuple[Conversation, MultiTokenProcessor]]:
    """Return some rows of a source, with the model's processor. Raises RowError."""
    processor = replace(model.require_processor(), fetch=source.fetch)
    rows = ((i, source.rows[i]) for i in indices)
    return [
        (to_conversation(row, model.modalities, row_id=row_id_of(i, row, source.name)), processor)
        for i, row in rows
    ]


@torch.no_grad()
def score_rows(
    model: MultiTokenForConditionalGeneration, samples: Sequence[Sample], *, batch_size: int = 8
) -> RowScores:
    """Return loss and exact match of samples with labels.

    An answer is a run of supervised tokens: one assistant turn with its end-of-turn token. It is
    exact if each token is the most likely one after the true tokens before it. Greedy decoding
    writes an answer in exactly that case, so nothing has to be generated.

    Raises MultiTokenError for a sample without supervised tokens.
    """
    collate = Collator(model.modalities, model.require_processor().chat.filler_id)
    # Also called within a run, which trains on with the mode as it was.
    was_training = model.training
    model.eval()
    losses: list[Tensor] = []
    accuracies: list[Tensor] = []
    try:
        for start in range(0, len(samples), batch_size):
            chunk = samples[start : start + batch_size]
            batch: Any = send_to_device(dict(collate(chunk)), model.device)
            labels = batch["shift_labels"].flatten().index_select(0, batch["supervised"])
            scores = model(**batch, returns=partial(_score_tokens, labels)).per_token
            loss, accuracy = _by_row(scores, batch["shift_labels"], [s.id for s in chunk])
            losses.append(loss)
            accuracies.append(accuracy)
    finally:
        model.train(was_training)
    return RowScores(torch.cat(losses), torch.cat(accuracies))


def _score_tokens(labels: Tensor, logits: Tensor, of: slice) -> Tensor:
    """logits [tokens, vocabulary] of a slice of labels -> loss and 1 if wrong, [tokens, 2]."""
    # float32: rounded to bfloat16, losses of a row under two conditions come out equal.
    losses = nn.functional.cross_entropy(logits.float(), labels[of], reduction="none")
    return torch.stack([losses, (logits.argmax(-1) != labels[of]).float()], -1)


def _by_row(scores: Tensor, shift_labels: Tensor, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
    """scores [num_supervised, 2], shift_labels [rows, time] -> loss and accuracy, [rows]."""
    keep = shift_labels != IGNORE_INDEX
    rows, times = keep.nonzero(as_tuple=True)
    num_supervised = keep.sum(1)
    if bool((num_supervised == 0).any()):
        empty = ids[int((num_supervised == 0).nonzero()[0])]
        raise MultiTokenError(f"row {empty}: expected an answer to compare with, it has none")
    losses, is_wrong = scores.unbind(-1)
    loss = torch.zeros(len(ids), device=losses.device).index_add_(0, rows, losses) / num_supervised
    # A gap between supervised tokens separates two answers: the prompt of the second lies there.
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (rows[1:] != rows[:-1]) | (times[1:] != times[:-1] + 1)
    answer = begins.cumsum(0) - 1
    # Sums by index instead of a loop over rows: a host sync for all answers, not one for each.
    num_wrong = torch.zeros(int(begins.sum()), device=losses.device)
    num_wrong.index_add_(0, answer, is_wrong)
    row_of_answer = rows[begins]
    num_answers = torch.zeros_like(loss).index_add_(0, row_of_answer, torch.ones_like(num_wrong))
    num_exact = torch.zeros_like(loss).index_add_(0, row_of_answer, (num_wrong == 0).float())
    return loss.cpu(), (num_exact / num_answers).cpu()
