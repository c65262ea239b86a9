"""Pictures through any vision encoder that transformers' Auto classes load, timm's among them.

Border: pixels to features. How many features an item becomes is found by running the encoder's
architecture on the meta device (shapes without weights), so no list of model names is kept here.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.media.image import as_rgb, decode_image
from multi_token.modalities.base import Encoder, Modality
from multi_token.types import Features, Prepared

FeatureKind = Literal["patches", "pooled", "cls", "mean"]


class ImageEncoder(Encoder):
    """A vision tower and the choice of what to take from it."""

    def __init__(self, tower: nn.Module, *, features: FeatureKind, layer: int | None) -> None:
        super().__init__()
        self.tower = tower
        self.features: FeatureKind = features
        self.layer = layer
        self.dim = -1  # known after the first forward; `build` runs one

    def forward(self, **inputs: Tensor) -> Features:
        """`pixel_values` [items, ...] as the image processor made them -> Features."""
        deep = self.layer is not None
        output = self.tower(**inputs, **({"output_hidden_states": True} if deep else {}))
        if self.features == "pooled":
            pooled = getattr(output, "pooler_output", None)
            if pooled is None or deep:
                raise MultiTokenError(
                    f"{type(self.tower).__name__} gives no pooled output"
                    + (f" at layer {self.layer}" if deep else "")
                    + "; use `features: mean`, `patches` or `cls`"
                )
            return Features(pooled.flatten(1)[:, None])
        values = output.hidden_states[self.layer] if deep else output.last_hidden_state
        mask = inputs.get("pixel_attention_mask")
        if values.ndim == 4:  # a convolutional map [items, dim, height, width]
            values, num_prefix = values.flatten(2).transpose(1, 2), 0
        else:
            num_prefix = _num_prefix(self.tower, values, inputs)
        if self.features == "cls":
            if num_prefix == 0:
                raise MultiTokenError(
                    f"{type(self.tower).__name__} has no CLS token; use `pooled`, `mean`, `patches`"
                )
            return Features(values[:, :1])
        values = values[:, num_prefix:]
        mask = None if mask is None else mask.bool()
        if self.features == "mean":
            if mask is None:
                return Features(values.mean(1, keepdim=True))
            weight = mask[..., None].to(values.dtype)
            return Features((values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True))
        return Features(values, mask)


class ImageModality(Modality):
    """A picture: PNG, JPEG, WebP, GIF (first frame) and whatever else Pillow decodes."""

    type: Literal["image"] = "image"  # type: ignore[reportIncompatibleVariableOverride]
    encoder: str
    """Hub name or folder of a vision encoder (CLIP, SigLIP, DINOv2, ConvNeXt, timm/..., ...)."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    features: FeatureKind = "patches"
    """`patches`: one feature a patch, CLS left out; `pooled`: the model's own pooled vector;
    `cls`: the CLS token; `mean`: the mean of the patches."""
    layer: int | None = None
    """Hidden state to take, counted as transformers does (-1 the last, -2 LLaVA-1.5's)."""
    max_pixels: int = 89_478_485
    """A picture larger than this is refused before it is decoded (a guard against bombs)."""

    def load(self, source: Any, fetch: Fetch) -> Image.Image:
        """Path, URL, data URI, bytes or PIL picture -> RGB picture. Raises MediaError."""
        if isinstance(source, Image.Image):
            return as_rgb(source, max_pixels=self.max_pixels)
        name = source if isinstance(source, str) and not source.startswith("data:") else ""
        return decode_image(fetch.read(source), name=name, max_pixels=self.max_pixels)

    def prepare(self, raw: Any) -> Prepared:
        """An RGB picture -> what the encoder's own image processor makes of it."""
        processed = _processor(self.encoder, self.revision)(images=[raw], return_tensors="pt")
        inputs = {key: value[0] for key, value in processed.items() if isinstance(value, Tensor)}
        return Prepared(inputs=inputs, num_features=self._num_features(inputs))

    def _num_features(self, inputs: dict[str, Tensor]) -> int:
        if self.features != "patches":
            return 1
        if "pixel_attention_mask" in inputs:  # native-aspect encoders say which patches are real
            return int(inputs["pixel_attention_mask"].sum())
        shapes = tuple((key, tuple(value.shape), value.dtype) for key, value in inputs.items())
        return _num_features(self.encoder, self.revision, self.layer, shapes)

    def build_encoder(self) -> ImageEncoder:
        from transformers import AutoModel

        tower = _vision_half(
            AutoModel.from_pretrained(self.encoder, revision=self.revision, dtype=torch.float32)
        )
        encoder = ImageEncoder(tower, features=self.features, layer=self.layer).eval()
        blank = self.prepare(Image.new("RGB", (64, 64)))
        with torch.no_grad():
            encoder.dim = encoder(**self.collate([blank])).values.shape[-1]
        return encoder


@functools.lru_cache(maxsize=8)
def _processor(encoder: str, revision: str | None) -> Any:
    # one per process: reading it anew for every picture would cost more than the picture
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
    layer: int | None,
    shapes: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
) -> int:
    inputs = {
        key: torch.empty(1, *shape, dtype=dtype, device="meta") for key, shape, dtype in shapes
    }
    probe = ImageEncoder(_skeleton(encoder, revision), features="patches", layer=layer)
    with torch.no_grad():
        return int(probe(**inputs).values.shape[1])


def _vision_half(model: Any) -> nn.Module:
    """The vision tower of a two-tower model (CLIP, SigLIP); other models as they are."""
    return model.vision_model if hasattr(model, "vision_model") else model


def _num_prefix(tower: Any, values: Tensor, inputs: dict[str, Tensor]) -> int:
    """How many tokens (CLS, registers) stand before the patches."""
    if "pixel_attention_mask" in inputs:
        return values.shape[1] - inputs["pixel_attention_mask"].shape[1]
    timm_model = getattr(tower, "timm_model", None)
    if timm_model is not None:
        return int(getattr(timm_model, "num_prefix_tokens", 0))
    patch = getattr(tower.config, "patch_size", None)
    if patch is None:
        return 0
    size = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
    height, width = inputs["pixel_values"].shape[-2:]
    return values.shape[1] - (height // size[0]) * (width // size[1])
