"""Fits a projector to items that are given one by one, as stage zero does with those of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from multi_token.recipe.train import ClosedFormSpec
from multi_token.train.closed_form import caption_of, fit_projector, target_ids
from multi_token.train.item_sums import FitItem
from multi_token.types import Conversation, Media

Captioned = tuple[Media, str, Any]
"""An item, its caption, and the processor that loads it."""


def captioned_items(conversations: Iterable[tuple[Conversation, Any]]) -> list[Captioned]:
    return [
        (conversation.media[0], caption, processor)
        for conversation, processor in conversations
        if (caption := caption_of(conversation)) is not None
    ]


def calibrate(
    model: Any, name: str, items: Sequence[tuple[Media, Any]], *, batch_size: int = 32
) -> int:
    """Number of features of the statistics."""
    found = [FitItem(processor.prepare(item), num_calibrated=1) for item, processor in items]
    return fit_projector(model, name, found, spec=None, batch_size=batch_size).num_features


def fit_closed_form(
    model: Any,
    name: str,
    items: Sequence[Captioned],
    *,
    spec: ClosedFormSpec,
    batch_size: int = 32,
) -> int:
    """Number of captioned items that the closed form was fitted to."""
    found = [
        FitItem(processor.prepare(item), captions=[(target_ids(caption, processor, spec), 1)])
        for item, caption, processor in items
    ]
    return fit_projector(model, name, found, spec=spec, batch_size=batch_size).num_captioned
