"""Items of several kinds through one encoder that puts all of them into one space."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from PIL import Image
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from multi_token.errors import RecipeError
from multi_token.media.errors import undecodable
from multi_token.media.examples import (
    EXAMPLE_TEXT,
    example_audio,
    example_image,
    example_video,
)
from multi_token.media.fetch import Fetch, shorten
from multi_token.media.image import as_rgb, decode_image, read_size
from multi_token.media.sniff import FILE_KINDS, NUM_SNIFF_BYTES, FileKind, MediaKind, sniff_kind
from multi_token.modalities.audio_chunks import feature_extractor
from multi_token.modalities.base import (
    Encoder,
    OpenAIKind,
    PretrainedModality,
    run_in_micro_batches,
    stack_padded,
)
from multi_token.modalities.image import image_processor
from multi_token.modalities.video_clips import clip_length, prepare_clip
from multi_token.types import Features, Prepared

KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
_METHODS: dict[MediaKind, tuple[str, ...]] = {
    "text": ("get_text_features", "get_text_audio_video_embeds"),
    "image": ("get_image_features",),
    "audio": ("get_audio_features", "get_audio_embeds"),
    "video": ("get_video_features",),
}
"""transformers' method of each kind into the joint space."""
_NO_LIMIT = 1_000_000
"""A tokenizer that knows no longest text says a number beyond this."""

RawItem = tuple[MediaKind, Any]


class JointEncoder(Encoder):
    """A model of several towers; each kind of item takes its own."""

    def __init__(
        self, model: Any, methods: Mapping[MediaKind, str], *, normalize: bool, micro_batch: int
    ) -> None:
        super().__init__()
        self.model = model
        self.methods = dict(methods)
        self.normalize = normalize
        self.micro_batch = micro_batch
        self.dim = -1  # known after the first forward; `build_encoder` runs one

    def forward(self, **inputs: Tensor) -> Features:
        """`<group>.index` int64 [members] and `<group>.<kind>.<input>` [members, ...], groups of
        items of one kind -> Features [items, 1, dim] in the items' own order."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in inputs.items():
            number, _, name = key.partition(".")
            groups.setdefault(number, {})[name] = value
        index = torch.cat([group.pop("index") for group in groups.values()])
        values = []
        for group in groups.values():
            kind = cast(MediaKind, next(iter(group)).partition(".")[0])
            own = {key.partition(".")[2]: value for key, value in group.items()}
            run = functools.partial(self._embed, kind)
            values.append(run_in_micro_batches(run, own, self.micro_batch))
        return Features(torch.cat(values)[index.argsort()][:, None])

    def _embed(self, kind: MediaKind, **inputs: Tensor) -> Tensor:
        """[items of one kind, dim]"""
        method = getattr(self.model, self.methods[kind])
        known = inspect.signature(method).parameters
        output = method(**{key: value for key, value in inputs.items() if key in known})
        values = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if not isinstance(values, Tensor) or values.ndim != 2:
            raise RecipeError(
                f"{type(self.model).__name__}.{self.methods[kind]} gives no single vector for an "
                "item; expected a model of one joint space (CLIP, SigLIP, CLAP, X-CLIP, PE-AV)"
            )
        return nn.functional.normalize(values, dim=-1) if self.normalize else values


class JointModality(PretrainedModality):
    """An image, sound, video or text, whichever the encoder has a tower for: one vector an item."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("image", "audio", "video", "document")
    limit_fields: ClassVar[Mapping[str, str]] = {"max_letters": "max_characters"}
    kit_example: ClassVar[str] = "multi_token.testing.joint:joint_example"

    type: Literal["joint"] = "joint"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a model with one space for several kinds: CLIP or SigLIP (images and
    texts), CLAP (sounds and texts), X-CLIP (videos and texts), PE-AV (sounds and texts)."""
    normalize: bool = True
    """Bring each vector to length 1, as these models do before they compare two."""
    max_pixels: PositiveInt = 89_478_485
    """An image or frame larger than this is refused before it is decoded."""
    max_seconds: PositiveFloat = 30.0
    """A sound or video longer than this is refused while it is decoded."""
    max_letters: PositiveInt = 10_000
    """A text longer than this is refused before it is tokenized."""

    def load(self, source: Any, fetch: Fetch) -> RawItem:
        """A row's item -> its kind and the decoded thing. Raises MediaError.

        | source                                    | kind                        |
        |-------------------------------------------|-----------------------------|
        | path, URL, data URI, bytes                | what the bytes begin like   |
        | `{"text": "a red lamp"}`                  | text, as it stands          |
        | `{"image" or "audio" or "video": source}` | the one that is named       |
        | `{"path" or "bytes": ...}`                | what the bytes begin like   |
        | `{"array": ..., "sampling_rate": 16000}`  | audio                       |
        | a PIL image                             | image                       |
        """
        kind, source = _named_kind(source)
        if kind == "image" and isinstance(source, Image.Image):
            self._check_kind(kind, "the picture")
            return kind, as_rgb(source, max_pixels=self.max_pixels)
        if kind == "text" and isinstance(source, str):
            self._check_kind(kind, "the text")
            return kind, self._checked_text(source, "the text")
        if kind == "audio" and isinstance(source, Mapping):
            self._check_kind(kind, "the audio")
            return kind, self._audio(source, fetch)
        data = fetch.read(source)
        is_name = isinstance(source, str) and source[:5].lower() != "data:"
        name = shorten(source) if is_name else ""
        kind = kind or sniff_kind(data, name=name)
        self._check_kind(kind, name or "the item")
        if kind == "image":
            return kind, decode_image(data, name=name, max_pixels=self.max_pixels)
        if kind == "audio":
            return kind, self._audio({"path": name or None, "bytes": data}, fetch)
        if kind == "video":
            return kind, self._video(data, name)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise undecodable(f"{name or 'the text'} is not UTF-8 ({error}); convert it") from None
        return kind, self._checked_text(text, name or "the text")

    def count_features(self, size: MediaKind) -> int:
        """Return 1: one vector an item, whatever its kind."""
        return 1

    def size_from_header(self, source: Any, fetch: Fetch) -> MediaKind | None:
        """Return the kind of an item, from its first bytes.

        None for texts, and for what is in memory already (a PIL image, an array).
        """
        kind, inner = _named_kind(source)
        if kind == "text" or isinstance(inner, (Image.Image, Mapping)):
            return None
        name = shorten(inner) if isinstance(inner, str) and inner[:5].lower() != "data:" else ""
        with fetch.open(inner) as file:
            kind = kind or sniff_kind(file.read(NUM_SNIFF_BYTES + 1), name=name)
            self._check_kind(kind, name or "the item")
            if kind == "image":
                file.seek(0)
                read_size(file, name=name, max_pixels=self.max_pixels)
        return None if kind == "text" else kind

    def _check_kind(self, kind: MediaKind, name: str) -> None:
        known = list(methods(self.encoder, self.revision))
        if kind not in known:
            raise undecodable(
                f"{name} is of the kind {kind}, but {self.encoder} reads {' and '.join(known)} "
                "only; leave it out, or choose an encoder that has it"
            )

    def _checked_text(self, text: str, name: str) -> str:
        if not text.strip():
            raise undecodable(f"{name} has no letters; give at least a word")
        if len(text) > self.max_letters:
            raise undecodable(
                f"{name} has {len(text):,} letters, and the limit is {self.max_letters:,}; shorten "
                "it, or read it with a modality of type `document`"
            )
        return text

    def _audio(self, source: Mapping[str, Any], fetch: Fetch) -> Any:
        from multi_token.media.audio import load_audio

        extractor = feature_extractor(self.encoder, self.revision)
        rate, seconds = extractor.sampling_rate, self.max_seconds
        window = getattr(extractor, "nb_max_samples", None)
        if window is not None:  # CLAP's own choice from a longer one is random
            seconds = min(seconds, window / rate)
        return load_audio(source, fetch, rate=rate, max_seconds=seconds)

    def _video(self, data: bytes, name: str) -> list[Image.Image]:
        from multi_token.media.video import decode_video

        num_frames = self._num_frames()
        return decode_video(
            data,
            name=name,
            num_frames=num_frames,
            max_seconds=self.max_seconds,
            max_frames=num_frames,
            max_pixels=self.max_pixels,
        )

    def _num_frames(self) -> int:
        declared, _ = clip_length(self.encoder, self.revision)
        if declared is None:
            raise RecipeError(f"{self.encoder} does not say how many frames a film of it has")
        return declared

    def example_sources(self) -> Sequence[Any]:
        """Return one item of each kind that the encoder has a tower for."""
        examples: dict[MediaKind, Callable[[], Any]] = {
            "text": lambda: EXAMPLE_TEXT,
            "image": example_image,
            "audio": example_audio,
            "video": example_video,
        }
        return [{kind: examples[kind]()} for kind in methods(self.encoder, self.revision)]

    def file_kinds(self) -> Sequence[FileKind]:
        """Return files of each kind that the encoder has a tower for."""
        return [FILE_KINDS[kind] for kind in methods(self.encoder, self.revision)]

    def size_of(self, raw: RawItem) -> dict[str, float]:
        """Return the size of the item inside, whatever its kind."""
        kind, thing = raw
        if kind != "audio":
            return super().size_of(thing)
        rate = feature_extractor(self.encoder, self.revision).sampling_rate
        return {"seconds": thing.shape[-1] / rate}

    def prepare(self, raw: RawItem) -> Prepared:
        """A kind and a decoded thing -> `<kind>.<input>` for each input of that tower.

        Raises MediaError for a text that is longer than the encoder reads.
        """
        kind, thing = raw
        if kind == "text":
            processed = self._tokenize(thing)
        elif kind == "image":
            processed = image_processor(self.encoder, self.revision)(
                images=[thing], return_tensors="pt"
            )
        elif kind == "audio":
            extractor = feature_extractor(self.encoder, self.revision)
            processed = dict(
                extractor(thing, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            )
            if "is_longer" in processed:
                # a fused CLAP's extractor marks one of a batch at random, so every one alone
                processed["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)
        else:
            processed = {"pixel_values": prepare_clip(thing, self.encoder, self.revision)[None]}
        inputs = {
            f"{kind}.{key}": value[0]
            for key, value in processed.items()
            if isinstance(value, Tensor)
        }
        return Prepared(inputs, num_features=self.count_features(kind))

    def _tokenize(self, text: str) -> Mapping[str, Any]:
        tokenizer = joint_tokenizer(self.encoder, self.revision)
        options: dict[str, Any] = {"truncation": False, "return_tensors": "pt", "verbose": False}
        inputs = tokenizer(text, padding=False, **options)
        length, limit = inputs["input_ids"].shape[1], text_limit(self.encoder, self.revision)
        if length > limit:
            raise undecodable(
                f"a text of {length} tokens was given, and {self.encoder} reads {limit}; shorten "
                "it, or read it with a modality of type `document`"
            )
        if "attention_mask" in inputs:
            return inputs
        # what knows no mask was trained with every text filled up (SigLIP)
        return tokenizer(text, padding="max_length", max_length=limit, **options)

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items of any kinds -> groups of one kind each: `<group>.index` and its inputs.

        Only texts are padded; what differs in shape otherwise stands in groups of its own, because
        convolutions look beyond a mask.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, item in enumerate(items):
            shapes = [(key, tuple(value.shape)) for key, value in item.inputs.items()]
            is_text = shapes[0][0].startswith("text.")
            groups.setdefault(("text",) if is_text else tuple(shapes), []).append(place)
        batch: dict[str, Tensor] = {}
        for number, places in enumerate(groups.values()):
            batch[f"{number}.index"] = torch.tensor(places)
            for key in items[places[0]].inputs:
                batch[f"{number}.{key}"] = stack_padded([items[p].inputs[key] for p in places])
        return batch

    def build_encoder(self) -> JointEncoder:
        from transformers import AutoModel

        towers = methods(self.encoder, self.revision)
        model = AutoModel.from_pretrained(self.encoder, revision=self.revision, dtype=torch.float32)
        encoder = JointEncoder(
            model, towers, normalize=self.normalize, micro_batch=self.micro_batch
        ).eval()
        blank = self.collate([self.prepare(self._blank(next(iter(towers))))])
        with torch.no_grad():
            encoder.dim = encoder(**blank).values.shape[-1]
        return encoder

    def _blank(self, kind: MediaKind) -> RawItem:
        """An item of nothing, to see what comes out."""
        if kind == "text":
            return kind, "a"
        picture = Image.new("RGB", (64, 64))
        if kind == "image":
            return kind, picture
        if kind == "video":
            return kind, [picture] * self._num_frames()
        rate = feature_extractor(self.encoder, self.revision).sampling_rate
        return kind, torch.zeros(rate).numpy()

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return kind and source of an item whose kind is named."""
        kind, inner = _named_kind(source)
        if kind is None or isinstance(inner, (Image.Image, Mapping)):
            return super().content(inner, fetch)
        text = kind == "text" and isinstance(inner, str)
        data = inner.encode() if text else super().content(inner, fetch)
        return f"{kind}{text}".encode() + data


@functools.lru_cache(maxsize=8)
def methods(encoder: str, revision: str | None) -> dict[MediaKind, str]:
    """The kinds that the encoder takes, and the method for each. Raises RecipeError for none."""
    from transformers import MODEL_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(encoder, revision=revision)
    known = MODEL_MAPPING.get(type(config), None)
    found: dict[MediaKind, str] = {}
    for kind, names in _METHODS.items():
        own = [name for name in names if hasattr(known, name)]
        if own:
            found[kind] = own[0]
    if not found:
        raise RecipeError(
            f"{encoder} has a {type(config).__name__}, and no tower of a joint space with it; "
            "expected a CLIP, SigLIP, CLAP, X-CLIP or PE-AV"
        )
    return found


@functools.lru_cache(maxsize=8)
def joint_tokenizer(encoder: str, revision: str | None) -> Any:
    """The encoder's own tokenizer; do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(encoder, revision=revision)


@functools.lru_cache(maxsize=8)
def text_limit(encoder: str, revision: str | None) -> int:
    """Tokens of the longest text that the encoder reads."""
    from transformers import AutoConfig

    limit = joint_tokenizer(encoder, revision).model_max_length
    if limit < _NO_LIMIT:
        return limit
    config = AutoConfig.from_pretrained(encoder, revision=revision)
    return int(config.get_text_config().max_position_embeddings)


def _named_kind(source: Any) -> tuple[MediaKind | None, Any]:
    """The kind that a source names, if it does, and the source inside."""
    if isinstance(source, Image.Image):
        return "image", source
    if not isinstance(source, Mapping):
        return None, source
    # columns of a table exist in every row: a null field is an absent one
    given = {key: value for key, value in source.items() if value is not None}
    if len(given) == 1:
        for kind in KINDS:
            if kind in given:
                return kind, given[kind]
    if "array" in given and given.keys().isdisjoint(KINDS):
        return "audio", given
    if given and given.keys() <= {"path", "bytes"}:
        return None, given.get("bytes", given.get("path"))
    raise undecodable(
        'expected a path, address, bytes, {"text": "..."} (or image, audio, video and a source), '
        'or audio as {"array": ..., "sampling_rate": ...}, got '
        + (f"the keys {', '.join(map(str, given))}" if given else "an object without a key")
    )
