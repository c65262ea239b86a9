"""The contract of a modality: `Modality` (light, picklable config) and its frozen `Encoder`.

Border: a modality knows raw things and encoder inputs; it knows nothing of text, tokens' ids or
the language model.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, SerializeAsAny
from torch import Tensor, nn

from multi_token import registry
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import content_bytes
from multi_token.projectors.base import ProjectorSpec
from multi_token.projectors.kinds import Mlp
from multi_token.types import Features, Prepared

AnyProjector = Annotated[
    SerializeAsAny[ProjectorSpec],
    BeforeValidator(
        lambda fields: registry.build("projector", fields, cast(type[ProjectorSpec], ProjectorSpec))
    ),
]


class Encoder(nn.Module, ABC):
    """Turns prepared inputs into features.

    Frozen unless a recipe lets it learn: it then runs without gradients and in eval mode.
    """

    dim: int
    """Width of one feature vector."""
    pretrained: ClassVar[bool] = True
    """False for an encoder that starts from random weights: it learns with the projector of its
    modality, and its weights are saved with the run."""

    @abstractmethod
    def forward(self, **inputs: Tensor) -> Features:
        """What `Modality.collate` made -> values [items, length, dim] and their mask."""

    def layers(self) -> Sequence[nn.Module]:
        """Its layers from first to last, of which a recipe may let the last ones learn.

        By default the longest list of modules inside, which is what a transformer's blocks are.
        """
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len, default=nn.ModuleList()))


class Modality(BaseModel, ABC):
    """One kind of input. Its fields are its config, its checkpoint entry and its help text.

    Constructing one loads nothing; `build_encoder` is the only call that loads weights, so an
    instance can be pickled into every data worker.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    """The registered name of the class."""
    projector: AnyProjector = Field(default_factory=lambda: Mlp())
    """How features become tokens of the language model."""

    @abstractmethod
    def load(self, source: Any, fetch: Fetch) -> Any:
        """What a row gave -> the raw thing (a picture, an array). Raises MediaError."""

    @abstractmethod
    def prepare(self, raw: Any) -> Prepared:
        """The raw thing -> the encoder's inputs and the number of features they will become."""

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """The encoder, with its weights."""

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """The number of features of an item, told without decoding it: by its header, or the row.

        None where only decoding tells; else exactly `prepare(load(source, fetch)).num_features`,
        for an item that can be decoded. Raises MediaError for what a header shows to be none. It
        belongs to the `load` and `prepare` beside it: a class that changes one of them and not
        this is decoded (`header_length`).
        """
        return None

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """The path or address that a source names, if it names one."""
        if isinstance(source, Mapping):
            source = source.get("path")
        return source if isinstance(source, (str, os.PathLike)) else None

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Bytes that are equal only for equal items, by which features are kept."""
        return content_bytes(source, fetch)

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items -> one batch: each input stacked, shorter ones padded with zeros at the end."""
        return {key: stack_padded([item.inputs[key] for item in items]) for key in items[0].inputs}

    def num_tokens(self, num_features: int) -> int:
        """How many positions of the language model an item with so many features takes."""
        return self.projector.num_tokens(num_features)

    @classmethod
    def example(cls, folder: Path) -> tuple[dict[str, Any], list[Any]] | None:
        """Fields of a small instance, and a few sources for it: what the conformance kit tries.

        A plug-in returns them so that `multi-token modalities check NAME` can run on it; `folder`
        is an empty one for whatever files they need (a tiny encoder, say).
        """
        return None


def header_length(modality: Modality, source: Any, fetch: Fetch) -> int | None:
    """What `num_features_from_header` says of an item, if it was written for the `load` and
    `prepare` in use."""
    return (
        modality.num_features_from_header(source, fetch) if tells_lengths(type(modality)) else None
    )


def tells_lengths(cls: type[Modality]) -> bool:
    """Whether a class measures items without decoding them.

    Not one that inherits `num_features_from_header` and changes what it counts.
    """
    depth = {
        name: next(i for i, c in enumerate(cls.__mro__) if name in vars(c))
        for name in ("num_features_from_header", "load", "prepare")
    }
    return (
        depth["num_features_from_header"] <= min(depth.values())
        and cls.num_features_from_header is not Modality.num_features_from_header
    )


class PretrainedModality(Modality):
    """A modality whose encoder is a model of transformers, by hub name or folder."""

    encoder: str
    """Hub name or folder of the encoder."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen encoder, which a recipe lets learn in float32 always. Features are
    handed on as float32."""
    micro_batch: PositiveInt = 32
    """Parts (pictures, tiles, chunks of audio or text, clips) that go through the encoder at once:
    its memory does not grow with the number of items in a batch."""


AnyModality = Annotated[
    SerializeAsAny[Modality],
    BeforeValidator(
        lambda fields: registry.build("modality", fields, cast(type[Modality], Modality))
    ),
]


def layers_up_to(
    layers: Sequence[nn.Module], taken: int | tuple[int, ...] | None
) -> Sequence[nn.Module]:
    """The layers that hidden states come through, counted as transformers does; None: all."""
    if taken is None:
        return layers
    states = taken if isinstance(taken, tuple) else (taken,)
    return layers[: max(n if n >= 0 else len(layers) + 1 + n for n in states)]


def run_in_micro_batches(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], size: int
) -> Tensor:
    """`run(**inputs)` on slices of at most `size` along the first axis, joined along it."""
    num_parts = len(next(iter(inputs.values())))
    if num_parts <= size:
        return run(**inputs)
    return torch.cat(
        [
            run(**{key: value[start : start + size] for key, value in inputs.items()})
            for start in range(0, num_parts, size)
        ]
    )


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """[*shape_i] each -> [items, *max shape], zeros behind what is shorter."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    if all(list(t.shape) == shape for t in tensors):
        return torch.stack(list(tensors))
    batch = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(batch, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return batch
