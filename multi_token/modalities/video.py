"""Videos through a video encoder, clip by clip, or through any image encoder, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from os import PathLike
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from multi_token.errors import MediaError, RecipeError
from multi_token.media.fetch import Fetch, shorten
from multi_token.media.frame_sampling import pick_frames
from multi_token.media.video import count_frames, decode_video
from multi_token.modalities.anyres import arrange, collate_tiles
from multi_token.modalities.base import Encoder, OpenAIKind, PretrainedModality
from multi_token.modalities.image import ANY_SIZE, FeatureKind, ImageEncoder, ImageModality, Layers
from multi_token.modalities.video_clips import (
    ClipEncoder,
    build_clip_encoder,
    clip_length,
    clip_shape,
    num_clip_features,
    prepare_clip,
)
from multi_token.types import Features, Prepared

_KEYS = {"path", "bytes", "array", "fps", "start", "end"}


class VideoEncoder(Encoder):
    """Encodes all frames, or clips, of all items, and puts those of an item in a row."""

    def __init__(self, parts: ImageEncoder | ClipEncoder, *, normalize: bool) -> None:
        super().__init__()
        self.parts = parts
        self.normalize = normalize
        self.dim = parts.dim

    def forward(self, **inputs: Tensor) -> Features:
        """`pixel_values` [frames or clips, ...] and whatever else the processor made of them.

        `tile` and `patch` int64 [items, length] say which frame or clip, and which feature of it,
        each feature of an item is (see tiles.py).
        """
        tile, patch = inputs.pop("tile"), inputs.pop("patch")
        values = self.parts(**inputs).values
        if self.normalize:
            values = nn.functional.normalize(values, dim=-1)
        return replace(arrange(values, tile, patch), newlines=None)

    def layers(self) -> Sequence[nn.Module]:
        """Those of the frames' or the clips' encoder."""
        return self.parts.layers()


class VideoModality(PretrainedModality):
    """A video: MP4, WebM, GIF and others, an array of frames, or a list of images."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("video",)
    requires: ClassVar[tuple[str, ...]] = ("av",)
    install_extra: ClassVar[str] = "multi_token[video]"
    kit_example: ClassVar[str] = "multi_token.testing.video:video_example"

    type: Literal["video"] = "video"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a video encoder (X-CLIP, VideoMAE, V-JEPA 2, ...) or of an image
    encoder (CLIP, SigLIP, DINOv2, ...)."""
    read_as: Literal["frames", "clip"] = "frames"
    """`frames`: each frame by itself, for an image encoder; `clip`: several frames at once, for a
    video encoder."""
    num_frames: PositiveInt = 8
    """Frames taken, evenly over the item; many video encoders take one number only."""
    fps: PositiveFloat | None = None
    """Frames taken of each second instead, so that a longer item has more tokens. A video encoder
    gets them as clips of `num_frames`, the last filled up with its last frame."""
    features: FeatureKind = "pooled"
    """Features per frame or clip: `pooled`: the model's own pooled vector, or embedding of a clip;
    `mean`: of the patches; `cls`: the CLS token; `patches`: one feature a patch; `all`: CLS and
    registers too."""
    layer: Layers = None
    """Hidden state to take, counted as transformers does (-1 the last), or a list: several joined
    in each feature."""
    normalize: bool = False
    """Bring each feature to length 1, as X-CLIP does before it compares embeddings."""
    max_seconds: PositiveFloat = 600.0
    """An item with more to read is refused before it is decoded."""
    max_frames: PositiveInt = 128
    """Frames taken at most: with `fps`, a longer item is taken at fewer frames a second."""
    max_pixels: PositiveInt = 8_847_360
    """A video with larger frames is refused before it is decoded."""

    @model_validator(mode="after")
    def _check_frames(self) -> VideoModality:
        if self.projector.line_break:
            raise ValueError("`line_break` in the projector is for pictures with `tile_grids`")
        if self.num_frames > self.max_frames:
            raise ValueError(
                f"`num_frames` ({self.num_frames}) is over `max_frames` ({self.max_frames}); raise "
                "the one or lower the other"
            )
        return self

    def load(self, source: Any, fetch: Fetch) -> list[Image.Image]:
        """A video, and which part of it -> the RGB frames that are taken. Raises MediaError.

        | source                                  | what it is                              |
        |-----------------------------------------|-----------------------------------------|
        | path, URL, data URI, bytes              | a video file                            |
        | array uint8 [frames, height, width, 3]  | RGB frames                              |
        | list of images, or of their paths     | one frame each                          |
        | `{"path": ..., "start": 2, "end": 5.5}` | seconds 2 to 5.5; also `bytes`, `array` |
        | `{"array": ..., "fps": 25}`             | frames that have times                  |
        """
        source, rate, options = self._asked(source)
        if isinstance(source, np.ndarray):
            _check_array(source, self.max_pixels)
            taken = pick_frames(source, rate=rate, **options)  # type: ignore[reportArgumentType]
            return [Image.fromarray(frame) for frame in taken]
        if isinstance(source, (list, tuple)):
            _check_pictures(source)
            image = ImageModality(encoder=self.encoder, max_pixels=self.max_pixels)
            # each is read once, however often it is taken
            places = pick_frames(range(len(source)), rate=rate, **options)
            read = {place: image.load(source[place], fetch) for place in sorted(set(places))}
            return [read[place] for place in places]
        if rate is not None:
            raise MediaError(
                "`fps` beside a video file is not for the row: the file knows its own; give `fps` "
                "in the recipe to choose how many frames are taken",
                kind="undecodable",
            )
        name = source if isinstance(source, str) and not source.startswith("data:") else ""
        data = fetch.read(source)
        return decode_video(data, name=name, max_pixels=self.max_pixels, **options)

    def _asked(self, source: Any) -> tuple[Any, float | None, dict[str, Any]]:
        """Return the source, frames per second of an array, and the frames to sample."""
        options: dict[str, Any] = {"start": None, "end": None}
        rate = None
        if isinstance(source, Mapping):
            source, rate, options = _parse_source(source)
        if isinstance(source, Tensor):
            source = source.detach().cpu().numpy()
        options |= {
            "num_frames": None if self.fps else self.num_frames,
            "fps": self.fps,
            "max_seconds": self.max_seconds,
            "max_frames": self.max_frames,
        }
        return source, rate, options

    def count_features(self, size: int) -> int | None:
        """Return the features of an item of `size` frames.

        None if a frame has more features the larger it is, or in another shape.
        """
        num_each = self._num_each()
        return None if num_each is None else self._num_parts(size) * num_each

    def _num_parts(self, num_frames: int) -> int:
        """Frames, or clips with the last one filled up."""
        return math.ceil(num_frames / (self.num_frames if self.read_as == "clip" else 1))

    def size_from_header(self, source: Any, fetch: Fetch) -> int | None:
        """Return the number of frames that `load` takes.

        `num_frames`, or with `fps` as many as the item's packets tell, undecoded. Raises
        MediaError.
        """
        source, rate, options = self._asked(source)
        if isinstance(source, np.ndarray):
            _check_array(source, self.max_pixels)
            return len(pick_frames(range(len(source)), rate=rate, **options))
        if isinstance(source, (list, tuple)):
            _check_pictures(source)
            image = ImageModality(encoder=self.encoder, max_pixels=self.max_pixels)
            places = pick_frames(range(len(source)), rate=rate, **options)
            for place in sorted(set(places)):
                image.size_from_header(source[place], fetch)
            return len(places)
        if rate is not None:
            return None
        name = source if isinstance(source, str) and not source.startswith("data:") else ""
        with fetch.open(source) as file:
            return count_frames(file, name=name, max_pixels=self.max_pixels, **options)

    def _num_each(self) -> int | None:
        """Features of a frame, or of a clip, if all have as many. Raises RecipeError."""
        self._check_encoder()
        if self.features not in ("patches", "all"):
            return 1
        if self.read_as == "frames":
            return self._image().count_features(ANY_SIZE)
        shape = clip_shape(self.encoder, self.revision, self.num_frames)
        if shape is None:
            return None
        return num_clip_features(self.encoder, self.revision, self.layer, self.features, shape)

    def prepare(self, raw: Any) -> Prepared:
        """RGB frames -> `pixel_values` [frames or clips, ...], `tile`, `patch` int64 [length].

        Raises RecipeError for an encoder that does not read what `read_as` says.
        """
        self._check_encoder()
        if self.read_as == "clip":
            inputs, num_each = self._clips(raw)
        else:
            image = self._image()
            items = [image.prepare(frame) for frame in raw]
            inputs, num_each = image.collate(items), items[0].num_features
        part = torch.arange(len(inputs["pixel_values"]))
        inputs["tile"] = part.repeat_interleave(num_each)
        inputs["patch"] = torch.arange(num_each).repeat(len(part))
        return Prepared(inputs, num_features=len(inputs["tile"]))

    def _clips(self, frames: Sequence[Image.Image]) -> tuple[dict[str, Tensor], int]:
        """pixel_values [clips, frames, channels, height, width], and the features of each."""
        num_clips = self._num_parts(len(frames))
        missing = num_clips * self.num_frames - len(frames)
        pixels = prepare_clip(frames, self.encoder, self.revision)
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])])
        clips = pixels.unflatten(0, (num_clips, self.num_frames))
        if self.features not in ("patches", "all"):
            return {"pixel_values": clips}, 1
        shape = tuple(clips.shape[1:])
        return {"pixel_values": clips}, num_clip_features(
            self.encoder, self.revision, self.layer, self.features, shape
        )

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items -> one batch: all frames, or clips, of all items stand in one."""
        batch = collate_tiles(items)
        for key in items[0].inputs.keys() - batch.keys():
            batch[key] = torch.cat([item.inputs[key] for item in items])
        return batch

    def build_encoder(self) -> VideoEncoder:
        self._check_encoder()
        if self.read_as == "frames":
            return VideoEncoder(self._image().build_encoder(), normalize=self.normalize).eval()
        clips = build_clip_encoder(
            self.encoder,
            self.revision,
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
            num_frames=self.num_frames,
        )
        return VideoEncoder(clips, normalize=self.normalize).eval()

    def content(self, source: Any, fetch: Fetch) -> bytes:
        """A list of images or paths counts by what is in each."""
        if isinstance(source, (list, tuple)):
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
        of_a_frame = max(1, int(limits.get("max_video_pixels", math.inf) // most))
        max_pixels = min(lowered.max_pixels, of_a_frame)
        return lowered.model_copy(update={"max_frames": max_frames, "max_pixels": max_pixels})

    def _image(self) -> ImageModality:
        """The reader of one frame."""
        return ImageModality(
            encoder=self.encoder,
            revision=self.revision,
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
        )

    def _check_encoder(self) -> None:
        declared, fixed = clip_length(self.encoder, self.revision)
        if self.read_as == "frames" and declared is not None:
            raise RecipeError(
                f"{self.encoder} takes clips of {declared} frames, not single ones; set `read_as: "
                f"clip` and `num_frames: {declared}`"
            )
        if self.read_as == "clip" and declared is None:
            raise RecipeError(
                f"{self.encoder} declares no number of frames, so it takes single pictures; set "
                "`read_as: frames`, or name a video encoder"
            )
        if self.read_as == "clip" and fixed and declared != self.num_frames:
            raise RecipeError(
                f"{self.encoder} takes clips of {declared} frames, the recipe has {self.num_frames}"
                f"; set `num_frames: {declared}`"
            )


def _parse_source(source: Mapping[str, Any]) -> tuple[Any, float | None, dict[str, Any]]:
    """A mapping -> what to read, frames a second of an array, and the section of it."""
    given = [key for key in ("path", "bytes", "array") if source.get(key) is not None]
    if len(given) != 1 or not source.keys() <= _KEYS:
        raise MediaError(
            "expected one of `path`, `bytes` and `array` for a video, and at will `start`, `end` "
            f"and `fps`, got {', '.join(map(repr, source)) or 'nothing'}",
            kind="undecodable",
        )
    numbers = {key: source.get(key) for key in ("start", "end", "fps")}
    for key, value in numbers.items():
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if value is not None and (not is_number or (key == "fps" and value <= 0)):
            unit = "frames a second" if key == "fps" else "seconds"
            raise MediaError(
                f"expected {unit} as a number in `{key}` of a video, got {value!r}",
                kind="undecodable",
            )
    rate = numbers.pop("fps")
    return source[given[0]], rate, numbers


def _check_array(array: np.ndarray, max_pixels: int) -> None:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise MediaError(
            "expected RGB frames uint8 [frames, height, width, 3] for a video, got "
            f"{array.dtype} {list(array.shape)}; convert them",
            kind="undecodable",
        )
    height, width = array.shape[1:3]
    if not 0 < height * width <= max_pixels:
        raise MediaError(
            f"the frames of an array are {width} x {height} pixels, and the limit is "
            f"{max_pixels:,}; make them smaller, or raise max_pixels",
            kind="undecodable",
        )


def _check_pictures(sources: Sequence[Any]) -> None:
    for place, source in enumerate(sources):
        if not isinstance(source, (str, bytes, PathLike, Image.Image)):
            raise MediaError(
                "expected pictures or their paths in the list of frames of a video, got "
                f"{shorten(repr(source))} at place {place}",
                kind="undecodable",
            )
