"""Videos through a video encoder, clip by clip, or through any image encoder, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from os import PathLike
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from multi_token.errors import RecipeError
from multi_token.media.decoders import encoded_source
from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, shorten, source_name
from multi_token.media.frame_sampling import FrameSampling, pick_frames
from multi_token.media.video import count_frames, decode_video
from multi_token.modalities.base import Encoder, OpenAIKind, PretrainedModality
from multi_token.modalities.image import (
    ANY_SIZE,
    FeatureKind,
    ImageEncoder,
    ImageModality,
    Layers,
)
from multi_token.modalities.parts import collate_parts, gather_features, index_features
from multi_token.modalities.video_clips import (
    ClipEncoder,
    clip_length,
    clip_shape,
    num_clip_features,
    prepare_clip,
)
from multi_token.types import Features, Prepared

_KEYS = {"path", "bytes", "array", "fps", "start", "end"}


class VideoEncoder(Encoder):
    """Encodes all frames, or clips, of all items together, and returns those of each in order."""

    def __init__(self, parts: ImageEncoder | ClipEncoder, *, normalize: bool) -> None:
        super().__init__()
        self.parts = parts
        self.normalize = normalize
        self.dim = parts.dim

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the frames or clips of all items: `pixel_values` [frames or clips, ...] and other
        inputs of the processor; `part` and `feature` int64 [items, length] (parts.py).
        """
        part, feature = inputs.pop("part"), inputs.pop("feature")
        values = self.parts(**inputs).values
        # Before the features are laid out, so that padding stays zero.
        if self.normalize:
            values = nn.functional.normalize(values, dim=-1)
        return gather_features(values, part, feature)

    def layers(self) -> Sequence[nn.Module]:
        """Return the layers of the encoder of frames or clips."""
        return self.parts.layers()


class VideoModality(PretrainedModality):
    """A video: MP4, WebM, GIF and others, an array of frames, or a list of images.

    Frames are taken evenly over the item, `num_frames` of it or `fps` of each second. Each frame,
    or each clip of `num_frames`, becomes one vector or one feature per patch (`features`), as
    [length, dim] in order of time.
    """

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("video",)
    requires: ClassVar[tuple[str, ...]] = ("av",)
    install_extra: ClassVar[str] = "multi_token[video]"
    kit_example: ClassVar[str] = "multi_token.testing.examples:video_example"

    type: Literal["video"] = "video"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a video encoder (X-CLIP, VideoMAE, V-JEPA 2, ...) or of an image
    encoder (CLIP, SigLIP, DINOv2, ...)."""
    read_as: Literal["frames", "clip"] = "frames"
    """`frames`: one frame at a time, for an image encoder; `clip`: several frames at once, for a
    video encoder."""
    num_frames: PositiveInt = 8
    """Number of frames, taken evenly over the item. Many video encoders take one number only."""
    fps: PositiveFloat | None = None
    """Frames per second to take instead of `num_frames`, so that a longer item has more tokens. A
    video encoder gets them in clips of `num_frames`; the last clip is padded with its last
    frame."""
    features: FeatureKind = "pooled"
    """Features per frame or clip. `pooled`: the model's own pooled vector, or embedding of a clip;
    `mean`: the mean of the patches; `cls`: the CLS token; `patches`: one feature per patch; `all`:
    patches, CLS and registers."""
    layer: Layers = None
    """Hidden state to take, counted as transformers does (-1 is the last). A list takes several and
    joins them in each feature."""
    normalize: bool = False
    """Scale each feature to length 1, as X-CLIP does before it compares embeddings."""
    max_seconds: PositiveFloat = 600.0
    """Longest part of an item to read, in seconds. A longer one is refused before decoding."""
    max_frames: PositiveInt = 128
    """Largest number of frames to take. With `fps`, a longer item is taken at fewer frames a
    second."""
    max_pixels: PositiveInt = 8_847_360
    """Largest number of pixels in a frame. A larger video is refused before decoding."""

    @model_validator(mode="after")
    def _check_frames(self) -> VideoModality:
        if self.projector.line_break:
            raise ValueError("`line_break` in the projector is for images with `tile_grids`")
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"`num_frames` ({self.num_frames}) is over `max_frames` ({self.max_frames}); raise "
                "the one or lower the other"
            )
        return self

    def load(self, source: Any, fetch: Fetch) -> list[Image.Image]:
        """Return the RGB frames that are taken of a video.

        | source                                  | meaning                                 |
        |-----------------------------------------|-----------------------------------------|
        | path, URL, data URI, bytes              | a video file                            |
        | array uint8 [frames, height, width, 3]  | RGB frames                              |
        | list of images, paths or PDF pages      | one frame each                          |
        | `{"path": ..., "start": 2, "end": 5.5}` | seconds 2 to 5.5; also `bytes`, `array` |
        | `{"array": ..., "fps": 25}`             | frames with times                       |
        | a decoder of torchcodec                 | the file that it reads, or its frames   |

        Raises:
            MediaError: The source cannot be read or decoded, or is over a limit.
        """
        source, rate, sampling = self._unpack(source)
        if isinstance(source, np.ndarray):
            taken = pick_frames(source, sampling, rate=rate)  # type: ignore[reportArgumentType]
            return [Image.fromarray(frame) for frame in taken]
        if isinstance(source, list):
            places = pick_frames(range(len(source)), sampling, rate=rate)
            # A short list gives a frame several times; each is decoded once.
            read = {place: self._image.load(source[place], fetch) for place in sorted(set(places))}
            return [read[place] for place in places]
        if rate is not None:
            raise undecodable(
                "`fps` beside a video file is not for the row: the file has its own; set `fps` "
                "in the recipe to choose how many frames are taken"
            )
        return decode_video(
            fetch.read(source), sampling, name=source_name(source), max_pixels=self.max_pixels
        )

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of frames that `load` takes.

        With `fps` a file's packets are read, but not decoded. Raises MediaError as `load`.
        """
        source, rate, sampling = self._unpack(source)
        if isinstance(source, (np.ndarray, list)):
            places = pick_frames(range(len(source)), sampling, rate=rate)
            if isinstance(source, list):
                for place in sorted(set(places)):
                    self._image.size_from_header(source[place], fetch)
            return len(places)
        if rate is not None:
            return None
        with fetch.open(source) as file:
            return count_frames(
                file, sampling, name=source_name(source), max_pixels=self.max_pixels
            )

    def _unpack(self, source: Any) -> tuple[Any, float | None, FrameSampling]:
        """A source as file, array or list; frames per second of the latter two; what to take."""
        rate, start, end = None, None, None
        source = encoded_source(source)
        if isinstance(source, Mapping):
            source, rate, start, end = _parse_mapping(source)
        if isinstance(source, Tensor):
            source = source.detach().cpu().numpy()
        if isinstance(source, np.ndarray):
            _check_array(source, self.max_pixels)
        elif isinstance(source, (list, tuple)):
            source = list(source)
            _check_images(source)
        # `fps` wins, because `num_frames` has a default and `fps` has none.
        num_frames = None if self.fps else self.num_frames
        return (
            source,
            rate,
            FrameSampling(num_frames, self.fps, start, end, self.max_seconds, self.max_frames),
        )

    def count_features(self, size: int) -> int | None:
        """Return the number of features of an item of `size` frames.

        None if the features of a frame depend on its size or shape.
        """
        num_each = self._num_each()
        return None if num_each is None else self._num_parts(size) * num_each

    def _num_parts(self, num_frames: int) -> int:
        """Frames, or clips with the last one padded."""
        return math.ceil(num_frames / (self.num_frames if self.read_as == "clip" else 1))

    def _num_each(self) -> int | None:
        """Features of a frame, or of a clip, if all have the same number. Raises RecipeError."""
        self._check_encoder()
        tower = self._image.tower
        if not tower.has_patches:
            return 1
        if self.read_as == "frames":
            return self._image.count_features(ANY_SIZE)
        shape = clip_shape(self.encoder, self.revision, self.num_frames)
        return None if shape is None else num_clip_features(tower, shape)

    def prepare(self, raw: Sequence[Image.Image]) -> Prepared:
        """Run the encoder's own processor on RGB frames.

        Returns:
            `pixel_values` [frames or clips, ...], `part`, `feature` int64 [length].

        Raises:
            RecipeError: The encoder does not take what `read_as` says.
        """
        self._check_encoder()
        if self.read_as == "clip":
            inputs, num_each = self._prepare_clips(raw)
        else:
            # Once, since building it validates its fields.
            image = self._image
            items = [image.prepare(frame) for frame in raw]
            inputs, num_each = image.collate(items), items[0].num_features
        inputs |= index_features([num_each] * len(inputs["pixel_values"]))
        return Prepared(inputs, num_features=len(inputs["part"]))

    def _prepare_clips(self, frames: Sequence[Image.Image]) -> tuple[dict[str, Tensor], int]:
        """`pixel_values` [clips, frames, channels, height, width], and the features of each."""
        num_clips = self._num_parts(len(frames))
        missing = num_clips * self.num_frames - len(frames)
        pixels = prepare_clip(frames, self.encoder, self.revision)
        # The last frame again, as a player shows it; black frames would be another scene.
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
        clips = pixels.unflatten(0, (num_clips, self.num_frames))
        tower = self._image.tower
        num_each = num_clip_features(tower, tuple(clips.shape[1:])) if tower.has_patches else 1
        return {"pixel_values": clips}, num_each

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch, in which all frames, or clips, are encoded together."""
        return collate_parts(items)

    def build_encoder(self) -> VideoEncoder:
        """Return the encoder of frames or clips; towers that make no features are dropped.

        Raises:
            RecipeError: The encoder does not take what `read_as` and `features` say.
        """
        self._check_encoder()
        if self.read_as == "frames":
            return VideoEncoder(self._image.build_encoder(), normalize=self.normalize).eval()
        clips = ClipEncoder(
            self.load_tower(),
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
        ).eval()
        # A blank clip shows which modules run, and the width of the features.
        blank = [Image.new("RGB", (64, 64))] * self.num_frames
        clips.drop_unused(prepare_clip(blank, self.encoder, self.revision)[None])
        return VideoEncoder(clips, normalize=self.normalize).eval()

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """Return bytes that are equal only for equal items; a list counts by each image in it."""
        if isinstance(source, (list, tuple)):
            # Named: zero-argument super() is not bound inside a comprehension before Python 3.12.
            digests = [sha256(super(VideoModality, self).content(s, fetch)) for s in source]
            return b"frames" + b"".join(digest.digest() for digest in digests)
        if isinstance(source, Mapping) and isinstance(source.get("array"), (list, tuple)):
            source = {**source, "array": self.content(source["array"], fetch)}
        return super().content(source, fetch)

    def with_limits(self, limits: Mapping[str, float]) -> Self:
        """Return a copy within a server's limits.

        `max_frames` is never below `num_frames`, which the encoder was trained with.
        `max_video_pixels` bounds all frames of an item together, so it lowers `max_pixels`.
        """
        lowered = super().with_limits(limits)
        max_frames = max(lowered.max_frames, self.num_frames)
        most = max_frames if self.fps else self.num_frames
        # At least 1, since the field is positive and the copy is not validated.
        of_a_frame = max(1, int(limits.get("max_video_pixels", math.inf) // most))
        max_pixels = min(lowered.max_pixels, of_a_frame)
        return lowered.model_copy(update={"max_frames": max_frames, "max_pixels": max_pixels})

    @property
    def _image(self) -> ImageModality:
        """The modality of one frame."""
        return ImageModality(
            encoder=self.encoder,
            revision=self.revision,
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
            max_pixels=self.max_pixels,
        )

    def _check_encoder(self) -> None:
        declared, fixed = clip_length(self.encoder, self.revision)
        # A video encoder would accept single frames and give meaningless features.
        if self.read_as == "frames" and declared is not None:
            raise RecipeError(
                f"{self.encoder} takes clips of {declared} frames, not single ones; set `read_as: "
                f"clip` and `num_frames: {declared}`"
            )
        if self.read_as == "clip" and declared is None:
            raise RecipeError(
                f"{self.encoder} declares no number of frames, so it takes single images; set "
                "`read_as: frames`, or name a video encoder"
            )
        if self.read_as == "clip" and fixed and declared != self.num_frames:
            raise RecipeError(
                f"{self.encoder} takes clips of {declared} frames, the recipe has {self.num_frames}"
                f"; set `num_frames: {declared}`"
            )


def _parse_mapping(source: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """The source in a mapping, and its `fps`, `start` and `end`."""
    given = [key for key in ("path", "bytes", "array") if source.get(key) is not None]
    if len(given) != 1 or not source.keys() <= _KEYS:
        raise undecodable(
            "expected one of `path`, `bytes` and `array` for a video, and optionally `start`, "
            f"`end` and `fps`, got {', '.join(map(repr, source)) or 'nothing'}"
        )
    numbers = {key: source.get(key) for key in ("fps", "start", "end")}
    for key, value in numbers.items():
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and (not is_number or (key == "fps" and value <= 0)):
            unit = "frames a second" if key == "fps" else "seconds"
            raise undecodable(f"expected {unit} as a number in `{key}` of a video, got {value!r}")
    return source[given[0]], numbers["fps"], numbers["start"], numbers["end"]


def _check_array(array: np.ndarray, max_pixels: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise undecodable(
            "expected RGB frames uint8 [frames, height, width, 3] for a video, got "
            f"{array.dtype} {list(array.shape)}; convert them"
        )
    height, width = array.shape[1:3]
    if not 0 < height * width <= max_pixels:
        raise undecodable(
            f"the frames of an array are {width} x {height} pixels, and the limit is "
            f"{max_pixels:,}; make them smaller, or raise max_pixels"
        )


def _check_images(sources: Sequence[Any]) -> None:
    for place, source in enumerate(sources):
        # A mapping is a page of a PDF.
        if not isinstance(source, (str, bytes, PathLike, Image.Image, Mapping)):
            raise undecodable(
                "expected images or their paths in the list of frames of a video, got "
                f"{shorten(repr(source))} at place {place}"
            )
