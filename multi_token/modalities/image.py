"""Images through any vision encoder that transformers' Auto classes load, including timm's."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from multi_token.errors import MultiTokenError, RecipeError
from multi_token.media.errors import undecodable
from multi_token.media.fetch import Fetch, source_name
from multi_token.media.image import MAX_PIXELS, as_rgb, decode_image, read_size
from multi_token.media.pdf_page import MAX_PAGES, is_pdf, page_size, parse_page, render_page
from multi_token.modalities.anyres import NEWLINE, Grid, best_grid, crop_tiles, reading_order
from multi_token.modalities.base import (
    Encoder,
    OpenAIKind,
    PretrainedModality,
    load_auto,
    load_skeleton,
)
from multi_token.modalities.hidden_states import HiddenStates, layers_up_to
from multi_token.modalities.parts import collate_parts, gather_features, run_in_micro_batches
from multi_token.types import Features, Prepared

FeatureKind = Literal["patches", "all", "pooled", "cls", "mean"]
Layers = int | tuple[int, ...] | None
ANY_SIZE = (0, 0)
"""Size of an image whose header does not tell width and height as they will be decoded."""
SIZES_TRIED = ((64, 64), (40, 120), (120, 40), (300, 200), (97, 1300), (1100, 800))
"""Widths and heights, small and large, of several proportions."""


class Tower(NamedTuple):
    """Vision encoder and the features taken from it; the key of what is computed once."""

    encoder: str
    revision: str | None
    features: FeatureKind
    layer: Layers

    @property
    def has_patches(self) -> bool:
        """True if an image gives a feature per patch, and not one vector."""
        return self.features in ("patches", "all")


class ImageEncoder(Encoder):
    """A vision tower and the features taken from it."""

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
        self.dim = -1  # known after the first forward, which `build_encoder` runs

    def forward(self, **inputs: Tensor) -> Features:
        """Encode the tensors of the image processor, `pixel_values` [items, ...]; or tiles of all
        items, `pixel_values` [tiles, ...], with `part` and `feature` [items, length] (parts.py).
        """
        part, feature = inputs.pop("part", None), inputs.pop("feature", None)
        values = run_in_micro_batches(self._values, inputs, self.micro_batch)
        if part is not None and feature is not None:
            return replace(gather_features(values, part, feature), newlines=part == NEWLINE)
        mask = inputs.get("pixel_attention_mask")
        if mask is None or self.features not in ("patches", "all"):
            return Features(values)
        # Padding patches of native-aspect encoders are masked; prefix tokens are always real.
        num_prefix = values.shape[1] - mask.shape[1]
        return Features(values, nn.functional.pad(mask.bool(), (num_prefix, 0), value=True))

    def _values(self, **inputs: Tensor) -> Tensor:
        """Features [images, length, dim]."""
        if self.features == "pooled":
            return self._pooled(inputs)
        if self.layer is None:
            values = self.run(inputs).last_hidden_state
        else:
            values = self._chosen_states(inputs)
        if values.ndim == 4:  # a convolutional map [images, dim, height, width]
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
            # The mean of real patches alone; padding patches have values too.
            weight = values.new_ones(values.shape[:2]) if mask is None else mask.to(values.dtype)
            weight = weight[..., None]
            return (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return values

    def _pooled(self, inputs: Mapping[str, Tensor]) -> Tensor:
        # The pooling head reads the last layer, so a deeper state has no pooled output.
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
        """Return the number of tokens (CLS, registers) before the patches of a hidden state.

        `values`: the hidden state [items, length, dim].
        """
        if "pixel_attention_mask" in inputs:
            return values.shape[1] - inputs["pixel_attention_mask"].shape[1]
        tower: Any = self.tower
        # timm wraps its model and counts its prefix tokens itself.
        timm_model = getattr(tower, "timm_model", None)
        if timm_model is not None:
            return int(getattr(timm_model, "num_prefix_tokens", 0))
        patch = getattr(tower.config, "patch_size", None)
        if patch is None:
            return 0
        # Some configurations hold [height, width], or [frames, height, width].
        size = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        height, width = inputs["pixel_values"].shape[-2:]
        # Everything else is before the patches; no configuration counts CLS and registers.
        return values.shape[1] - (height // size[0]) * (width // size[1])

    def layers(self) -> Sequence[nn.Module]:
        """Return the layers up to the one whose hidden state is taken."""
        return layers_up_to(super().layers(), self.layer)

    def _chosen_states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The hidden state of `layer`, or those of several layers joined along the width."""
        chosen = self.states(self.tower, super().layers(), functools.partial(self.run, inputs))
        # Stages of a hierarchy halve the sides, so their states cannot be concatenated.
        if len({s.shape[2:] if s.ndim == 4 else s.shape[1:2] for s in chosen}) > 1:
            raise MultiTokenError(
                f"{type(self.tower).__name__} has hidden states of different sizes at layers "
                f"{self.layer} ({[tuple(s.shape[1:]) for s in chosen]}), so they cannot be joined; "
                "take one"
            )
        return torch.cat(chosen, dim=1 if chosen[0].ndim == 4 else -1)


class ImageModality(PretrainedModality):
    """An image: PNG, JPEG, WebP, GIF (first frame) and others that Pillow decodes.

    An item becomes one feature per patch, [length, dim], or one vector (`features`). The patches of
    CLIP's next-to-last layer are LLaVA's choice (arXiv:2304.08485); `tile_grids` is LLaVA-NeXT's.
    """

    openai_kinds: ClassVar[tuple[OpenAIKind, ...]] = ("image",)
    kit_example: ClassVar[str] = "multi_token.testing.examples:image_example"

    type: Literal["image"] = "image"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a vision encoder (CLIP, SigLIP, DINOv2, ConvNeXt, timm/..., ...)."""
    features: FeatureKind = "patches"
    """`patches`: one feature per patch, without CLS; `all`: patches, CLS and registers; `pooled`:
    the model's own pooled vector; `cls`: the CLS token; `mean`: the mean of the patches."""
    layer: Layers = None
    """Hidden state to take, counted as transformers does (-1 is the last, -2 LLaVA-1.5's). A list
    takes several and joins them in each feature."""
    tile_grids: tuple[tuple[PositiveInt, PositiveInt], ...] | None = Field(
        default=None, min_length=1
    )
    """Grids `[rows, columns]` to cut an image into tiles of the encoder's input size (LLaVA-NeXT's
    anyres). An image becomes a downscaled copy and the tiles of the grid that keeps most of its
    pixels. Needs `line_break: true` in the projector."""
    pad_to_square: bool = False
    """Pad an image to a square with the processor's mean colour, so that its ends are not cropped
    (LLaVA-1.5's `image_aspect_ratio: pad`)."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels. A larger image is refused before it is decoded, since a small file
    can decode to gigabytes."""
    page_dpi: PositiveInt = Field(default=144, le=1200)
    """Resolution at which a page of a PDF becomes an image."""
    max_pages: PositiveInt = MAX_PAGES
    """Largest number of pages in a PDF of which one is taken."""

    @model_validator(mode="after")
    def _check_tiles(self) -> ImageModality:
        if self.tile_grids is None:
            if self.projector.line_break:
                raise ValueError("`line_break` in the projector is for `tile_grids`; set both")
            return self
        if self.features != "patches":
            raise ValueError(f"`tile_grids` needs `features: patches`, not {self.features}")
        if self.pad_to_square:
            raise ValueError("`tile_grids` keeps the complete image: remove `pad_to_square`")
        if not self.projector.line_break:
            raise ValueError(
                "`tile_grids` ends each line of tiles with an embedding of the projector: set "
                "`line_break: true` in it"
            )
        return self

    @property
    def tower(self) -> Tower:
        """The encoder and the features taken from it."""
        return Tower(self.encoder, self.revision, self.features, self.layer)

    def load(self, source: Any, fetch: Fetch) -> Image.Image:
        """Return the RGB image of a path, URL, data URI, bytes or PIL image.

        `{"path" or "bytes": a PDF, "page": 3}` is a page of it, counted from 1.

        Raises:
            MediaError: The source cannot be read, is no image, or is over `max_pixels`.
        """
        if isinstance(source, Image.Image):
            return as_rgb(source, max_pixels=self.max_pixels)
        source, page = parse_page(source)
        data = fetch.read(source)
        name = source_name(source)
        if is_pdf(data):
            return render_page(io.BytesIO(data), page, label=name or "the PDF", **self._page())
        _check_no_page(page, name)
        return decode_image(data, name=name, max_pixels=self.max_pixels)

    def size_from_header(self, source: Any, fetch: Fetch) -> tuple[int, int] | None:
        """Return width and height in pixels, after the rotation that EXIF asks for.

        Returns:
            `ANY_SIZE` if only decoding gives the rotation. None for a PIL image, which costs
            nothing to decode.

        Raises:
            MediaError: The header is not that of an image, or the image is over `max_pixels`.
        """
        if isinstance(source, Image.Image):
            return None
        source, page = parse_page(source)
        name = source_name(source)
        with fetch.open(source) as file:
            start = file.read(1024)
            file.seek(0)
            if is_pdf(start):
                return page_size(file, page, label=name or "the PDF", **self._page())
            _check_no_page(page, name)
            size = read_size(file, name=name, max_pixels=self.max_pixels)
        return size or ANY_SIZE

    def _page(self) -> dict[str, int]:
        return {
            "dpi": self.page_dpi,
            "max_pixels": self.max_pixels,
            "max_pages": self.max_pages,
        }

    def count_features(self, size: tuple[int, int]) -> int | None:
        """Return the number of features of an image of this width and height.

        For `ANY_SIZE`: the number if images of all sizes have the same, else None.
        """
        if not self.tower.has_patches:
            return 1
        if self.tile_grids is not None:
            return None if size == ANY_SIZE else len(self._tile_order(*size)[1])
        number = _num_of_all_sizes(self.tower, self.pad_to_square)
        if number is not None or size == ANY_SIZE:
            return number
        return _num_of_blank(self.tower, self.pad_to_square, size)

    def _tile_order(self, width: int, height: int) -> tuple[Grid, Tensor, Tensor]:
        """The grid for an image of this size, and tile and patch of each feature, in order."""
        assert self.tile_grids is not None
        side, patches = tile_shape(self.tower)
        grid = best_grid(height, width, self.tile_grids, side)
        # The order is computed from the size alone, so the header is enough to count.
        return (grid, *reading_order(height, width, grid, patches))

    def prepare(self, raw: Image.Image) -> Prepared:
        """Run the encoder's own image processor on an RGB image.

        Returns:
            The processor's tensors. With tiles: `pixel_values` [tiles, ...], and `part`, `feature`
            int64 [length].

        Raises:
            RecipeError: The encoder cannot take tiles, or has no mean colour to pad with.
        """
        if self.tile_grids is not None:
            return self._prepare_tiles(raw)
        processor = self.auto("AutoImageProcessor")
        if self.pad_to_square:
            raw = _padded_to_square(raw, processor)
        processed = processor(images=[raw], return_tensors="pt")
        inputs = {key: value[0] for key, value in processed.items() if isinstance(value, Tensor)}
        return Prepared(inputs=inputs, num_features=self._num_features(inputs))

    def _prepare_tiles(self, raw: Image.Image) -> Prepared:
        processor = self.auto("AutoImageProcessor")
        grid, tile, patch = self._tile_order(raw.width, raw.height)
        # LlavaNext resizes with the processor's filter; another one changes every pixel.
        resample = getattr(processor, "resample", None)
        method = (
            Image.Resampling(resample) if isinstance(resample, int) else Image.Resampling.BICUBIC
        )
        tiles = crop_tiles(raw, grid, tile_shape(self.tower)[0], method)
        pixels = processor(images=tiles, return_tensors="pt")["pixel_values"]
        inputs = {"pixel_values": pixels, "part": tile, "feature": patch}
        return Prepared(inputs, num_features=len(tile))

    def collate(self, items: Sequence[Prepared]) -> dict[str, Tensor]:
        """Join items into one batch; with tiles, all tiles of all items are encoded together."""
        return super().collate(items) if self.tile_grids is None else collate_parts(items)

    def _num_features(self, inputs: dict[str, Tensor]) -> int:
        if not self.tower.has_patches:
            return 1
        if "pixel_attention_mask" in inputs:  # native-aspect encoders say which patches are real
            return int(inputs["pixel_attention_mask"].sum())
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in inputs.items())
        return _num_of_shapes(self.tower, shapes)

    def build_encoder(self) -> ImageEncoder:
        """Return the vision tower; the text tower of CLIP or SigLIP is dropped."""
        encoder = ImageEncoder(
            _vision_half(self.load_tower()),
            features=self.features,
            layer=self.layer,
            micro_batch=self.micro_batch,
        ).eval()
        # Run once, because the width of a pooled or joined feature is in no configuration.
        encoder.dim = self.output_dim(encoder, Image.new("RGB", (64, 64)))
        return encoder


# Counting without weights: the shapes of a forward on the meta device depend on the input alone.
@functools.lru_cache(maxsize=256)
def _num_of_shapes(
    tower: Tower, shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
) -> int:
    """Features of an image whose prepared inputs have these names, shapes and types."""
    inputs = {
        key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, shape, dtype in shapes
    }
    skeleton = _vision_half(load_skeleton(tower.encoder, tower.revision, "vision_config"))
    probe = ImageEncoder(skeleton, features=tower.features, layer=tower.layer)
    with torch.no_grad():
        return int(probe(**inputs).values.shape[1])


@functools.lru_cache(maxsize=8)
def _num_of_all_sizes(tower: Tower, padded: bool) -> int | None:
    """Features of any image, if the processor brings all to one shape; found by trying sizes."""
    shapes: set[tuple[int, ...]] = set()
    for size in SIZES_TRIED:
        inputs = _prepare_blank(tower, padded, size).inputs
        if set(inputs) != {"pixel_values"}:
            return None  # with a mask, the number depends on more than the shape
        shapes.add(tuple(inputs["pixel_values"].shape))
        if len(shapes) > 1:
            return None
    return _num_of_blank(tower, padded, SIZES_TRIED[0])


@functools.lru_cache(maxsize=65_536)
def _num_of_blank(tower: Tower, padded: bool, size: tuple[int, int]) -> int:
    """Features of an image of this width and height; they do not depend on its pixels."""
    return _prepare_blank(tower, padded, size).num_features


def _prepare_blank(tower: Tower, padded: bool, size: tuple[int, int]) -> Prepared:
    modality = ImageModality(**tower._asdict(), pad_to_square=padded)
    return modality.prepare(Image.new("RGB", size))


@functools.lru_cache(maxsize=8)
def tile_shape(tower: Tower) -> tuple[int, int]:
    """Return pixels and patches along each side of the encoder's input.

    Raises RecipeError for an encoder whose input or patches are not a square of one size.
    """
    processor = load_auto("AutoImageProcessor", tower.encoder, tower.revision)
    blank = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    inputs = {key: value for key, value in blank.items() if isinstance(value, Tensor)}
    pixels = inputs.get("pixel_values", torch.empty(0))
    if set(inputs) != {"pixel_values"} or pixels.ndim != 4 or pixels.shape[2] != pixels.shape[3]:
        raise RecipeError(
            f"`tile_grids` needs an encoder of square images of one size; the image processor of "
            f"{tower.encoder} makes "
            + ", ".join(f"{key} {tuple(value.shape[1:])}" for key, value in inputs.items())
        )
    shapes = (("pixel_values", tuple(pixels.shape[1:]), pixels.dtype),)
    number = _num_of_shapes(tower._replace(features="patches"), shapes)
    if math.isqrt(number) ** 2 != number:
        raise RecipeError(
            f"`tile_grids` needs an encoder whose patches are a square, {tower.encoder} has "
            f"{number}"
        )
    return int(pixels.shape[2]), math.isqrt(number)


def _check_no_page(page: int | None, name: str) -> None:
    if page is not None:
        raise undecodable(
            f"{name or 'the image'} is no PDF, and the item names page {page}; remove `page`"
        )


def _padded_to_square(image: Image.Image, processor: Any) -> Image.Image:
    """The image in the middle of a square of the processor's mean colour."""
    mean = getattr(processor, "image_mean", None)
    if mean is None:
        raise RecipeError(
            f"`pad_to_square` needs the mean colour of the encoder's image processor, and "
            f"{type(processor).__name__} has none"
        )
    side = max(image.size)
    # Truncated and not rounded, as LLaVA does, so that its checkpoints see the same pixels.
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _vision_half(model: Any) -> nn.Module:
    """The vision tower of a two-tower model (CLIP, SigLIP); other models unchanged."""
    return model.vision_model if hasattr(model, "vision_model") else model
