"""Pictures through any vision encoder that transformers' Auto classes load, timm's among them."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from multi_token.errors import MultiTokenError, RecipeError
from multi_token.media.fetch import Fetch
from multi_token.media.image import as_rgb, decode_image, read_size
from multi_token.modalities.anyres import (
    Grid,
    arrange,
    best_grid,
    collate_tiles,
    crop_tiles,
    reading_order,
)
from multi_token.modalities.base import (
    Encoder,
    OpenAIKind,
    PretrainedModality,
    layers_up_to,
    run_in_micro_batches,
)
from multi_token.modalities.hidden_states import HiddenStates
from multi_token.types import Features, Prepared

FeatureKind = Literal["patches", "all", "pooled", "cls", "mean"]
Layers = int | tuple[int, ...] | None
ANY_SIZE = (0, 0)
"""Size of an image whose header does not tell width and height as they will be decoded."""
PreprocessKey = tuple[str, str | None, Layers, FeatureKind, bool]
"""How an image is read whole: encoder, revision, layer, features, and whether it is padded."""


class ImageEncoder(Encoder):
    """A vision tower and the choice of what to take from it."""

    def __init__(
        self, tower: nn.Module, *, features: FeatureKind, layer: Layers, micro_batch: int = 32
    ) -> None:
        super().__init__()
        self.tower = tower
        self.features: FeatureKind = features
        self.layer = layer
        taken = () if layer is None else layer if isinstance(layer, tuple) else (layer,)
        self.states = HiddenStates(taken)
        self.micro_batch = micro_batch
        self.dim = -1  # known after the first forward; `build` runs one

    def forward(self, **inputs: Tensor) -> Features:
        """`pixel_values` [items, ...] as the image processor made them -> Features.

        With tiles: `pixel_values` [tiles, ...], and `tile` and `patch` [items, length], which say
        what each feature of an item is (see tiles.py).
        """
        tile, patch = inputs.pop("tile", None), inputs.pop("patch", None)
        values = run_in_micro_batches(self._values, inputs, self.micro_batch)
        if tile is not None and patch is not None:
            return arrange(values, tile, patch)
        mask = inputs.get("pixel_attention_mask")
        if mask is None or self.features not in ("patches", "all"):
            return Features(values)
        num_prefix = values.shape[1] - mask.shape[1]
        return Features(values, nn.functional.pad(mask.bool(), (num_prefix, 0), value=True))

    def _values(self, **inputs: Tensor) -> Tensor:
        """[images, length, dim]"""
        if self.features == "pooled":
            return self._pooled(inputs)
        if self.layer is None:
            values = self.run(inputs).last_hidden_state
        else:
            values = self._layers(inputs)
        if values.ndim == 4:  # a convolutional map [items, dim, height, width]
            values, num_prefix = values.flatten(2).transpose(1, 2), 0
        else:
            num_prefix = self.num_prefix(values, inputs)
        if self.features == "all":
            return values
        if self.features == "cls":
            if num_prefix == 0:
                raise MultiTokenError(
                    f"{type(self.tower).__name__} has no CLS token; use `pooled`, `mean`, `patches`"
                )
            return values[:, :1]
        values = values[:, num_prefix:]
        if self.features == "mean":
            mask = inputs.get("pixel_attention_mask")
            weight = values.new_ones(values.shape[:2]) if mask is None else mask.to(values.dtype)
            weight = weight[..., None]
            return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return values

    def _pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        deep = self.layer is not None
        pooled = None if deep else getattr(self.run(inputs), "pooler_output", None)
        if pooled is None:
            raise MultiTokenError(
                f"{type(self.tower).__name__} gives no pooled output"
                + (f" at layer {self.layer}" if deep else "")
                + "; use `features: mean`, `patches` or `cls`"
            )
        return pooled.flatten(1)[:, None]

    def run(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """Return the output of the tower."""
        return self.tower(**inputs, **options)

    def num_prefix(self, values: Tensor, inputs: Mapping[str, Tensor]) -> int:
        """How many tokens (CLS, registers) stand before the patches.

        values: a hidden state [items, length, dim]
        """
        if "pixel_attention_mask" in inputs:
            return values.shape[1] - inputs["pixel_attention_mask"].shape[1]
        tower: Any = self.tower
        timm_model = getattr(tower, "timm_model", None)
        if timm_model is not None:
            return int(getattr(timm_model, "num_prefix_tokens", 0))
        patch = getattr(tower.config, "patch_size", None)
        if patch is None:
            return 0
        size = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        height, width = inputs["pixel_values"].shape[-2:]
        return values.shape[1] - (height // size[0]) * (width // size[1])

    def layers(self) -> Sequence[nn.Module]:
        """Those that the features come through: with `layer`, none behind it."""
        return layers_up_to(super().layers(), self.layer)

    def _layers(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The chosen hidden state, or several side by side in each feature."""
        chosen = self.states(self.tower, super().layers(), functools.partial(self.run, inputs))
        if len({s.shape[2:] if s.ndim == 4 else s.shape[1:2] for s in chosen}) > 1:
            raise MultiTokenError(
                f"{type(self.tower).__name__} has hidden states of different sizes at layers "
                f"{self.layer} ({[tuple(s.shape[1:]) for s in chosen]}), so they cannot be joined; "
                "take one"
            )
        return torch.cat(chosen, dim=1 if chosen[0].ndim == 4 else -1)


class ImageModality(PretrainedModality):
    """An image: PNG, JPEG, WebP, GIF (first frame) and whatever else Pillow decodes."""

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("image",)
    kit_example: ClassVar[str] = "multi_token.testing.vision:image_example"

    type: Literal["image"] = "image"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a vision encoder (CLIP, SigLIP, DINOv2, ConvNeXt, timm/..., ...)."""
    features: FeatureKind = "patches"
    """`patches`: one feature a patch, CLS left out; `all`: CLS and registers too, where there are
    any; `pooled`: the model's own pooled vector; `cls`: the CLS token; `mean`: of the patches."""
    layer: Layers = None
    """Hidden state to take, counted as transformers does (-1 the last, -2 LLaVA-1.5's), or a list:
    several joined in each feature."""
    tile_grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(
        default=None, min_length=1
    )
    """Read an image as its small whole and then in tiles of the encoder's own size, line by line
    (LLaVA-NeXT's anyres): the grids to choose from, `[rows, columns]` each. The one that keeps most
    of the image is taken. Needs `line_break: true` in the projector."""
    pad_to_square: bool = False
    """Fill an image up to a square with the processor's mean colour instead of cutting its ends
    off (LLaVA-1.5's `image_aspect_ratio: pad`)."""
    max_pixels: int = 89_478_485
    """An image larger than this is refused before it is decoded (a guard against bombs)."""

    @model_validator(mode="after")
    def _check_tiles(self) -> ImageModality:
        if self.tile_grids is None:
            if self.projector.line_break:
                raise ValueError("`line_break` in the projector is for `tile_grids`; set both")
            return self
        if self.features != "patches":
            raise ValueError(f"`tile_grids` needs `features: patches`, not {self.features}")
        if self.pad_to_square:
            raise ValueError("`tile_grids` keep the whole picture: leave out `pad_to_square`")
        if not self.projector.line_break:
            raise ValueError(
                "`tile_grids` end each line of tiles with a token of the projector's own: set "
                "`line_break: true` in it"
            )
        return self

    def load(self, source: Any, fetch: Fetch) -> Image.Image:
        """Path, URL, data URI, bytes or PIL image -> RGB image. Raises MediaError."""
        if isinstance(source, Image.Image):
            return as_rgb(source, max_pixels=self.max_pixels)
        name = source if isinstance(source, str) and not source.startswith("data:") else ""
        return decode_image(fetch.read(source), name=name, max_pixels=self.max_pixels)

    def size_from_header(self, source: Any, fetch: Fetch) -> tuple[int, int] | None:
        """Return width and height in pixels after the turn that EXIF asks for.

        `ANY_SIZE` for an image whose header leaves the turn open; None for a PIL image, whose
        decoding costs nothing. Raises MediaError for a header of no image, or over `max_pixels`.
        """
        if isinstance(source, Image.Image):
            return None
        name = source if isinstance(source, str) and not source.startswith("data:") else ""
        with fetch.open(source) as file:
            return read_size(file, name=name, max_pixels=self.max_pixels) or ANY_SIZE

    def count_features(self, size: tuple[int, int]) -> int | None:
        """Return the features of an image of this width and height.

        Of `ANY_SIZE`: their number if images of all sizes have as many, else None.
        """
        if self.features not in ("patches", "all"):
            return 1
        if self.tile_grids is not None:
            return None if size == ANY_SIZE else len(self._tile_order(*size)[1])
        key = (self.encoder, self.revision, self.layer, self.features, self.pad_to_square)
        if (number := _num_of_all_sizes(key)) is not None or size == ANY_SIZE:
            return number
        return _num_of_blank(key, size)

    def _tile_order(self, width: int, height: int) -> tuple[Grid, Tensor, Tensor]:
        """The grid for an image of this size, and tile and patch of each feature, in order."""
        assert self.tile_grids is not None
        side, patches = tile_shape(self.encoder, self.revision, self.layer)
        grid = best_grid(height, width, self.tile_grids, side)
        return (grid, *reading_order(height, width, grid, patches))

    def prepare(self, raw: Any) -> Prepared:
        """An RGB image -> what the encoder's own image processor makes of it.

        With tiles: `pixel_values` [tiles, ...], `tile` and `patch` int64 [length]. Raises
        RecipeError for an encoder that cannot be given tiles.
        """
        if self.tile_grids is not None:
            return self._prepare_tiles(raw)
        if self.pad_to_square:
            raw = _squared(raw, image_processor(self.encoder, self.revision))
        processed = image_processor(self.encoder, self.revision)(images=[raw], return_tensors="pt")
        inputs = {key: value[0] for key, value in processed.items() if isinstance(value, Tensor)}
        return Prepared(inputs=inputs, num_features=self._num_features(inputs))

    def _prepare_tiles(self, raw: Image.Image) -> Prepared:
        side, _ = tile_shape(self.encoder, self.revision, self.layer)
        processor = image_processor(self.encoder, self.revision)
        grid, tile, patch = self._tile_order(raw.width, raw.height)
        resample = getattr(processor, "resample", None)
        tiles = crop_tiles(
            raw,
            grid,
            side,
            Image.Resampling(resample) if isinstance(resample, int) else Image.Resampling.BICUBIC,
        )
        pixels = processor(images=tiles, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixels, "tile": tile, "patch": patch}
        return Prepared(inputs, num_features=len(tile))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Items -> one batch; with tiles, all tiles of all items stand in one."""
        return super().collate(items) if self.tile_grids is None else collate_tiles(items)

    def _num_features(self, inputs: dict[str, Tensor]) -> int:
        if self.features not in ("patches", "all"):
            return 1
        if "pixel_attention_mask" in inputs:  # native-aspect encoders say which patches are real
            return int(inputs["pixel_attention_mask"].sum())
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in inputs.items())
        return _num_features(self.encoder, self.revision, self.layer, self.features, shapes)

    def build_encoder(self) -> ImageEncoder:
        from transformers import AutoModel

        tower = _vision_half(
            AutoModel.from_pretrained(self.encoder, revision=self.revision, dtype=torch.float32)
        )
        encoder = ImageEncoder(
            tower, features=self.features, layer=self.layer, micro_batch=self.micro_batch
        ).eval()
        blank = self.prepare(Image.new("RGB", (64, 64)))
        with torch.no_grad():
            encoder.dim = encoder(**self.collate([blank])).values.shape[-1]
        return encoder


@functools.lru_cache(maxsize=8)
def image_processor(encoder: str, revision: str | None) -> Any:
    """The encoder's own image processor; do not change it."""
    # one per process: reading it again for every image would cost more than the image
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(encoder, revision=revision)


@functools.lru_cache(maxsize=4)
def _skeleton(encoder: str, revision: str | None) -> nn.Module:
    """The encoder's architecture without weights: it computes shapes only."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(encoder, revision=revision)
    with torch.device("meta"):
        return _vision_half(AutoModel.from_config(getattr(config, "vision_config", config))).eval()


@functools.lru_cache(maxsize=256)
def _num_features(
    encoder: str,
    revision: str | None,
    layer: Layers,
    features: FeatureKind,
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
) -> int:
    inputs = {
        key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, shape, dtype in shapes
    }
    probe = ImageEncoder(_skeleton(encoder, revision), features=features, layer=layer)
    with torch.no_grad():
        return int(probe(**inputs).values.shape[1])


SIZES_TRIED = ((64, 64), (40, 120), (120, 40), (300, 200), (97, 1300), (1100, 800))
"""Widths and heights, small and large, of several proportions."""


@functools.lru_cache(maxsize=8)
def _num_of_all_sizes(way: PreprocessKey) -> int | None:
    """Features of any image, if the processor brings all to one shape; found by trying some."""
    shapes: set[tuple[int, ...]] = set()
    for size in SIZES_TRIED:
        inputs = _blank(way, size).inputs
        if set(inputs) != {"pixel_values"}:
            return None  # with a mask, the number hangs on more than the shape
        shapes.add(tuple(inputs["pixel_values"].shape))
        if len(shapes) > 1:
            return None
    return _num_of_blank(way, SIZES_TRIED[0])


@functools.lru_cache(maxsize=65_536)
def _num_of_blank(way: PreprocessKey, size: tuple[int, int]) -> int:
    """Features of an image of this width and height, whatever is on it."""
    return _blank(way, size).num_features


def _blank(way: PreprocessKey, size: tuple[int, int]) -> Prepared:
    encoder, revision, layer, features, padded = way
    modality = ImageModality(
        encoder=encoder, revision=revision, layer=layer, features=features, pad_to_square=padded
    )
    return modality.prepare(Image.new("RGB", size))


@functools.lru_cache(maxsize=8)
def tile_shape(encoder: str, revision: str | None, layer: Layers) -> tuple[int, int]:
    """Pixels and patches along each side of what the encoder takes. Raises RecipeError."""
    blank = image_processor(encoder, revision)(
        images=[Image.new("RGB", (64, 64))], return_tensors="pt"
    )
    inputs = {key: value for key, value in blank.items() if isinstance(value, Tensor)}
    pixels = inputs.get("pixel_values", torch.empty(0))
    if set(inputs) != {"pixel_values"} or pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3]:
        raise RecipeError(
            f"`tile_grids` needs an encoder of square pictures of one size; the image processor of "
            f"{encoder} makes "
            + ", ".join(f"{key} {tuple(value.shape[1:])}" for key, value in inputs.items())
        )
    shapes = (("pixel_values", tuple(pixels.shape[1:]), pixels.dtype),)
    number = _num_features(encoder, revision, layer, "patches", shapes)
    if math.isqrt(number) ** 2 != number:
        raise RecipeError(
            f"`tile_grids` needs an encoder whose patches are a square, {encoder} has {number}"
        )
    return int(pixels.shape[2]), math.isqrt(number)


def _squared(picture: Image.Image, processor: Any) -> Image.Image:
    """The image in the middle of a square of the processor's mean colour."""
    mean = getattr(processor, "image_mean", None)
    if mean is None:
        raise RecipeError(
            f"`pad_to_square` needs the mean colour of the encoder's image processor, and "
            f"{type(processor).__name__} names none"
        )
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def _vision_half(model: Any) -> nn.Module:
    """The vision tower of a two-tower model (CLIP, SigLIP); other models as they are."""
    return model.vision_model if hasattr(model, "vision_model") else model
