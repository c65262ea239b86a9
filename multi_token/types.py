"""The vocabulary of the house: every type that travels from one room to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypedDict

from torch import Tensor
from typing_extensions import NotRequired

from multi_token.errors import RowError

Role = Literal["system", "user", "assistant", "tool"]
"""Role of a message. Other names (`human`, `gpt`) are translated when a row is read."""

TrainOnTurns = Literal["all", "last"]
"""Which assistant turns of a conversation are learned."""

IGNORE_INDEX = -100
"""The label of a position that is not learned (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class Text:
    """A piece of text inside a message, exactly as the user wrote it."""

    text: str


@dataclass(frozen=True)
class Media:
    """One item of a modality inside a message.

    `modality` is the instance name in the recipe (`image`, `left_camera`), `source` what the row
    gave for it: a path, URL, data URI, bytes, PIL image, list or array of numbers. `media_text`:
    the same as text (a transcript, a caption), for the teacher of a distillation.
    """

    modality: str
    source: Any
    media_text: str | None = None


Part = Text | Media


@dataclass(frozen=True)
class Message:
    """One turn: a role and its parts in reading order."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Conversation of a row, in any accepted shape. `id` names the row in every error message.

    `rejected`: the same with another last answer, to which this one's is preferred, if the row has
    two.
    """

    messages: tuple[Message, ...]
    id: str = ""
    rejected: Conversation | None = None

    @property
    def media(self) -> tuple[Media, ...]:
        """All media items in reading order."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, Media))


@dataclass
class Prepared:
    """One item, ready for its encoder.

    `inputs`: the encoder's keyword arguments, without a batch axis.
    `num_features`: how many feature vectors the encoder will return for it.
    """

    inputs: dict[str, Tensor]
    num_features: int


@dataclass(frozen=True)
class MediaSpan:
    """Span of one item's tokens in a sample: `input_ids[start : start + length]`."""

    modality: str
    start: int
    length: int


@dataclass
class Sample:
    """One conversation as numbers.

    `input_ids`, `labels`: int64 [length]; labels are not shifted, `IGNORE_INDEX` where not learned.
    `media_spans` and `media` run in parallel, in reading order. `teacher`: the same conversation
    with
    texts in place of its media, if that was asked for and they are there. `rejected`: the same
    prompt and media with the answer that is not preferred, likewise. `error`: what is wrong with
    the row, where that is found only now; the numbers then stand for nothing (ConversationDataset).
    """

    input_ids: Tensor
    labels: Tensor
    media_spans: list[MediaSpan] = field(default_factory=list)
    media: list[Prepared] = field(default_factory=list)
    id: str = ""
    teacher: Sample | None = None
    rejected: Sample | None = None
    error: RowError | None = None


class MediaBatch(TypedDict):
    """All items of one modality in a batch.

    `inputs`: what `Modality.collate` made of the items, batch axis first (of items, or of the parts
    that items were cut into).
    `positions`: int64 [num_tokens], places in the flattened [batch * time] view, in item order.
    `copies`: into how many rows each item goes; `positions` are then [copies * num_tokens], all
    items once and then all of them again.
    """

    inputs: dict[str, Tensor]
    positions: Tensor
    copies: NotRequired[int]


class Batch(TypedDict):
    """Padded samples, as keyword arguments of the model's forward.

    `input_ids`, `attention_mask`, `labels`, `shift_labels`: int64 [batch, time].
    `shift_labels[:, t]` is the id to be predicted at t, so that packing never crosses a border.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    shift_labels: Tensor
    media: dict[str, MediaBatch]


class PackedBatch(TypedDict):
    """Several samples one after the other in one row; the model's forward takes it as well.

    `input_ids`, `labels`, `shift_labels`, `position_ids`: int64 [1, time]. Positions begin again
    with each sample, and the last one of a sample predicts nothing. There is no attention mask:
    with one, even of ones, transformers would not look for samples in the positions.
    `cu_seq_lens_q`, `cu_seq_lens_k`: int32 [num_samples + 1], where samples begin, and the end.
    `max_length_q`, `max_length_k`: the longest sample. Flash attention asks for these four.
    `segments`: int64 [num_segments, 4], where samples share a start (segment_attention.py): from
    where to
    where each segment goes, and from where to where what stands before it (0, 0 for nothing). Then
    the four above count segments, and positions go on from the shared start.
    """

    input_ids: Tensor
    labels: Tensor
    shift_labels: Tensor
    position_ids: Tensor
    cu_seq_lens_q: Tensor
    cu_seq_lens_k: Tensor
    max_length_q: int
    max_length_k: int
    media: dict[str, MediaBatch]
    segments: NotRequired[Tensor]


@dataclass
class Features:
    """Output of an encoder: `values` [items, length, dim], `mask` [items, length] or None.

    `newlines` bool [items, length] or None: where a line ends, instead of a feature. The projector
    writes its own learned `line_break` there.
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
