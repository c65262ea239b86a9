"""Clips of a fixed number of frames through the video encoders of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from multi_token.errors import MultiTokenError, RecipeError
from multi_token.modalities.base import load_auto, load_skeleton
from multi_token.modalities.image import SIZES_TRIED, FeatureKind, ImageEncoder, Layers, Tower


class ClipEncoder(ImageEncoder):
    """A tower that takes several frames at once (VideoMAE, V-JEPA 2, TimeSformer, X-CLIP).

    Its `pixel_values` are [clips, frames, channels, height, width].
    """

    def __init__(
        self, tower: nn.Module, *, features: FeatureKind, layer: Layers, micro_batch: int = 32
    ) -> None:
        super().__init__(tower, features=features, layer=layer, micro_batch=micro_batch)
        self.embeds = hasattr(tower, "get_video_features")
        if self.embeds and (features != "pooled" or layer is not None):
            raise RecipeError(
                f"{type(tower).__name__} gives one embedding per clip; set `features: pooled` and "
                f"remove `layer`, got features {features!r} and layer {layer}"
            )
        # V-JEPA 2 would also predict masked patches, which no feature needs.
        forward = inspect.signature(tower.forward).parameters
        self.options = {"skip_predictor": True} if "skip_predictor" in forward else {}

    def run(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        tower: Any = self.tower
        if not self.embeds:
            # Most towers call their input `pixel_values`, V-JEPA 2 `pixel_values_videos`.
            name = tower.main_input_name
            return tower(**{name: inputs["pixel_values"]}, **self.options, **options)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        embedding = tower.get_video_features(inputs["pixel_values"])
        # Some models and versions of transformers return the bare tensor, others an output.
        return (
            BaseModelOutputWithPooling(pooler_output=embedding)  # type: ignore[reportArgumentType]
            if isinstance(embedding, Tensor)
            else embedding
        )

    def num_prefix(self, values: Tensor, inputs: Mapping[str, Tensor]) -> int:
        tower: Any = self.tower
        tube = getattr(tower.config, "tubelet_size", 1)
        patch = getattr(tower.config, "patch_size", 1)
        size = (patch, patch) if isinstance(patch, int) else tuple(patch)[-2:]
        # ViViT writes the complete tubelet [frames, height, width] into `tubelet_size`.
        depth, *size = (tube, *size) if isinstance(tube, int) else tuple(tube)
        frames, _, height, width = inputs["pixel_values"].shape[1:]
        patches = max(frames // depth, 1) * (height // size[0]) * (width // size[1])
        return values.shape[1] - patches

    @torch.no_grad()
    def drop_unused(self, pixel_values: Tensor) -> None:
        """Drop the parts that make no features (a text tower, a predictor), and set `dim`.

        They would take memory, and be among the layers that a recipe may train.
        """
        used: set[nn.Module] = set()
        hooks = [
            module.register_forward_hook(lambda module, *_: used.add(module))
            for module in self.tower.modules()
        ]
        self.dim = self(pixel_values=pixel_values).values.shape[-1]
        for hook in hooks:
            hook.remove()
        for name, child in list(self.tower.named_children()):
            if used.isdisjoint(child.modules()):
                delattr(self.tower, name)


def prepare_clip(frames: Sequence[Image.Image], encoder: str, revision: str | None) -> Tensor:
    """Return what the encoder's processor makes of RGB frames [frames, channels, height, width]."""
    processed = _processor(encoder, revision)(list(frames), return_tensors="pt")
    (pixels,) = (value for key, value in processed.items() if key.startswith("pixel_values"))
    # A video processor returns a batch of one clip, an image processor the frames.
    return pixels if pixels.ndim == 4 else pixels[0]


@functools.lru_cache(maxsize=8)
def _processor(encoder: str, revision: str | None) -> Any:
    """The encoder's image processor, or its video processor if it has no other.

    Raises MultiTokenError for the latter without torchvision.
    """
    try:
        return load_auto("AutoImageProcessor", encoder, revision)
    except (OSError, ValueError, ImportError) as no_image_processor:
        from transformers.utils import is_torchvision_available

        if not is_torchvision_available():
            raise MultiTokenError(
                f"{encoder} has no image processor that works here, and a video processor needs "
                "torchvision: pip install torchvision, of the build that fits your torch "
                f"({no_image_processor})"
            ) from no_image_processor
        return load_auto("AutoVideoProcessor", encoder, revision)


def clip_length(encoder: str, revision: str | None) -> tuple[int | None, bool]:
    """Return the frames of a clip that the encoder's configuration declares, and True if fixed.

    None for an encoder of single images.
    """
    config = load_auto("AutoConfig", encoder, revision)
    vision = getattr(config, "vision_config", config)
    fixed = getattr(vision, "num_frames", None)
    if fixed is not None:
        return int(fixed), True
    # `frames_per_clip` is the training length; rotary positions allow any other one.
    return getattr(vision, "frames_per_clip", None), False


@functools.lru_cache(maxsize=64)
def num_clip_features(tower: Tower, shape: tuple[int, ...]) -> int:
    """Return the features of a clip whose pixels have this shape, computed without weights."""
    skeleton = load_skeleton(tower.encoder, tower.revision)
    probe = ClipEncoder(skeleton, features=tower.features, layer=tower.layer)
    with torch.no_grad():
        return int(probe(pixel_values=torch.empty(1, *shape, device="meta")).values.shape[1])


@functools.lru_cache(maxsize=8)
def clip_shape(encoder: str, revision: str | None, num_frames: int) -> tuple[int, ...] | None:
    """Return [frames, channels, height, width] of a clip, if frames of all sizes give the same.

    Found by trying sizes.
    """
    blanks = [[Image.new("RGB", size)] * num_frames for size in SIZES_TRIED]
    shapes = {tuple(prepare_clip(frames, encoder, revision).shape) for frames in blanks}
    return shapes.pop() if len(shapes) == 1 else None
