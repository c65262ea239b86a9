"""Samples -> one Batch: padded or packed, with each media token's place in the flattened batch.

Border: the last room on the CPU with samples; it asks modalities to batch their own inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Modality, stack_padded
from multi_token.types import (
    IGNORE_INDEX,
    Batch,
    MediaBatch,
    MediaSpan,
    PackedBatch,
    Prepared,
    Sample,
)

FEATURES_KEY = "features"
"""The input under which an item carries features from the cache instead of encoder inputs."""
NEWLINES_KEY = "breaks"
"""Beside it, for items that are read line by line: bool [length], where a line ends."""


@dataclass(frozen=True)
class Collator:
    """Pads samples to one length: right for training, left for generation."""

    modalities: Mapping[str, Modality]
    pad_id: int
    padding_side: Literal["left", "right"] = "right"
    share_prefix: bool = False
    """Tell the model how many leading positions all rows share (see `train.share_prefix`)."""
    share_media: bool = False
    """Lay what samples of a pack show first only once (see `train.share_media`)."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Samples -> Batch of [batch, longest]. All items of a modality are batched together."""
        lengths = [len(s.input_ids) for s in samples]
        time = max(lengths)
        left = self.padding_side == "left"
        starts = [time - n if left else 0 for n in lengths]

        input_ids = torch.full((len(samples), time), self.pad_id, dtype=torch.long)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        attention_mask = torch.zeros_like(input_ids)
        begins = [row * time + start for row, start in enumerate(starts)]
        for row, (sample, start, length) in enumerate(zip(samples, starts, lengths, strict=True)):
            span = slice(start, start + length)
            input_ids[row, span] = sample.input_ids
            labels[row, span] = sample.labels
            attention_mask[row, span] = 1
        shift_labels = torch.full_like(labels, IGNORE_INDEX)
        shift_labels[:, :-1] = labels[:, 1:]
        batch = Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            shift_labels=shift_labels,
            media=self._media(
                (place, item, begin)
                for sample, begin in zip(samples, begins, strict=True)
                for place, item in zip(sample.media_spans, sample.media, strict=True)
            ),
        )
        if self.share_prefix:
            batch["num_shared"] = _num_shared(batch, min(lengths), samples)
        return batch

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """Samples -> PackedBatch of [1, sum of their lengths], in the order in which they come.

        With `share_media`, samples beside each other that begin with the same media become a tree:
        what they share once, and then the rest of each.
        """
        families = (
            _group_shared_media(samples) if self.share_media else [[sample] for sample in samples]
        )
        pieces: list[_PackSegment] = []
        for family in families:
            pieces += _pack_segments(family, num_before=len(pieces))
        lengths = [piece.stop - piece.start for piece in pieces]
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        labels = [piece.sample.labels[piece.start : piece.stop].clone() for piece in pieces]
        for of_piece in labels:
            of_piece[:1] = IGNORE_INDEX  # or what stands before it would predict it
        joined = torch.cat(labels)[None]
        begins = borders[:-1].tolist()
        batch = PackedBatch(
            input_ids=torch.cat([p.sample.input_ids[p.start : p.stop] for p in pieces])[None],
            labels=joined,
            shift_labels=torch.nn.functional.pad(joined[:, 1:], (0, 1), value=IGNORE_INDEX),
            position_ids=torch.cat([torch.arange(p.start, p.stop) for p in pieces])[None],
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            media=self._media(
                (place, item, begin - piece.start)
                for piece, begin in zip(pieces, begins, strict=True)
                for place, item in zip(piece.sample.media_spans, piece.sample.media, strict=True)
                if piece.start <= place.start < piece.stop
            ),
        )
        if any(piece.prefix_segment is not None for piece in pieces):
            batch["segments"] = torch.tensor(
                [
                    (
                        begin,
                        begin + length,
                        *(_segment_bounds(piece.prefix_segment, begins, lengths)),
                    )
                    for piece, begin, length in zip(pieces, begins, lengths, strict=True)
                ]
            )
        return batch

    def _media(self, placed: Iterable[tuple[MediaSpan, Prepared, int]]) -> dict[str, MediaBatch]:
        """Items with their places and where their samples begin in the flattened batch, by
        modality.
        """
        items: dict[str, list[Prepared]] = {}
        positions: dict[str, list[Tensor]] = {}
        for place, item, begin in placed:
            first = begin + place.start
            items.setdefault(place.modality, []).append(item)
            positions.setdefault(place.modality, []).append(
                torch.arange(first, first + place.length)
            )
        return {
            name: MediaBatch(
                inputs=self.inputs(name, items[name]), positions=torch.cat(positions[name])
            )
            for name in items
        }

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
        if NEWLINES_KEY in items[0].inputs:
            batch[NEWLINES_KEY] = stack_padded([item.inputs[NEWLINES_KEY] for item in items])
        return batch


def _num_shared(batch: Batch, shortest: int, samples: Sequence[Sample]) -> int:
    """Leading positions with the same ids in all rows, before any media and any learned label."""
    ids, learned = batch["input_ids"], batch["shift_labels"] != IGNORE_INDEX
    stops = ((ids != ids[:1]) | learned).any(0).nonzero().flatten()
    first_media = [place.start for sample in samples for place in sample.media_spans]
    # at least one position must be left to compute
    return min([shortest - 1, *first_media, *stops[:1].tolist()])


@dataclass(frozen=True)
class _PackSegment:
    """`sample[start:stop]` in a pack, behind what stands in piece number `prefix_segment`, if
    any."""

    sample: Sample
    start: int
    stop: int
    prefix_segment: int | None = None


def shared_media_prefix_length(samples: Sequence[Sample]) -> int:
    """How many leading tokens all of these samples share, up to and including shared media.

    Ids and encoder inputs are compared, not names. It ends before anything that is learned, since
    each sample learns its own, inside of no item, and before the end of the shortest sample; it is
    0 where no item lies within.
    """
    first = samples[0]
    stop = min(len(sample.input_ids) for sample in samples) - 1
    for sample in samples:
        learned = (sample.labels[1 : stop + 1] != IGNORE_INDEX).nonzero()[:1]
        other = (sample.input_ids[:stop] != first.input_ids[:stop]).nonzero()[:1]
        stop = min([stop, *learned.flatten().tolist(), *other.flatten().tolist()])
    num_same = 0
    for i, place in enumerate(first.media_spans):
        same = all(
            len(sample.media_spans) > i
            and sample.media_spans[i] == place
            and _same_item(sample.media[i], first.media[i])
            for sample in samples
        )
        if not same or place.start + place.length > stop:
            stop = min([stop, *(s.media_spans[i].start for s in samples if len(s.media_spans) > i)])
            break
        num_same += 1
    else:
        behind = [s.media_spans[num_same].start for s in samples if len(s.media_spans) > num_same]
        stop = min([stop, *behind])
    return stop if num_same else 0


def _same_item(a: Prepared, b: Prepared) -> bool:
    return a is b or (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[key], b.inputs[key]) for key in a.inputs)
    )


def _group_shared_media(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Neighbours that share a start with media."""
    families: list[list[Sample]] = []
    for sample in samples:
        if families and shared_media_prefix_length([families[-1][0], sample]):
            families[-1].append(sample)
        else:
            families.append([sample])
    return families


def _pack_segments(family: Sequence[Sample], *, num_before: int) -> list[_PackSegment]:
    """One sample whole; of several, what they share and then the rest of each."""
    shared = shared_media_prefix_length(family) if len(family) > 1 else 0
    if not shared:
        return [_PackSegment(sample, 0, len(sample.input_ids)) for sample in family]
    rest = [_PackSegment(s, shared, len(s.input_ids), prefix_segment=num_before) for s in family]
    return [_PackSegment(family[0], 0, shared), *rest]


def _segment_bounds(
    piece: int | None, begins: Sequence[int], lengths: Sequence[int]
) -> tuple[int, int]:
    return (0, 0) if piece is None else (begins[piece], begins[piece] + lengths[piece])
