"""Types that packages exchange: conversations, samples, batches, features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor
from typing_extensions import NotRequired

from multi_token.errors import RowError

Role = Literal["system", "user", "assistant", "tool"]
"""Role of a message. Other names (`human`, `gpt`) are translated when a row is read."""

TrainOnTurns = Literal["all", "last"]
"""Supervised assistant turns of a conversation."""

IGNORE_INDEX = -100
"""The label of a position that is not supervised (the default of torch's cross entropy)."""


@dataclass(frozen=True)
class Text:
    """A text part of a message.

    Args:
        text: The text, exactly as the user wrote it. Special tokens in it stay text.
    """

    text: str


@dataclass(frozen=True)
class Media:
    """A media part of a message: one item of a modality.

    Args:
        modality: Instance name in the recipe (`image`, `left_camera`).
        source: Path, URL, data URI, bytes, PIL image, list or array of numbers.
        media_text: The item as text (a transcript, a caption), for the teacher of a distillation.
    """

    modality: str
    source: Any
    media_text: str | None = None


Part = Text | Media


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        parts: Texts and media items, in reading order.
    """

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """A conversation, whatever the shape of its row.

    Args:
        messages: Turns in order.
        id: Name of the row in error messages.
        rejected: The same conversation with the last answer that is not preferred (DPO), or None.
    """

    messages: tuple[Message, ...]
    id: str = ""
    rejected: Conversation | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        """All media items in reading order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, Media))


@dataclass(frozen=True)
class Fact:
    """Numbers and names of an item that can be written as text (`Modality.facts`).

    Args:
        values: Name -> value, as the decoder used it; None where the item does not have it.
        at: Number of the item's features before the text.
    """

    values: Mapping[str, float | str | None]
    at: int = 0


@dataclass
class Prepared:
    """One media item as tensors, the result of `Modality.prepare`.

    Attributes:
        inputs: Keyword arguments of the encoder, without a batch axis.
        num_features: Number of feature vectors that the encoder returns for the item.
        facts: Its facts, in the order of its features.
    """

    inputs: dict[str, Tensor]
    num_features: int
    facts: tuple[Fact, ...] = ()


@dataclass(frozen=True)
class MediaSpan:
    """Span of one item in a sample: `input_ids[start : start + length]`.

    Attributes:
        modality: Instance name.
        start: First position.
        length: Positions up to the end of the item.
        pieces: (offset, length) of each run of media embeddings, with text between the runs; `()`
            if the span is one run.
    """

    modality: str
    start: int
    length: int
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def num_embeds(self) -> int:
        """Number of media embeddings."""
        return sum(length for _, length in self.pieces) if self.pieces else self.length

    def positions(self, begin: int = 0) -> Tensor:
        """Positions of the media embeddings, int64 [num_embeds]; `begin`: start of the sample."""
        first = begin + self.start
        runs = [torch.arange(first + at, first + at + n) for at, n in self.pieces]
        return torch.cat(runs) if runs else torch.arange(first, first + self.length)


@dataclass
class Sample:
    """One tokenized conversation.

    `input_ids`, `labels`: int64 [length]; labels are not shifted, and `IGNORE_INDEX` where not
    supervised. `media_spans` and `media` run in parallel, in reading order. `teacher`: the same
    conversation with texts in place of its media, for distillation. `rejected`: the same prompt and
    media with the answer that is not preferred. `error`: the fault of a row whose length came from
    headers (ConversationDataset); the tensors are then placeholders.
    """

    input_ids: Tensor
    labels: Tensor
    media_spans: list[MediaSpan] = field(default_factory=list)
    media: list[Prepared] = field(default_factory=list)
    id: str = ""
    teacher: Sample | None = None
    rejected: Sample | None = None
    error: RowError | None = None


class Length(NamedTuple):
    """Length of one good row: all tokens, supervised tokens, media tokens, and media items.

    `num_rejected`: tokens with the rejected answer in place of the chosen one; 0 where a row has
    none, or where the processor has no `preference`.
    """

    num_tokens: int
    num_supervised: int
    num_media: int
    num_items: int = 0
    num_rejected: int = 0

    @classmethod
    def of(cls, sample: Sample) -> Length:
        """Count the tokens and media items of a sample."""
        return cls(
            num_tokens=int(sample.input_ids.numel()),
            num_supervised=int((sample.labels != IGNORE_INDEX).sum()),
            num_media=sum(span.num_embeds for span in sample.media_spans),
            num_items=len(sample.media_spans),
            num_rejected=0 if sample.rejected is None else int(sample.rejected.input_ids.numel()),
        )


class MediaBatch(TypedDict):
    """All items of one modality in a batch.

    `inputs`: result of `Modality.collate`, batch axis first (items, or chunks of items).
    `positions`: int64 [num_tokens], indices in the flattened [batch * time] view, in item order.
    `copies`: number of batch rows that each item goes into; `positions` are then
    [copies * num_tokens], all items once and then all of them again.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    copies: NotRequired[int]


@dataclass(frozen=True)
class BatchCounts:
    """Numbers of a batch that the host needs: counted by the collator, never read from a device.

    Not a tensor and not a container, so that whatever moves a batch to a device leaves it alone.

    Attributes:
        lengths: Real tokens of each row, or of each segment of a packed row.
        num_supervised: Positions of `shift_labels` that are not `IGNORE_INDEX`.
        segments: Of a packed row (start, stop, first, past) of each segment, where `first` and
            `past` are start and end of its parent, 0 and 0 for none; `()` for padded rows.
        num_before: Tokens of the prefix that each segment continues; `()` for padded rows.
    """

    lengths: tuple[int, ...]
    num_supervised: int
    segments: tuple[tuple[int, int, int, int], ...] = ()
    num_before: tuple[int, ...] = ()

    @property
    def shares_prefix(self) -> bool:
        """True if a segment continues another one."""
        return any(self.num_before)


class Batch(TypedDict):
    """Padded samples, as keyword arguments of the model's forward.

    `input_ids`, `attention_mask`, `labels`, `shift_labels`: int64 [batch, time].
    `shift_labels[:, t]` is the id to predict at t.
    `supervised`: int64 [num_supervised], the positions of the flattened `shift_labels` that are not
    `IGNORE_INDEX`, ascending.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    shift_labels: Tensor
    supervised: Tensor
    counts: BatchCounts
    media: dict[str, MediaBatch]


class PackedBatch(TypedDict):
    """Several samples one after the other in one row, as keyword arguments of the model's forward.

    `input_ids`, `labels`, `shift_labels`, `position_ids`: int64 [1, time]. Positions begin again
    with each sample, and the last position of a sample predicts nothing. `supervised` is that of
    `Batch`.
    `cu_seq_lens_q`, `cu_seq_lens_k`: int32 [num_samples + 1], starts of the samples, and the end.
    `max_length_q`, `max_length_k`: length of the longest sample. These four are flash attention's.
    If samples share a prefix (`counts.shares_prefix`), these four count segments, and positions
    continue from the prefix (segment_attention.py).
    """

    # No attention mask: with one, even of ones, transformers does not look for samples in the
    # positions, and samples would attend to each other.
    input_ids: Tensor
    labels: Tensor
    shift_labels: Tensor
    supervised: Tensor
    counts: BatchCounts
    position_ids: Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    media: dict[str, MediaBatch]


@dataclass
class Features:
    """Output of an encoder for a batch of items.

    Attributes:
        values: Feature vectors [items, length, dim].
        mask: bool [items, length], True for real features; None if all are real.
        newlines: bool [items, length], True where a line of an image in tiles ends; None without
            tiles. The projector writes its trained `line_break` embedding there.
    """

    values: Tensor
    mask: Tensor | None = None
    newlines: Tensor | None = None


class ComposedModel(Protocol):
    """The parts of the model that `checkpoint/` and `generate.py` work on.

    Both are imported by model.py, so they take an object with these parts and import no model.
    """

    config: Any
    language_model: Any
    modalities: Any
    projectors: Any
    trained_encoders: Any
    trained_language_model: bool
    processor: Any

    @property
    def capabilities(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def encoder(self, name: str) -> Any: ...
    def projector(self, name: str) -> Any: ...
    def embed(self, input_ids: Tensor, media: Any = None) -> Tensor: ...
    def require_processor(self) -> Any: ...
