"""Samples -> one Batch: padded, with each media token's place in the flattened batch.

Border: the last room on the CPU with samples; it asks modalities to batch their own inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Modality, stack_padded
from multi_token.types import IGNORE_INDEX, Batch, MediaBatch, Prepared, Sample

FEATURES_KEY = "features"
"""The input under which an item carries features from the cache instead of encoder inputs."""
BREAKS_KEY = "breaks"
"""Beside it, for items that are read line by line: bool [length], where a line ends."""


@dataclass(frozen=True)
class Collator:
    """Pads samples to one length: right for training, left for generation."""

    modalities: Mapping[str, Modality]
    pad_id: int
    padding_side: Literal["left", "right"] = "right"
    share_prefix: bool = False
    """Tell the model how many leading positions all rows share (see `train.share_prefix`)."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Samples -> Batch of [batch, longest]. All items of a modality are batched together."""
        lengths = [len(s.input_ids) for s in samples]
        time = max(lengths)
        left = self.padding_side == "left"
        starts = [time - n if left else 0 for n in lengths]

        input_ids = torch.full((len(samples), time), self.pad_id, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        items: dict[str, list[Prepared]] = {}
        positions: dict[str, list[Tensor]] = {}
        for row, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
            span = slice(start, start + length)
            input_ids[row, span] = sample.input_ids
            labels[row, span] = sample.labels
            attention_mask[row, span] = 1
            for place, item in zip(sample.places, sample.media, strict=True):
                begin = row * time + start + place.start
                items.setdefault(place.modality, []).append(item)
                positions.setdefault(place.modality, []).append(
                    torch.arange(begin, begin + place.length)
                )
        shift_labels = torch.full_like(labels, IGNORE_INDEX)
        shift_labels[:, :-1] = labels[:, 1:]
        media = {
            name: MediaBatch(
                inputs=self.inputs(name, items[name]), positions=torch.cat(positions[name])
            )
            for name in items
        }
        batch = Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            shift_labels=shift_labels,
            media=media,
        )
        if self.share_prefix:
            batch["num_shared"] = _num_shared(batch, min(lengths), samples)
        return batch

    def inputs(self, name: str, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items of one modality -> its encoder's inputs, or their cached features.

        Raises MultiTokenError if only some have cached features: neither could carry the others.
        """
        num_cached = sum(FEATURES_KEY in item.inputs for item in items)
        if num_cached == 0:
            return self.modalities[name].collate(items)
        if num_cached < len(items):
            raise MultiTokenError(
                f"{num_cached} of {len(items)} items of {name!r} come with cached features and the "
                "others without; fill the cache with all of them, or turn `feature_cache` off"
            )
        values = [item.inputs[FEATURES_KEY] for item in items]
        batch = {
            FEATURES_KEY: stack_padded(values),
            "mask": stack_padded([torch.ones(len(v), dtype=torch.bool) for v in values]),
        }
        if BREAKS_KEY in items[0].inputs:
            batch[BREAKS_KEY] = stack_padded([item.inputs[BREAKS_KEY] for item in items])
        return batch


def _num_shared(batch: Batch, shortest: int, samples: Sequence[Sample]) -> int:
    """Leading positions with the same ids in all rows, before any media and any learned label."""
    ids, learned = batch["input_ids"], batch["shift_labels"] != IGNORE_INDEX
    stops = ((ids != ids[:1]) | learned).any(0).nonzero().flatten()
    first_media = [place.start for sample in samples for place in sample.places]
    # at least one position must be left to compute
    return min([shortest - 1, *first_media, *stops[:1].tolist()])
