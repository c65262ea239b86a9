"""Faster code for the language model's layers: torch.compile, or Liger's kernels.

Weights, their names, and the values that layers exchange stay the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AttentionInterface

from multi_token.errors import RecipeError
from multi_token.language_model.forward import base_language_model
from multi_token.language_model.segment_attention import SEGMENT_ATTENTION, segment_attention
from multi_token.recipe.train import TrainSpec
from multi_token.train.fsdp import decoder_layers

# without Liger's fused losses: our head computes logits at supervised positions only
_NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_COMPILERS = ("g++", "clang++", "cl")


def apply_kernels(language_model: Any, spec: TrainSpec, device: torch.device) -> None:
    """Apply `train.compile_layers` and `train.liger` to a language model that was just loaded.

    Raises RecipeError for a setting that this device does not support.
    """
    if spec.compile_layers:
        decoder_layers(language_model, "train.compile_layers")
        check_can_compile(device)
    if spec.liger:
        use_liger(language_model, device)


def check_can_compile(device: torch.device) -> None:
    """Raise RecipeError where no compiler for the code of torch.compile is installed."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX")
        if not any(shutil.which(name) for name in ((compiler,) if compiler else _COMPILERS)):
            raise RecipeError(
                "train.compile_layers needs a C++ compiler on the CPU, and none was found (CXX, "
                f"{', '.join(_COMPILERS)}); install one, or set it to false"
            )
    elif device.type == "cuda" and find_spec("triton") is None:
        raise RecipeError(
            "train.compile_layers needs the package triton on a GPU, which is not installed; "
            "install it, or set it to false"
        )


@contextmanager
def compiled_layers(language_model: Any, *, backend: str = "inductor") -> Iterator[None]:
    """Compile each layer of a language model while the context lasts, for use in `compile_enabled`.

    Layers are alike, so the code of the first serves all of them: torch compiles it once for a
    static length, and once more for dynamic ones. Encoders, splicing and the loss stay eager, since
    they branch on the content of a batch. Raises LanguageModelError for a model class that does not
    name its layers.
    """
    layers = decoder_layers(language_model, "train.compile_layers")
    # segment attention reads the borders of segments: torch would recompile for each pack
    disabled: Any = torch.compiler.disable(segment_attention)
    AttentionInterface.register(SEGMENT_ATTENTION, disabled)
    for layer in layers:
        # in place: `torch.compile(layer)` returns a wrapper, under which weights have other names
        layer.compile(backend=backend)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
        for layer in layers:
            # nn.Module.compile has no inverse (torch 2.13)
            layer._compiled_call_impl = None


def compile_enabled(wanted: bool) -> Any:
    """Use compiled code for a training step inside of `compiled_layers`.

    Outside of steps code is eager: generation would compile for each new length and KV cache.
    """
    return torch.compiler.set_stance("default") if wanted else nullcontext()


def use_liger(language_model: Any, device: torch.device) -> None:
    """Replace rotary embedding, norms and gated layers by Liger's (Hsu et al., arXiv:2410.10989).

    In place and idempotent. Raises RecipeError on the CPU, without the package, and for a model
    type without Liger kernels.
    """
    if device.type == "cpu":
        raise RecipeError(
            "train.liger needs a GPU, for which Liger's kernels are written, and this run is on "
            "the CPU; set it to false"
        )
    if find_spec("liger_kernel") is None:
        raise RecipeError(
            "train.liger needs the package liger-kernel, which is not installed; install it "
            "(pip install liger-kernel), or set it to false"
        )
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        _apply_liger_kernel_to_instance,
    )
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    inner = base_language_model(language_model)
    family = inner.config.model_type
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise RecipeError(
            f"train.liger: Liger has no kernels for the model type {family!r} of this language "
            "model; set it to false"
        )
    _apply_liger_kernel_to_instance(model=inner, **_NO_LOSS)
