"""The contract of a modality: `Modality` (light, picklable config) and its frozen `Encoder`.

Border: a modality knows raw things and encoder inputs; it knows nothing of text, tokens' ids or
the language model.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, SerializeAsAny
from torch import Tensor, nn
from typing_extensions import Self

from multi_token import registry
from multi_token.media.examples import (
    EXAMPLE_TEXT,
    example_audio,
    example_image,
    example_video,
)
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import content_bytes
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.projectors.base import ProjectorSpec
from multi_token.projectors.kinds import Mlp
from multi_token.types import Features, Prepared

OpenAIKind = Literal["image", "audio", "video", "document"]
"""Kind of an OpenAI content part: `image` is sent as `image_url`, `audio` as `input_audio` or
`audio_url`, `video` as `video_url`, `document` as `file`."""

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

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ()
    """OpenAI content parts that may carry an item. A request can always use `<name>_url` and
    `media`, which name the modality; a part of these kinds reaches it without a name."""
    limit_fields: ClassVar[Mapping[str, str]] = {"max_steps": "max_numbers"}
    """Field -> the server's limit that bounds it, where the two names differ (`with_limits`)."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages to import that `load` needs and a plain installation lacks."""
    install_extra: ClassVar[str] = ""
    """Requirement for `pip install` that brings `requires`, such as `multi_token[audio]`."""
    kit_example: ClassVar[str] = ""
    """`module:function` that builds `example`, for classes whose example is in another module."""

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

    def example_sources(self) -> Sequence[Any]:
        """Return small items as a request gives them: bytes, texts, numbers; never paths.

        A server decodes them before its first request, which loads the encoder's processor and
        the decoders once and not in each of its processes. Default: one item of each of
        `openai_kinds`.
        """
        examples = {
            "image": example_image,
            "audio": example_audio,
            "video": example_video,
            "document": EXAMPLE_TEXT.encode,
        }
        return [examples[kind]() for kind in self.openai_kinds]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return the files that a chat page offers for this modality; none means any file.

        Default: files of `openai_kinds`.
        """
        return [FILE_KINDS[kind] for kind in self.openai_kinds]

    def size_of(self, raw: Any) -> dict[str, float]:
        """Return the size of a loaded item, which a server adds up over a request.

        Args:
            raw: Result of `load`.

        Returns:
            Any of `pixels` (of all frames), `frames`, `seconds` and `characters`. Default: sizes
            of PIL images, lists of them and texts; empty for everything else.
        """
        if isinstance(raw, Image.Image):
            return {"pixels": raw.width * raw.height}
        if isinstance(raw, str):
            return {"characters": len(raw)}
        if isinstance(raw, (list, tuple)) and all(isinstance(one, Image.Image) for one in raw):
            return {"pixels": sum(one.width * one.height for one in raw), "frames": len(raw)}
        return {}

    def with_limits(self, limits: Mapping[str, float]) -> Self:
        """Return a copy whose own limits are at most those of a server; no limit is raised.

        Args:
            limits: Name of a limit (`max_pixels`, `max_seconds`, ...) -> its value. A numeric
                field of the same name is lowered to it; `limit_fields` names the others.
        """
        lowered: dict[str, Any] = {}
        for name in type(self).model_fields:
            own, most = getattr(self, name), limits.get(self.limit_fields.get(name, name))
            if most is not None and is_number(own) and own > most:
                lowered[name] = most
        return self.model_copy(update=lowered) if lowered else self

    @classmethod
    def example(cls, folder: Path) -> tuple[dict[str, Any], list[Any]] | None:
        """Return a small instance and sources for it, on which the conformance kit runs.

        Args:
            folder: Empty folder for the files that the example needs, such as a tiny encoder.

        Returns:
            Fields of the instance and at least two sources of different sizes; None if the class
            has no example, so that `multi-token modalities check` cannot run.
        """
        if not cls.kit_example:
            return None
        module, _, function = cls.kit_example.partition(":")
        return getattr(import_module(module), function)(folder)


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


def is_number(value: Any) -> bool:
    """Return whether a field holds a number; a bool is none, though Python counts it as an int."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
