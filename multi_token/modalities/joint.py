"""Items of several kinds through one encoder that maps all of them into one space."""

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
from multi_token.media.audio import load_audio
from multi_token.media.errors import undecodable
from multi_token.media.examples import EXAMPLE_TEXT, example_audio, example_image, example_video
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.frame_sampling import FrameSampling
from multi_token.media.image import MAX_PIXELS, as_rgb, decode_image, read_size
from multi_token.media.sniff import FILE_KINDS, NUM_SNIFF_BYTES, FileKind, MediaKind, sniff_kind
from multi_token.media.video import decode_video
from multi_token.modalities.base import (
    Encoder,
    OpenAIKind,
    PretrainedModality,
    load_auto,
    max_input_tokens,
    stack_padded,
)
from multi_token.modalities.parts import run_in_micro_batches
from multi_token.modalities.video_clips import clip_length, prepare_clip
from multi_token.types import Features, Prepared

KINDS: tuple[MediaKind, ...] = get_args(MediaKind)
_METHODS: dict[MediaKind, tuple[str, ...]] = {
    "text": ("get_text_features", "get_text_audio_video_embeds"),
    "image": ("get_image_features",),
    "audio": ("get_audio_features", "get_audio_embeds"),
    "video": ("get_video_features",),
}
"""Methods of transformers that map each kind into the joint space."""

RawItem = tuple[MediaKind, Any]


class JointEncoder(Encoder):
    """A model of several towers; each kind of item goes through its own."""

    def __init__(self, model: Any, modality: JointModality) -> None:
        super().__init__()
        self.model = model
        self.modality = modality
        self.methods = methods(modality.encoder, modality.revision)
        self.dim = -1  # known after the first forward, which `build_encoder` runs

    def forward(self, **inputs: Tensor) -> Features:
        """Encode groups of items of one kind: `<group>.index` int64 [members] and
        `<group>.<kind>.<input>` [members, ...].

        The features [items, 1, dim] are in the order of the items.
        """
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in inputs.items():
            # A batch is a flat mapping of tensors, so the group is in the key.
            number, _, name = key.partition(".")
            groups.setdefault(number, {})[name] = value
        index = torch.cat([group.pop("index") for group in groups.values()])
        values = []
        for group in groups.values():
            kind = cast(MediaKind, next(iter(group)).partition(".")[0])
            own = {key.partition(".")[2]: value for key, value in group.items()}
            run = functools.partial(self._embed, kind)
            values.append(run_in_micro_batches(run, own, self.modality.micro_batch))
        # Groups are in another order than items; argsort of a permutation is its inverse.
        return Features(torch.cat(values)[index.argsort()][:, None])

    def _embed(self, kind: MediaKind, **inputs: Tensor) -> Tensor:
        """Embeddings [items of one kind, dim]."""
        method = getattr(self.model, self.methods[kind])
        # Processors return more than the methods take, such as the token types of a BERT tokenizer.
        known = inspect.signature(method).parameters
        output = method(**{key: value for key, value in inputs.items() if key in known})
        values = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
        if not isinstance(values, Tensor) or values.ndim != 2:
            raise RecipeError(
                f"{type(self.model).__name__}.{self.methods[kind]} gives no single vector per item;"
                " expected a model of one joint space (CLIP, SigLIP, CLAP, X-CLIP, PE-AV)"
            )
        return nn.functional.normalize(values, dim=-1) if self.modality.normalize else values


class JointModality(PretrainedModality):
    """An image, audio, video or text, whichever the encoder has a tower for: one vector an item.

    The vector [1, dim] is the item's embedding in the joint space, of length 1 by default. Sources:
    CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343), CLAP (arXiv:2211.06687), X-CLIP
    (arXiv:2208.02816).
    """

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("image", "audio", "video", "document")
    limit_fields: ClassVar[Mapping[str, str]] = {"max_letters": "max_characters"}
    kit_example: ClassVar[str] = "multi_token.testing.examples:joint_example"

    type: Literal["joint"] = "joint"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a model with one space for several kinds: CLIP or SigLIP (images and
    texts), CLAP (audio and texts), X-CLIP (videos and texts), PE-AV (audio and texts)."""
    normalize: bool = True
    """Scale each vector to length 1, as these models do before they compare two."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Largest number of pixels in an image or frame. A larger one is refused before decoding."""
    max_seconds: PositiveFloat = 30.0
    """Longest audio or video in seconds. A longer one is refused while it is decoded."""
    max_letters: PositiveInt = 10_000
    """Largest number of characters in a text. A longer one is refused before it is tokenized."""

    def load(self, source: Any, fetch: Fetch) -> RawItem:
        """Return the kind of an item and the decoded item.

        | source                                    | kind                            |
        |-------------------------------------------|---------------------------------|
        | path, URL, data URI, bytes                | by the first bytes              |
        | `{"text": "a red lamp"}`                  | text, unchanged                 |
        | `{"image" or "audio" or "video": source}` | the named one                   |
        | `{"path" or "bytes": ...}`                | by the first bytes              |
        | `{"array": ..., "sampling_rate": 16000}`  | audio                           |
        | a PIL image                               | image                           |

        Raises:
            MediaError: The item cannot be read, is over a limit, or is of a kind that the encoder
                has no tower for.
        """
        kind, source = _named_kind(source)
        if kind == "image" and isinstance(source, Image.Image):
            self._check_kind(kind, "the image")
            return kind, as_rgb(source, max_pixels=self.max_pixels)
        if kind == "text" and isinstance(source, str):
            self._check_kind(kind, "the text")
            return kind, self._checked_text(source, "the text")
        if kind == "audio" and isinstance(source, Mapping):
            self._check_kind(kind, "the audio")
            return kind, self._load_audio(source, fetch)
        data, name = fetch.read(source), source_name(source)
        kind = kind or sniff_kind(data, name=name)
        self._check_kind(kind, name or f"the {kind}")
        if kind == "image":
            return kind, decode_image(data, name=name, max_pixels=self.max_pixels)
        if kind == "audio":
            return kind, self._load_audio({"path": name or None, "bytes": data}, fetch)
        if kind == "video":
            num_frames = self._num_frames()
            sampling = FrameSampling(num_frames, max_seconds=self.max_seconds)
            return kind, decode_video(data, sampling, name=name, max_pixels=self.max_pixels)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise undecodable(f"{name or 'the text'} is not UTF-8 ({error}); convert it") from None
        return kind, self._checked_text(text, name or "the text")

    def count_features(self, size: MediaKind) -> int:
        """Return 1: one vector per item, of any kind."""
        return 1

    def size_from_header(self, source: Any, fetch: Fetch) -> MediaKind | None:
        """Return the kind of an item, from its first bytes.

        None for texts, and for items in memory (a PIL image, an array). Raises MediaError as
        `load`.
        """
        kind, inner = _named_kind(source)
        if kind == "text" or isinstance(inner, (Image.Image, Mapping)):
            return None
        name = source_name(inner)
        with fetch.open(inner) as file:
            # One byte more than is looked at tells if a text ends there.
            kind = kind or sniff_kind(file.read(NUM_SNIFF_BYTES + 1), name=name)
            self._check_kind(kind, name or f"the {kind}")
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
                "it, or use a modality of type `document` for it"
            )
        return text

    def _load_audio(self, source: Mapping[str, Any], fetch: Fetch) -> Any:
        extractor = self.auto("AutoFeatureExtractor")
        rate, seconds = extractor.sampling_rate, self.max_seconds
        window = getattr(extractor, "nb_max_samples", None)
        if window is not None:  # CLAP crops a longer audio at a random place
            seconds = min(seconds, window / rate)
        return load_audio(source, fetch, rate=rate, max_seconds=seconds)

    def _num_frames(self) -> int:
        declared, _ = clip_length(self.encoder, self.revision)
        if declared is None:
            raise RecipeError(f"{self.encoder} declares no number of frames per video")
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
        """Return the size of the decoded item, of any kind."""
        kind, item = raw
        if kind != "audio":
            return super().size_of(item)
        return {"seconds": item.shape[-1] / self.auto("AutoFeatureExtractor").sampling_rate}

    def prepare(self, raw: RawItem) -> Prepared:
        """Run the processor of the item's kind.

        Returns:
            `<kind>.<input>` for each input of that tower; one feature.

        Raises:
            MediaError: A text has more tokens than the encoder reads.
        """
        kind, item = raw
        if kind == "text":
            processed = self._tokenize(item)
        elif kind == "image":
            processed = self.auto("AutoImageProcessor")(images=[item], return_tensors="pt")
        elif kind == "audio":
            extractor = self.auto("AutoFeatureExtractor")
            processed = dict(
                extractor(item, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            )
            if "is_longer" in processed:
                # The extractor of a fused CLAP marks one of a batch at random, so any single item.
                processed["is_longer"] = torch.zeros(1, 1, dtype=torch.bool)
        else:
            processed = {"pixel_values": prepare_clip(item, self.encoder, self.revision)[None]}
        inputs = {
            f"{kind}.{key}": value[0]
            for key, value in processed.items()
            if isinstance(value, Tensor)
        }
        return Prepared(inputs, num_features=self.count_features(kind))

    def _tokenize(self, text: str) -> Mapping[str, Any]:
        tokenizer = self.auto("AutoTokenizer")
        options: dict[str, Any] = {"truncation": False, "return_tensors": "pt", "verbose": False}
        inputs = tokenizer(text, padding=False, **options)
        length, limit = inputs["input_ids"].shape[1], max_input_tokens(self.encoder, self.revision)
        if length > limit:
            raise undecodable(
                f"a text of {length} tokens was given, and {self.encoder} reads {limit}; shorten "
                "it, or use a modality of type `document` for it"
            )
        if "attention_mask" in inputs:
            return inputs
        # A tower without a mask was trained with every text padded to the full length (SigLIP).
        return tokenizer(text, padding="max_length", max_length=limit, **options)

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into groups of one kind each.

        Returns:
            `<group>.index` int64 [members], the items of a group, and `<group>.<kind>.<input>`
            [members, ...].
        """
        # Only texts are padded. Other items of different shapes are in groups of their own, because
        # a convolution reads padding in spite of a mask.
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
        """Return the model with all its towers."""
        encoder = JointEncoder(self.load_tower(), self).eval()
        # All kinds give vectors of one width, so the first one will do.
        example = self.load(self.example_sources()[0], Fetch(allow_paths=False))
        encoder.dim = self.output_dim(encoder, example)
        return encoder

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return bytes that are equal only for equal items, with the kind that a source names."""
        kind, inner = _named_kind(source)
        if kind is None or isinstance(inner, (Image.Image, Mapping)):
            return super().content(inner, fetch)
        text = kind == "text" and isinstance(inner, str)
        # With the kind, because one file may be an item of two kinds.
        data = inner.encode() if text else super().content(inner, fetch)
        return f"{kind}{text}".encode() + data


@functools.lru_cache(maxsize=8)
def methods(encoder: str, revision: str | None) -> dict[MediaKind, str]:
    """Return the encoder's method for each kind that it takes. Raises RecipeError for none."""
    from transformers import MODEL_MAPPING

    config = load_auto("AutoConfig", encoder, revision)
    # The class alone tells its methods, without an instance and its weights.
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


def _named_kind(source: Any) -> tuple[MediaKind | None, Any]:
    """The kind that a source names, None if it names none, and the source inside."""
    if isinstance(source, Image.Image):
        return "image", source
    if not isinstance(source, Mapping):
        return None, source
    # A table has every column in every row, so a null field is an absent one.
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
        'expected a path, URL, bytes, {"text": "..."} (or image, audio, video and a source), '
        'or audio as {"array": ..., "sampling_rate": ...}, got '
        + (f"the keys {', '.join(map(str, given))}" if given else "an object without a key")
    )
