"""Blind test: does a model use its media? The same rows with original, shuffled, ablated media.

A model that was trained on the words of the questions alone scores as well without looking (Goyal
et al., arXiv:1612.00837). Shuffled media are real items of other rows, so that only their content
is wrong; ablated media are mean features, without any content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from multi_token.errors import MediaError, MultiTokenError, RowError
from multi_token.evaluate.scores import RowScores, score_rows
from multi_token.modalities.facts import joined, with_texts
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.projectors.base import Projector, mask_without_newlines
from multi_token.types import Conversation, Features, Sample

EvaluationRow = tuple[Conversation, MultiTokenProcessor]
"""A conversation, and the processor that opens its media."""


@dataclass(frozen=True)
class Condition:
    """Scores of the rows under one condition of their media."""

    media: str
    """`original`, `shuffled`, `ablated`, or `image shuffled` for one modality of several."""
    loss: float
    """Mean over the rows of the mean cross entropy of their supervised tokens."""
    accuracy: float
    """Share of answers that match exactly."""
    loss_increase: float = 0.0
    """Loss minus the loss with original media, mean over the rows."""
    standard_error: float = 0.0
    """Standard error of `loss_increase` over the rows."""

    @property
    def differs(self) -> bool:
        """True if the loss is higher than with original media, by over 2 standard errors."""
        return self.loss_increase > 2 * self.standard_error


@dataclass(frozen=True)
class BlindReport:
    """Result of `blind`."""

    num_rows: int
    num_left_out: int
    """Rows without media, or with items for which no other row has different ones."""
    conditions: list[Condition]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __getitem__(self, media: str) -> Condition:
        return next(c for c in self.conditions if c.media == media)


def blind(
    model: MultiTokenForConditionalGeneration,
    rows: Sequence[EvaluationRow],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> BlindReport:
    """Compare loss and exact match of the same rows with original, shuffled and ablated media.

    Shuffled: each row gets another row's items of the same modality and number, never equal ones.
    Ablated: features are replaced by the mean that the projector was calibrated to. Of several
    modalities, each is also shuffled alone.

    Args:
        model: A model with its processor.
        rows: Conversations with answers, each with the processor of its source.
        batch_size: Rows per forward pass.
        seed: Seed of the shuffle.

    Returns:
        A report with a warning for each condition whose loss is not higher by more than two
        standard errors (of the paired differences over the rows).

    Raises:
        MultiTokenError: If fewer than two rows can be shuffled.
        RowError: For a bad row.
    """
    modality_names = sorted({item.modality for row, _ in rows for item in row.media})
    shuffle = MediaShuffle(rows, seed=seed)
    chosen = [i for i in range(len(rows)) if rows[i][0].media and shuffle.donors(i, modality_names)]
    if len(chosen) < 2:
        raise MultiTokenError(
            f"expected at least 2 rows whose media can be exchanged for others, got {len(chosen)} "
            f"of {len(rows)}; give rows with media that are not all the same"
        )
    score = partial(score_rows, model, batch_size=batch_size)
    original = [rows[i][1](rows[i][0]) for i in chosen]
    base = score(original)
    conditions = [Condition("original", _mean(base.loss), _mean(base.accuracy))]
    shuffled = score([shuffle.sample(i, modality_names) for i in chosen])
    conditions.append(_compare("shuffled", shuffled, base))
    # The same samples as original ones: only the projectors' input differs.
    with ablated(model, modality_names):
        conditions.append(_compare("ablated", score(original), base))
    # Judged by shuffled media: they are ordinary items, while a mean is an input that the projector
    # was never trained on, whose loss may be higher for that reason alone.
    warnings = _warnings(conditions[1], "its media")
    for name in modality_names if len(modality_names) > 1 else ():
        some = [k for k, i in enumerate(chosen) if shuffle.donors(i, [name])]
        if len(some) < 2:
            continue
        alone = score([shuffle.sample(chosen[k], [name]) for k in some])
        # Other rows have no replacement in this modality, so the base leaves them out as well.
        same_rows = RowScores(base.loss[some], base.accuracy[some])
        conditions.append(_compare(f"{name} shuffled", alone, same_rows))
        warnings += _warnings(conditions[-1], repr(name))
    return BlindReport(len(chosen), len(rows) - len(chosen), conditions, warnings)


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def _compare(media: str, scores: RowScores, base: RowScores) -> Condition:
    # Paired differences: rows differ in loss far more than conditions do.
    differences = (scores.loss - base.loss).double()
    return Condition(
        media,
        _mean(scores.loss),
        _mean(scores.accuracy),
        _mean(differences),
        float(differences.std() / len(differences) ** 0.5),
    )


def _warnings(condition: Condition, what: str) -> list[str]:
    if condition.differs:
        return []
    return [
        f"the model scores as well without {what}: shuffled, the loss changes by "
        f"{condition.loss_increase:+.3f} ± {2 * condition.standard_error:.3f} (two standard "
        "errors), so nothing shows that it is used; train longer, look at the rows with "
        "`multi-token data show`, or use questions that cannot be answered without it"
    ]


class MediaShuffle:
    """Replaces the media of each row by other rows' items; equal content never counts as other."""

    def __init__(self, rows: Sequence[EvaluationRow], *, seed: int) -> None:
        self.rows = rows
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(rows), generator=generator).tolist()
        self.position = {index: position for position, index in enumerate(self.order)}
        self._digests: dict[tuple[int, int], bytes] = {}

    def donors(self, index: int, modality_names: Collection[str]) -> dict[int, tuple[int, int]]:
        """Return (row, item) for each item of the row to replace; {} if one has no replacement.

        All items come from one row with as many items of these modalities, if there is one; else
        from different rows.
        """
        mine = self._items(index, modality_names)
        singles: dict[int, tuple[int, int]] = {}
        num_rows, position = len(self.order), self.position[index]
        for step in range(1, num_rows) if mine else ():
            other = self.order[(position + step) % num_rows]
            theirs = self._items(other, modality_names)
            # Sorted by modality, rows with equal numbers of each have them at equal indices.
            if [name for name, _ in mine] == [name for name, _ in theirs]:
                pairs = [(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True)]
                if all(self._digest(index, a) != self._digest(other, b) for a, b in pairs):
                    return {a: (other, b) for a, b in pairs}
            for name, a in mine:
                for their_name, b in theirs if a not in singles else ():
                    if name == their_name and self._digest(index, a) != self._digest(other, b):
                        singles[a] = (other, b)
                        break
        return singles if len(singles) == len(mine) else {}

    def sample(self, index: int, modality_names: Collection[str]) -> Sample:
        """Return the row with its items of these modalities replaced."""
        conversation, processor = self.rows[index]
        taken = self.donors(index, modality_names)
        media = []
        for i, item in enumerate(conversation.media):
            if i in taken:
                row, donated = taken[i]
                donor, donor_processor = self.rows[row]
                media.append(donor_processor.prepare(donor.media[donated], row_id=donor.id))
            else:
                media.append(processor.prepare(item, row_id=conversation.id))
        # Tokenized again: another row's item may have another number of embeddings.
        runs = processor.runs(conversation, media)
        sample = processor.chat.tokenize(*with_texts(conversation, runs))
        sample.media, sample.media_spans = media, joined(sample.media_spans, runs)
        return sample

    def _items(self, index: int, modality_names: Collection[str]) -> list[tuple[str, int]]:
        """Return (modality, index) of a row's items of these modalities, sorted."""
        media = enumerate(self.rows[index][0].media)
        return sorted((item.modality, i) for i, item in media if item.modality in modality_names)

    def _digest(self, index: int, item_index: int) -> bytes:
        # By content, not by path: data sets hold copies of one file under several names.
        if (index, item_index) not in self._digests:
            conversation, processor = self.rows[index]
            item = conversation.media[item_index]
            try:
                content = processor.modalities[item.modality].content(item.source, processor.fetch)
            except MediaError as error:
                raise RowError(
                    f"{item.modality}: {error}", kind=error.kind, row_id=conversation.id
                ) from error
            self._digests[index, item_index] = hashlib.sha256(content).digest()
        return self._digests[index, item_index]


@contextmanager
def ablated(
    model: MultiTokenForConditionalGeneration, modality_names: Collection[str]
) -> Iterator[None]:
    """Within, the projectors of these modalities get mean features instead of an item's own.

    The mean is the one that the projector was calibrated to, which standardizes to zero. A
    projector without it (`standardize: false`) gets the mean of the batch.
    """

    def replace(projector: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = args
        if isinstance(projector, Projector) and projector.spec.standardize:
            mean = projector.feature_mean.to(features.values.dtype)
        else:
            # Without line breaks, which are no content of an item.
            mask = mask_without_newlines(features)
            values = features.values
            mean = values.flatten(0, 1).mean(0) if mask is None else values[mask].mean(0)
        values = mean.expand_as(features.values)
        return (Features(values, features.mask, features.newlines), *rest)

    handles = [model.projectors[name].register_forward_pre_hook(replace) for name in modality_names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
