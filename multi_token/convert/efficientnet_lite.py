"""EfficientNet-Lite0's published PyTorch file becomes an ordinary transformers folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import (
    EfficientNetConfig,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
)

from multi_token.errors import CheckpointError

MEAN = 127 / 255
"""Lite models were trained on (pixel - 127) / 128, not on ImageNet's mean and deviation."""
STD = 128 / 255

_ALWAYS_OPEN = 100.0
"""A gate's bias whose sigmoid is exactly 1.0, in float32 as in bfloat16."""

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def convert(pth: Path, out: Path) -> None:
    """Write `pth` (efficientnet-lite0-*.pth) to `out` as config, safetensors and preprocessor.

    Lite0 is B0 with relu6 and without squeeze-and-excitation; the gates that transformers' model
    has are held open, so the features are those of the original.
    """
    source = cast(dict[str, Tensor], torch.load(pth, map_location="cpu", weights_only=True))
    model = EfficientNetModel(_config())
    target = model.state_dict()
    renamed = {new: source.pop(old) for new, old in _weight_names(model) if old in source}
    left = [name for name in source if not name.startswith("_fc.")]
    missing = [n for n in target if n not in renamed and ".squeeze_excite." not in n]
    if left or missing:
        raise CheckpointError(
            f"{pth} is not EfficientNet-Lite0: unknown tensors {left[:3]}, missing {missing[:3]}"
        )
    for name, tensor in target.items():
        if ".squeeze_excite." in name:
            gate = _ALWAYS_OPEN if name.endswith("expand.bias") else 0.0
            renamed[name] = torch.full_like(tensor, gate)
    model.load_state_dict(renamed, strict=True)
    model.eval().save_pretrained(out)
    _image_processor().save_pretrained(out)


def _config() -> EfficientNetConfig:
    return EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=224,
        hidden_act="relu6",
        hidden_dim=1280,
        dropout_rate=0.2,
        batch_norm_eps=1e-3,
    )


def _image_processor() -> EfficientNetImageProcessorPil:
    return EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        rescale_offset=False,
        include_top=False,  # true would divide by the deviation a second time
    )


def _weight_names(model: EfficientNetModel) -> Iterator[tuple[str, str]]:
    """Pairs of (name in transformers, name in the file), whether or not the file has them."""
    yield "embeddings.convolution.weight", "_conv_stem.weight"
    yield from _batch_norm("embeddings.batchnorm", "_bn0")
    for i in range(len(model.encoder.blocks)):
        new, old = f"encoder.blocks.{i}", f"_blocks.{i}"
        yield f"{new}.expansion.expand_conv.weight", f"{old}._expand_conv.weight"
        yield from _batch_norm(f"{new}.expansion.expand_bn", f"{old}._bn0")
        yield f"{new}.depthwise_conv.depthwise_conv.weight", f"{old}._depthwise_conv.weight"
        yield from _batch_norm(f"{new}.depthwise_conv.depthwise_norm", f"{old}._bn1")
        yield f"{new}.projection.project_conv.weight", f"{old}._project_conv.weight"
        yield from _batch_norm(f"{new}.projection.project_bn", f"{old}._bn2")
    yield "encoder.top_conv.weight", "_conv_head.weight"
    yield from _batch_norm("encoder.top_bn", "_bn1")


def _batch_norm(new: str, old: str) -> Iterator[tuple[str, str]]:
    for name in _BATCH_NORM:
        yield f"{new}.{name}", f"{old}.{name}"
