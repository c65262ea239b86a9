"""Before the first step: how many items will be encoded for the start, and how long that will take.

Border: counts items of rows and tries a few; what a stage needs is plan.py's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from multi_token.data.feature_cache.keys import source_name
from multi_token.data.sources import TrainingSource, open_source
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.recipe import Recipe
from multi_token.train.closed_form import captioned_items, encode_items
from multi_token.train.plan.estimate import format_duration
from multi_token.types import Media

_NUM_TIMED = 8


@dataclass(frozen=True)
class EncodingEstimate:
    """What stage zero and the feature cache ask of one encoder."""

    name: str
    num_items: int
    """Encodings before the first step: with a feature cache each different item once, else those of
    the calibration and of the closed form, one after the other."""
    cached: bool
    seconds_per_item: float
    num_timed: int

    @property
    def seconds(self) -> float:
        """All of them, if the tried ones are like the others."""
        return self.num_items * self.seconds_per_item

    def __str__(self) -> str:
        why = "for the feature cache, each once" if self.cached else "for the closed form"
        return (
            f"  {self.name}: {self.num_items:,} encodings before the first step ({why}), about "
            f"{1000 * self.seconds_per_item:.3g} ms each ({self.num_timed} were tried): about "
            f"{format_duration(self.seconds)}"
        )


def estimate_encodings(
    model: MultiTokenForConditionalGeneration,
    sources: Sequence[TrainingSource],
    recipe: Recipe,
    *,
    initialized: Collection[str] = (),
) -> list[EncodingEstimate]:
    """One for each modality that has something to encode before the first step.

    `sources`: the training rows, whose good ones are known. `taken`: instances that `init_from`
    brings, which are neither calibrated nor fitted. A cache is counted as if it were empty.
    """
    spec, cached = recipe.train.closed_form, recipe.train.feature_cache is not None
    aligned = [open_source(s, model, recipe, None) for s in (spec.rows or [])] if spec else []
    found = []
    for name in model.modalities:
        items = [pair for source in sources for pair in source.items() if pair[0].modality == name]
        fitted = [
            (one.item, one.processor)
            for source in (aligned or sources)
            for one in captioned_items(source.conversations())
            if one.item.modality == name
        ]
        if spec is None or not model.encoder(name).pretrained:
            fitted = []
        if cached:
            num = _num_different([*items, *(fitted if aligned else [])])
        elif name in initialized:
            num = 0
        else:
            step = max(1, -(-len(items) // recipe.train.calibration_items))
            num = len(items[::step]) + len(fitted)
        if num:
            some = items or fitted
            tried = some[:: max(1, len(some) // _NUM_TIMED)][:_NUM_TIMED]
            seconds = _seconds_per_item(model, name, tried)
            found.append(EncodingEstimate(name, num, cached, seconds, len(tried)))
    return found


def _num_different(items: Sequence[tuple[Media, MultiTokenProcessor]]) -> int:
    """How many items a cache would hold; what has no name counts as different from all others."""
    names = [source_name(item.source) for item, _ in items]
    roots = [processor.fetch.root for _, processor in items]
    named = {pair for pair in zip(names, roots, strict=True) if pair[0] is not None}
    return len(named) + sum(name is None for name in names)


@torch.no_grad()
def _seconds_per_item(
    model: MultiTokenForConditionalGeneration,
    name: str,
    items: Sequence[tuple[Media, MultiTokenProcessor]],
) -> float:
    seconds = 0.0
    for _ in range(2):  # the first call of a model is slow
        start = time.perf_counter()
        for features in encode_items(model, name, items, batch_size=len(items)):
            features.values.sum().item()  # a GPU is waited for
        seconds = time.perf_counter() - start
    return seconds / len(items)
