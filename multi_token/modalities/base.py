"""Contract of a modality: `Modality` (light, picklable config) and its frozen `Encoder`."""

from __future__ import annotations

import functools
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from PIL import Image
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SerializeAsAny,
    field_validator,
)
from torch import Tensor, nn
from typing_extensions import Self

from multi_token import registry
from multi_token.hub import hub_arguments, limited_hub_waits
from multi_token.media.examples import EXAMPLE_TEXT, example_audio, example_image, example_video
from multi_token.media.fetch import Fetch
from multi_token.media.hashing import content_bytes
from multi_token.media.sniff import FILE_KINDS, FileKind
from multi_token.modalities.facts import Run, check_format, runs_of
from multi_token.projectors.base import ProjectorSpec
from multi_token.projectors.kinds import Mlp
from multi_token.types import Fact, Features, Prepared

OpenAIKind = Literal["image", "audio", "video", "document"]
"""Kind of an OpenAI content part: `image` is sent as `image_url`, `audio` as `input_audio` or
`audio_url`, `video` as `video_url`, `document` as `file`."""

USUAL_COLUMNS: Mapping[OpenAIKind, tuple[str, ...]] = {
    "image": (
        *("image", "images", "img", "photo", "jpg", "jpeg", "png", "webp"),
        *("image_path", "image_file", "image_url", "img_path", "image_bytes"),
    ),
    "audio": (
        *("audio", "audios", "speech", "sound", "wav", "mp3", "flac"),
        *("audio_path", "audio_file", "audio_url", "audio_filepath"),
    ),
    "video": ("video", "videos", "mp4", "video_path", "video_file", "video_url"),
    "document": ("document", "documents", "pdf", "document_path", "pdf_path"),
}
"""Kind -> usual names of a column with its items in data sets, the most certain first."""

AnyProjector = Annotated[
    SerializeAsAny[ProjectorSpec],
    BeforeValidator(
        lambda fields: registry.build("projector", fields, cast(type[ProjectorSpec], ProjectorSpec))
    ),
]


MAX_BATCH_FEATURES = 16_384
"""Features of a batch to encode, above which it takes fewer items: 64 MiB at a width of 1024."""


class Encoder(nn.Module, ABC):
    """Turns prepared inputs into features.

    An encoder is frozen unless the recipe lists it under `learn.encoders`. A frozen encoder runs
    without gradients, in eval mode.
    """

    dim: int
    """Width of one feature vector."""
    pretrained: ClassVar[bool] = True
    """False for an encoder that starts from random weights. Such an encoder is trained together
    with the projector of its modality, and its weights are saved with the run."""
    unused_parameters: frozenset[str] = frozenset()
    """Names of parameters that the features do not depend on, such as those of layers after the one
    that `layer` names. They are found before an encoder is trained, and stay frozen."""

    @abstractmethod
    def forward(self, **inputs: Tensor) -> Features:
        """Encode one batch.

        Args:
            inputs: Result of `Modality.collate`.

        Returns:
            Features with `values` [items, length, dim] and the mask of real features. An item has
            as many real features as its `Prepared.num_features` says.
        """

    def layers(self) -> Sequence[nn.Module]:
        """Return the layers from first to last, of which a recipe may train the last ones.

        Default: the longest `nn.ModuleList` inside, which holds the blocks of a transformer.
        """
        # Towers with several lists (stages, two halves) override this.
        lists = [m for m in self.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len, default=nn.ModuleList()))


class Modality(BaseModel, ABC):
    """One type of input. Its fields are its config, its checkpoint entry and its help text.

    The path of an item: `load` (source -> decoded item) and `prepare` (decoded item -> tensors of
    the encoder) run in data workers; `collate` joins prepared items into a batch; the encoder of
    `build_encoder` turns the batch into features. A new modality implements `load`, `prepare` and
    `build_encoder` (docs/add-a-modality.md).

    Constructing a modality loads nothing, so an instance can be pickled into every data worker.
    """

    # Frozen: a modality is shared by threads, and its fields are the key of cached features.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ()
    """OpenAI content parts that may carry an item. A request can always use `<name>_url` and
    `media`, which name the modality; a part of these kinds reaches it without a name."""
    item_text: ClassVar[Literal["caption", "transcript"]] = "caption"
    """Meaning of a column `text` beside an item in data sets."""
    limit_fields: ClassVar[Mapping[str, str]] = {"max_steps": "max_numbers"}
    """Field -> the server's limit that bounds it, where the two names differ (`with_limits`)."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages to import that `load` needs and a plain installation lacks."""
    install_extra: ClassVar[str] = ""
    """Requirement for `pip install` that brings `requires`, such as `multi_token[audio]`."""
    fact_names: ClassVar[Mapping[str, str]] = {}
    """Facts that `prepare` gives with an item -> their meaning, for `facts` and the docs."""
    kit_example: ClassVar[str] = ""
    """`module:function` that builds `example`, for classes whose example is in another module."""

    type: str
    """The registered name of the class."""
    projector: AnyProjector = Field(default_factory=lambda: Mlp())
    """Network that turns features into media embeddings of the language model."""
    facts: str | None = None
    """Text that is written before each item, or each of its parts: a format string over
    `fact_names`, such as `"{seconds:.1f}s "`. Never supervised. Default: no text."""

    @field_validator("facts")
    @classmethod
    def _check_facts(cls, facts: str | None) -> str | None:
        if facts is not None:
            check_format(facts, cls.fact_names)
        return facts

    @abstractmethod
    def load(self, source: Any, fetch: Fetch) -> Any:
        """Read and decode one item.

        Args:
            source: Item as the row gives it: a path, URL, bytes, array, or an object in memory.
            fetch: Reader of paths and URLs, within limits.

        Returns:
            The decoded item that `prepare` takes, such as an RGB image.

        Raises:
            MediaError: The source cannot be read or decoded, or is over a limit.
        """

    @abstractmethod
    def prepare(self, raw: Any) -> Prepared:
        """Turn a decoded item into the encoder's inputs.

        Args:
            raw: Result of `load`.

        Returns:
            Tensors of one item, without a batch axis, the number of its features, and its facts,
            each with all `fact_names` (needed only if `facts` is set).
        """

    @abstractmethod
    def build_encoder(self) -> Encoder:
        """Return the encoder with its weights, in eval mode and float32."""

    def size_from_header(self, source: Any, fetch: Fetch) -> Any:
        """Return the size of an item without decoding it: from its file's header, or the row.

        Args:
            source: Item as the row gives it.
            fetch: Reader of paths and URLs; `fetch.open` gives the start of a file.

        Returns:
            Any value that `count_features` takes, such as a number of samples. None if only
            decoding tells (the default).

        Raises:
            MediaError: The header shows that the item cannot be decoded.
        """
        return None

    def count_features(self, size: Any) -> int | None:
        """Return the number of features of an item of this size.

        The one owner of that number: `prepare` counts with the same arithmetic, so that an item
        is as long as its header promised. A class that changes what `prepare` counts overrides
        this method too; the conformance kit and training compare the two.

        Args:
            size: Result of `size_from_header`.

        Returns:
            `prepare(load(source, fetch)).num_features`, or None if it is known only after decoding.
        """
        return None

    def facts_from_size(self, size: Any) -> tuple[Fact, ...] | None:
        """Return the facts of an item of this size, equal to those of `prepare`.

        Args:
            size: Result of `size_from_header`.

        Returns:
            The facts, or None if they are known only after decoding (the default).
        """
        return None

    def prepared_from_header(self, source: Any, fetch: Fetch) -> Prepared | None:
        """Return length and facts of an item without decoding it, and without inputs.

        Returns:
            The item, or None if decoding is needed for its length, or for facts to be written.

        Raises:
            MediaError: The header shows that the item cannot be decoded.
        """
        if self.facts is None:
            num_features = self.num_features_from_header(source, fetch)
            return None if num_features is None else Prepared({}, num_features)
        size = self.size_from_header(source, fetch)
        facts = None if size is None else self.facts_from_size(size)
        num_features = None if facts is None else self.count_features(size)
        if facts is None or num_features is None:
            return None
        return Prepared({}, num_features, facts)

    def runs(self, prepared: Prepared) -> list[Run]:
        """Return the media embeddings of an item in runs, with the text of `facts` before each.

        Raises:
            MediaError: The item does not have a fact that `facts` writes.
            RecipeError: The projector joins features of both sides of a text.
        """
        return runs_of(self.facts, prepared.facts, self.num_tokens, prepared.num_features)

    def num_features_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of features of an item without decoding it (`data.lengths: headers`).

        Returns:
            The number, or None if it is known only after decoding.

        Raises:
            MediaError: The header shows that the item cannot be decoded.
        """
        # Two steps, so that `prepare` and the header share `count_features`.
        size = self.size_from_header(source, fetch)
        return None if size is None else self.count_features(size)

    def named_file(self, source: Any) -> str | os.PathLike[str] | None:
        """Return the path or URL that a source names; None if it names none."""
        if isinstance(source, Mapping):
            source = source.get("path")
        return source if isinstance(source, (str, os.PathLike)) else None

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return bytes that are equal only for equal items; the key of cached features."""
        return content_bytes(source, fetch)

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join prepared items into one batch.

        Returns:
            Keyword arguments of the encoder. Default: each input stacked to [items, ...], shorter
            ones padded with zeros at the end.
        """
        return {key: stack_padded([item.inputs[key] for item in items]) for key in items[0].inputs}

    def num_tokens(self, num_features: int) -> int:
        """Return the number of media embeddings that the projector makes of N features."""
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

    def usual_columns(self) -> Sequence[tuple[str, ...]]:
        """Return the usual names of a column with items, the most certain first, by kind.

        Default: those of `openai_kinds`.
        """
        return [USUAL_COLUMNS[kind] for kind in self.openai_kinds]

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
        # Copied without validation: lower numbers are as valid as those before.
        lowered: dict[str, Any] = {}
        for name in type(self).model_fields:
            own, most = getattr(self, name), limits.get(self.limit_fields.get(name, name))
            # Python counts a bool as an int, but a switch is no limit.
            is_number = isinstance(own, (int, float)) and not isinstance(own, bool)
            if most is not None and is_number and own > most:
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
        # By name, because tiny encoders belong to `testing`, which imports this package.
        module, _, function = cls.kit_example.partition(":")
        return getattr(import_module(module), function)(folder)


class PretrainedModality(Modality):
    """A modality whose encoder is a model of transformers, named by hub name or folder.

    Subclasses read the encoder's own processor or tokenizer with `auto`, and its weights with
    `load_tower`.
    """

    encoder: str
    """Hub name or folder of the encoder."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the frozen encoder; default: float32, and bfloat16 while a run trains with bf16
    on a GPU. A trained encoder is always float32, and so are the features that it returns."""
    micro_batch: PositiveInt = 32
    """Parts (images, tiles, clips, chunks of audio or text) that go through the encoder at once.
    The encoder's memory does not grow with the number of items in a batch."""

    def auto(self, auto_class: str) -> Any:
        """Return the encoder's object of a transformers Auto class, such as `AutoTokenizer`.

        The process has one object for all instances, so callers must not change it.

        Raises:
            OSError: The hub name or folder has no such object.
        """
        return load_auto(auto_class, self.encoder, self.revision)

    def load_tower(self) -> Any:
        """Return the transformers model with its weights, in float32, without LayerDrop."""
        from transformers import AutoModel

        with limited_hub_waits(self.encoder):
            tower = AutoModel.from_pretrained(
                self.encoder,
                revision=self.revision,
                dtype=torch.float32,
                **hub_arguments(of_weights=True),
            )
        # A trained encoder would skip other layers in each process. DDP waits for the gradients of
        # all of them, and a hidden state of a skipped layer does not exist.
        for module in tower.modules():
            for owner in (module, getattr(module, "config", module)):
                for name in [n for n in vars(owner) if n.endswith("layerdrop")]:
                    setattr(owner, name, 0.0)
        return tower

    def output_dim(self, encoder: Encoder, raw: Any) -> int:
        """Return the width of the features that `encoder` makes of a decoded item."""
        with torch.no_grad():
            return encoder(**self.collate([self.prepare(raw)])).values.shape[-1]


AnyModality = Annotated[
    SerializeAsAny[Modality],
    BeforeValidator(
        lambda fields: registry.build("modality", fields, cast(type[Modality], Modality))
    ),
]


# Read once per process: reading a processor's files takes longer than processing an image.
@functools.lru_cache(maxsize=64)
def load_auto(auto_class: str, encoder: str, revision: str | None) -> Any:
    """Return what `transformers.<auto_class>.from_pretrained` loads; callers must not change it."""
    import transformers

    home: Any = transformers
    if auto_class == "AutoImageProcessor":
        # transformers 5.17 asks for torchvision at its top level, and this module does not
        home = importlib.import_module("transformers.models.auto.image_processing_auto")
    with limited_hub_waits(encoder):
        return getattr(home, auto_class).from_pretrained(
            encoder, revision=revision, **hub_arguments()
        )


@functools.lru_cache(maxsize=8)
def load_skeleton(encoder: str, revision: str | None, part: str = "") -> nn.Module:
    """Return the encoder's architecture on the meta device, which computes shapes only.

    `part`: sub-configuration to build from, such as `vision_config`, where there is one.
    """
    from transformers import AutoModel

    config = load_auto("AutoConfig", encoder, revision)
    # Weights on the meta device take no memory and no time.
    with torch.device("meta"):
        return AutoModel.from_config(getattr(config, part, config)).eval()


def max_input_tokens(encoder: str, revision: str | None) -> int:
    """Return the number of tokens that a text encoder takes, special ones included."""
    # A tokenizer without a limit of its own reports 1e30, and RoBERTa's has more positions than it
    # takes tokens, so the lower of both counts.
    limit = load_auto("AutoTokenizer", encoder, revision).model_max_length
    config = load_auto("AutoConfig", encoder, revision).get_text_config()
    return int(min(limit, getattr(config, "max_position_embeddings", None) or limit))


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors [*shape_i] to [items, *largest shape], with zeros after the shorter ones."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    if all(list(t.shape) == shape for t in tensors):
        return torch.stack(list(tensors))
    # Zeros, and not the last value: encoders get the mask of what is real.
    batch = tensors[0].new_zeros(len(tensors), *shape)
    for row, tensor in zip(batch, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return batch
