"""Samples -> one Batch: padded or packed, with the position of each media token in the flat batch.

The last step on the CPU that sees samples; modalities batch their own inputs.

A pack that shares prefixes is a tree. A common prefix is laid once, and the rest of each row is a
segment that attends to its ancestors (rows A, B and C share `system`, A and B also an image):

    system | image | rest of A | rest of B | rest of C
       ^-------'^--------'         |           |
       |        ^------------------'           |
       ^---------------------------------------'
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Modality, stack_padded
from multi_token.types import (
    IGNORE_INDEX,
    Batch,
    BatchCounts,
    MediaBatch,
    MediaSpan,
    PackedBatch,
    Prepared,
    Sample,
)

FEATURES_KEY = "features"
"""Key of an item's inputs: cached features in place of encoder inputs."""
NEWLINES_KEY = "newlines"
"""Key beside it, for items with lines: bool [length], true where a line ends."""
_MIN_SHARED_TOKENS = 8
"""Shortest text prefix that is shared: each segment costs one attention call in every layer."""


@dataclass(frozen=True)
class Collator:
    """Batches samples: padded to one length by `__call__`, packed into one row by `pack`."""

    modalities: Mapping[str, Modality]
    pad_id: int
    padding_side: Literal["left", "right"] = "right"
    """Right for training, left for generation."""
    share: bool = False
    """Lay prefixes that samples of a pack share only once (`train.packing: {share: true}`)."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Pad samples to one length -> Batch of [batch, longest]; items are batched by modality."""
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
        # shifted here: a shift inside the model would cross the borders of packed samples
        shift_labels = torch.full_like(labels, IGNORE_INDEX)
        shift_labels[:, :-1] = labels[:, 1:]
        supervised = supervised_positions(shift_labels)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            labels=labels,
            shift_labels=shift_labels,
            supervised=supervised,
            counts=BatchCounts(tuple(lengths), len(supervised)),
            media=self._media(
                (span, item, begin)
                for sample, begin in zip(samples, begins, strict=True)
                for span, item in zip(sample.media_spans, sample.media, strict=True)
            ),
        )

    def pack(self, samples: Sequence[Sample]) -> PackedBatch:
        """Lay samples one after the other -> PackedBatch of [1, sum of their lengths].

        With `share`, samples with a common prefix become a tree, and the row is shorter. Samples
        then come in the order of `pack_order`.
        """
        segments = self._segments(samples)
        lengths = [segment.stop - segment.start for segment in segments]
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        labels = [s.sample.labels[s.start : s.stop].clone() for s in segments]
        for of_segment in labels:
            # the token before it is of another sample or of the prefix, and must not predict it
            of_segment[:1] = IGNORE_INDEX
        joined = torch.cat(labels)[None]
        begins = borders[:-1].tolist()
        bounds = [(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)]
        shift_labels = torch.nn.functional.pad(joined[:, 1:], (0, 1), value=IGNORE_INDEX)
        supervised = supervised_positions(shift_labels)
        return PackedBatch(
            input_ids=torch.cat([s.sample.input_ids[s.start : s.stop] for s in segments])[None],
            labels=joined,
            shift_labels=shift_labels,
            supervised=supervised,
            counts=BatchCounts(
                tuple(lengths),
                len(supervised),
                segments=tuple(
                    own + ((0, 0) if segment.parent is None else bounds[segment.parent])
                    for own, segment in zip(bounds, segments, strict=True)
                ),
                num_before=tuple(segment.start for segment in segments),
            ),
            # positions within each sample, so that a packed row computes what its own batch would
            position_ids=torch.cat([torch.arange(s.start, s.stop) for s in segments])[None],
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            # ints and not tensors: the attention kernel would read them back from the device
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            media=self._media(
                (span, item, begin - segment.start)
                for segment, begin in zip(segments, begins, strict=True)
                for span, item in zip(segment.sample.media_spans, segment.sample.media, strict=True)
                # a shared item belongs to the segment of the prefix alone, so it is encoded once
                if segment.start <= span.start < segment.stop
            ),
        )

    def pack_order(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return samples in the order in which `pack` lays them."""
        return [s.sample for s in self._segments(samples) if s.stop == len(s.sample.input_ids)]

    def _segments(self, samples: Sequence[Sample]) -> list[_PackSegment]:
        if self.share:
            return _tree(samples)
        return [_PackSegment(sample, 0, len(sample.input_ids)) for sample in samples]

    def _media(self, placed: Iterable[tuple[MediaSpan, Prepared, int]]) -> dict[str, MediaBatch]:
        """Batch (span, item, start of its sample in the flattened batch) by modality."""
        items: dict[str, list[Prepared]] = {}
        positions: dict[str, list[Tensor]] = {}
        for span, item, begin in placed:
            items.setdefault(span.modality, []).append(item)
            positions.setdefault(span.modality, []).append(span.positions(begin))
        return {
            name: MediaBatch(
                inputs=self.inputs(name, items[name]), positions=torch.cat(positions[name])
            )
            for name in items
        }

    def inputs(self, name: str, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Batch the items of a modality -> encoder inputs, or cached features.

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


def supervised_positions(shift_labels: Tensor) -> Tensor:
    """Return the supervised positions of the flattened labels, int64 [num_supervised].

    Labels of a device make the host wait for it, so batches bring their positions along.
    """
    return (shift_labels.flatten() != IGNORE_INDEX).nonzero().flatten()


@dataclass(frozen=True)
class _PackSegment:
    """`sample[start:stop]` in a pack; attends to segment number `parent` and its ancestors."""

    sample: Sample
    start: int
    stop: int
    parent: int | None = None


@dataclass(frozen=True)
class _Prefix:
    """Part of a sample that another sample may share, in units that are not cut.

    `units`: a token id, or (modality, item number, length, text between) of a media span. `ends`:
    tokens up to the end of each unit.
    """

    sample: Sample
    units: Sequence[Hashable]
    ends: Sequence[int]


class _ItemNumbers:
    """Numbers of media items: items with equal encoder inputs have the same number."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[tuple[int, Prepared]]] = {}
        self._num_known = 0

    def number(self, modality: str, item: Prepared) -> int:
        """Return the number of an item; new content gets a new number."""
        # a few values decide between most items; only what agrees in these is compared in full
        inputs = sorted(item.inputs.items())
        few = [
            (n, v.dtype, v.shape, *v.flatten()[:: 1 + v.numel() // 16].tolist()) for n, v in inputs
        ]
        alike = self._known.setdefault((modality, *few), [])
        for number, other in alike:
            if all(torch.equal(value, other.inputs[name]) for name, value in inputs):
                return number
        alike.append((self._num_known, item))
        self._num_known += 1
        return alike[-1][0]


def _prefix(sample: Sample, numbers: _ItemNumbers) -> _Prefix:
    """Return the tokens before the last one, and before any that predicts a supervised token."""
    supervised = (sample.labels[1:] != IGNORE_INDEX).nonzero()[:1].flatten().tolist()
    # hidden states of the prefix are shared, so no loss may be computed on its last token
    stop = min([len(sample.input_ids) - 1, *supervised])
    ids = sample.input_ids[:stop].tolist()
    units: list[Hashable] = []
    ends: list[int] = []
    at = 0
    for span, item in zip(sample.media_spans, sample.media, strict=True):
        if span.start + span.length > stop:
            stop = min(stop, span.start)  # a media span is never cut
            break
        units += ids[at : span.start]
        ends += range(at + 1, span.start + 1)
        at = span.start + span.length
        unit = (span.modality, numbers.number(span.modality, item), span.length)
        # the text between the pieces of an item may differ where its content does not
        units.append((*unit, span.pieces, *ids[span.start : at]) if span.pieces else unit)
        ends.append(at)
    return _Prefix(sample, [*units, *ids[at:stop]], [*ends, *range(at + 1, stop + 1)])


def _num_common(prefixes: Sequence[_Prefix], begin: int = 0) -> int:
    """Count the first units that all prefixes have in common; the first `begin` are known."""
    first = prefixes[0].units
    for i in range(begin, min(len(prefix.units) for prefix in prefixes)):
        if any(prefix.units[i] != first[i] for prefix in prefixes):
            return i
    return min(len(prefix.units) for prefix in prefixes)


def shared_prefix(samples: Sequence[Sample]) -> tuple[int, int]:
    """Return (tokens, media items) of the prefix that all samples have in common.

    Ids and encoder inputs are compared, not names. The prefix ends before the first supervised
    token, since each sample trains on its own, inside of no item, and before the end of the
    shortest sample.
    """
    numbers = _ItemNumbers()
    prefixes = [_prefix(sample, numbers) for sample in samples]
    num_units = _num_common(prefixes)
    num_tokens = prefixes[0].ends[num_units - 1] if num_units else 0
    return num_tokens, sum(span.start < num_tokens for span in samples[0].media_spans)


def _tree(samples: Sequence[Sample]) -> list[_PackSegment]:
    """Return the segments of a pack that lays common prefixes once, parents before children."""
    numbers = _ItemNumbers()
    segments: list[_PackSegment] = []
    # (rows with the first `depth` units in common, depth, tokens that are laid already, parent);
    # a stack of our own, since rows may be nested deeper than Python recurses
    stack: list[tuple[list[_Prefix], int, int, int | None]]
    stack = [([_prefix(sample, numbers) for sample in samples], 0, 0, None)]
    while stack:
        rows, depth, start, parent = stack.pop()
        sample = rows[0].sample
        if len(rows) == 1:
            segments.append(_PackSegment(sample, start, len(sample.input_ids), parent))
            continue
        depth = _num_common(rows, depth)
        stop = rows[0].ends[depth - 1] if depth else 0
        with_media = any(start <= span.start < stop for span in sample.media_spans)
        if with_media or stop - start >= _MIN_SHARED_TOKENS:
            segments.append(_PackSegment(sample, start, stop, parent))
            start, parent = stop, len(segments) - 1
        children: dict[Hashable, list[_Prefix]] = {}
        for i, row in enumerate(rows):
            # a row whose prefix ends here has no more to share: a branch of its own
            branch = row.units[depth] if depth < len(row.units) else ("end", i)
            children.setdefault(branch, []).append(row)
        stack += [(child, depth, start, parent) for child in reversed(children.values())]
    return segments
