"""Does a model use its senses? The same rows with their media as they are, shuffled and blanked.

Border: rows and a model in, a report out; terminals are cli/evaluate.py's.

A model that learned from the words of the questions alone answers as well without looking (Goyal et
al., arXiv:1612.00837). Shuffled items are real items of other rows, so that nothing but their
content is wrong; blanked ones carry no content at all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from multi_token.errors import MultiTokenError
from multi_token.evaluate.scores import RowScores, score_rows
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.projectors.base import Projector, mask_without_newlines
from multi_token.types import Conversation, Features, Media, Sample

EvaluationRow = tuple[Conversation, MultiTokenProcessor]
"""A conversation, and what opens its media."""


@dataclass(frozen=True)
class Condition:
    """How the rows went in one of the ways in which their media were shown."""

    media: str
    """`as they are`, `shuffled`, `blanked`, or `image shuffled` for one sense of several."""
    loss: float
    """Mean over the rows of the mean cross entropy of their learned tokens."""
    accuracy: float
    """Share of answers that are exactly right."""
    loss_increase: float = 0.0
    """Loss here minus loss as they are, mean over the rows."""
    standard_error: float = 0.0
    """Of that mean, over the rows."""

    @property
    def differs(self) -> bool:
        """Whether the loss is higher than with the media as they are, by over 2 standard errors."""
        return self.loss_increase > 2 * self.standard_error


@dataclass(frozen=True)
class BlindReport:
    """What `blind` found."""

    num_rows: int
    num_left_out: int
    """Rows without media, or for whose items no row has others."""
    conditions: list[Condition]
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
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
    """Loss and exact answers with media as they are, shuffled and blanked, on the same rows.

    Shuffled: each row shows another row's items of the same sense and count, never equal ones.
    Blanked: encoder features are replaced by their mean, as the projector was calibrated to it.
    With several senses each is also shuffled alone. A warning says where shuffling does not raise
    the loss by more than two standard errors (of the paired differences over the rows).

    Raises MultiTokenError if fewer than two rows can be shuffled, RowError for a bad row.
    """
    modality_names = _modality_names(rows)
    exchanged = MediaShuffle(rows, seed=seed)
    chosen = [
        i for i in range(len(rows)) if rows[i][0].media and exchanged.donors(i, modality_names)
    ]
    if len(chosen) < 2:
        raise MultiTokenError(
            f"expected at least 2 rows whose media can be exchanged for others, got {len(chosen)} "
            f"of {len(rows)}; give rows with media that are not all the same"
        )

    def score(samples: list[Sample]) -> RowScores:
        return score_rows(model, samples, batch_size=batch_size)

    as_is = [rows[i][1](rows[i][0]) for i in chosen]
    base = score(as_is)
    conditions = [Condition("as they are", _mean(base.loss), _mean(base.accuracy))]
    shuffled = score([exchanged.sample(i, modality_names) for i in chosen])
    conditions.append(_compare("shuffled", shuffled, base))
    with ablated(model, modality_names):
        conditions.append(_compare("blanked", score(as_is), base))
    warnings = _warnings(conditions[1], "its media")
    for sense in modality_names if len(modality_names) > 1 else ():
        some = [k for k, i in enumerate(chosen) if exchanged.donors(i, [sense])]
        if len(some) < 2:
            continue
        of_sense = score([exchanged.sample(chosen[k], [sense]) for k in some])
        same_rows = RowScores(base.loss[some], base.accuracy[some])
        conditions.append(_compare(f"{sense} shuffled", of_sense, same_rows))
        warnings += _warnings(conditions[-1], repr(sense))
    return BlindReport(len(chosen), len(rows) - len(chosen), conditions, warnings)


def _modality_names(rows: Sequence[EvaluationRow]) -> list[str]:
    return sorted({item.modality for conversation, _ in rows for item in conversation.media})


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean())


def _compare(media: str, scores: RowScores, base: RowScores) -> Condition:
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
        f"the model answers as well without {what}: shuffled, the loss changes by "
        f"{condition.loss_increase:+.3f} ± {2 * condition.standard_error:.3f} (two standard "
        "errors), so nothing shows that it is used; train longer, look at the rows with "
        "`multi-token data show`, or ask what cannot be answered without it"
    ]


class MediaShuffle:
    """Other rows' items in each row, found by content."""

    def __init__(self, rows: Sequence[EvaluationRow], *, seed: int) -> None:
        self.rows = rows
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(rows), generator=generator).tolist()
        self.place = {index: place for place, index in enumerate(self.order)}
        self._digests: dict[int, list[bytes]] = {}
        self._donors: dict[tuple[int, tuple[str, ...]], dict[int, tuple[int, int]]] = {}

    def donors(self, index: int, modality_names: Collection[str]) -> dict[int, tuple[int, int]]:
        """Item of the row -> (row, item) that takes its place; {} if there is none.

        A row with as many items of these senses is taken whole; where there is none, items come
        from different rows.
        """
        key = (index, tuple(sorted(modality_names)))
        if key not in self._donors:
            self._donors[key] = self._find_donors(index, modality_names)
        return self._donors[key]

    def _find_donors(
        self, index: int, modality_names: Collection[str]
    ) -> dict[int, tuple[int, int]]:
        mine = self._items(index, modality_names)
        if not mine:
            return {}
        singles: dict[int, tuple[int, int]] = {}
        for other in self._shuffled_rows(index):
            theirs = self._items(other, modality_names)
            if Counter(name for name, _ in mine) == Counter(name for name, _ in theirs):
                pairs = dict(
                    zip(_positions_by_modality(mine), _positions_by_modality(theirs), strict=True)
                )
                if all(self._differ(index, a, other, b) for a, b in pairs.items()):
                    return {a: (other, b) for a, b in pairs.items()}
            for name, place in mine:
                if place in singles:
                    continue
                for their_name, their_place in theirs:
                    if name == their_name and self._differ(index, place, other, their_place):
                        singles[place] = (other, their_place)
                        break
        return singles if len(singles) == len(mine) else {}

    def sample(self, index: int, modality_names: Collection[str]) -> Sample:
        """The row with its items of these senses exchanged, read anew: they may be longer."""
        conversation, processor = self.rows[index]
        taken = self.donors(index, modality_names)
        media = [
            self._prepare(*taken[place]) if place in taken else processor.prepare(item)
            for place, item in enumerate(conversation.media)
        ]
        num_tokens = [
            processor.modalities[item.modality].num_tokens(prepared.num_features)
            for item, prepared in zip(conversation.media, media, strict=True)
        ]
        sample = processor.chat.tokenize(conversation, num_tokens)
        sample.media = media
        return sample

    def _prepare(self, index: int, place: int) -> Any:
        conversation, processor = self.rows[index]
        return processor.prepare(conversation.media[place], row_id=conversation.id)

    def _shuffled_rows(self, index: int) -> Iterator[int]:
        start = self.place[index]
        for step in range(1, len(self.order)):
            yield self.order[(start + step) % len(self.order)]

    def _items(self, index: int, modality_names: Collection[str]) -> list[tuple[str, int]]:
        media = self.rows[index][0].media
        return [
            (m.modality, place) for place, m in enumerate(media) if m.modality in modality_names
        ]

    def _differ(self, index: int, place: int, other: int, other_place: int) -> bool:
        return self._digest_of(index)[place] != self._digest_of(other)[other_place]

    def _digest_of(self, index: int) -> list[bytes]:
        if index not in self._digests:
            conversation, processor = self.rows[index]
            self._digests[index] = [_digest(item, processor) for item in conversation.media]
        return self._digests[index]


def _positions_by_modality(items: Sequence[tuple[str, int]]) -> list[int]:
    """Places of items, those of a sense together: the same order for equal counts."""
    return [place for _, place in sorted(items)]


def _digest(item: Media, processor: MultiTokenProcessor) -> bytes:
    content = processor.modalities[item.modality].content(item.source, processor.fetch)
    return hashlib.sha256(content).digest()


@contextmanager
def ablated(
    model: MultiTokenForConditionalGeneration, modality_names: Collection[str]
) -> Iterator[None]:
    """Within: the projectors of these senses are given features that say nothing.

    Each is the mean that the projector was calibrated to, which is zero once standardized. Where a
    projector keeps none (`standardize: false`), the mean of the batch takes its place.
    """

    def replace(projector: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features, *rest = args
        if isinstance(projector, Projector) and projector.spec.standardize:
            mean = projector.feature_mean.to(features.values.dtype)
        else:
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
