"""The contract of a modality: `Modality` (light, picklable config) and its frozen `Encoder`.

Border: a modality knows raw things and encoder inputs; it knows nothing of text, tokens' ids or
the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor, nn

from multi_token import registry
from multi_token.media.fetch import Fetch
from multi_token.projectors import Mlp, ProjectorSpec
from multi_token.types import Features, Prepared

AnyProjector = Annotated[
    SerializeAsAny[ProjectorSpec],
    BeforeValidator(
        lambda fields: registry.build("projector", fields, cast(type[ProjectorSpec], ProjectorSpec))
    ),
]


class Encoder(nn.Module, ABC):
    """Turns prepared inputs into features. Frozen: it runs without gradients and in eval mode."""

    dim: int
    """Width of one feature vector."""

    @abstractmethod
    def forward(self, **inputs: Tensor) -> Features:
        """What `Modality.collate` made -> values [items, length, dim] and their mask."""


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

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items -> one batch: each input stacked, shorter ones padded with zeros at the end."""
        return {key: stack_padded([item.inputs[key] for item in items]) for key in items[0].inputs}

    def num_tokens(self, num_features: int) -> int:
        """How many positions of the language model an item with so many features takes."""
        return self.projector.num_tokens(num_features)


AnyModality = Annotated[
    SerializeAsAny[Modality],
    BeforeValidator(
        lambda fields: registry.build("modality", fields, cast(type[Modality], Modality))
    ),
]


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """[*shape_i] each -> [items, *max shape], zeros behind what is shorter."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    if all(list(t.shape) == shape for t in tensors):
        return torch.stack(list(tensors))
    batch = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(batch, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return batch
