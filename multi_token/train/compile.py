"""Faster layers of the language model, if the recipe asks for them: compiled, or Liger's."""

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

# of Liger's kernels: our loss asks the head for supervised positions only, with nothing to fuse
_NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
_COMPILERS = ("g++", "clang++", "cl")


def apply_kernels(language_model: Any, spec: TrainSpec, device: torch.device) -> None:
    """Apply the layer settings of a recipe to a new language model.

    Raises RecipeError for what cannot be done on this device.
    """
    if spec.compile_layers:
        decoder_layers(language_model, "train.compile_layers")
        check_can_compile(device)
    if spec.liger:
        use_liger(language_model, device)


def check_can_compile(device: torch.device) -> None:
    """Raises RecipeError if nothing here turns what torch.compile writes into machine code."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX")
        if not any(shutil.which(name) for name in ((compiler,) if compiler else _COMPILERS)):
            raise RecipeError(
                "train.compile_layers needs a C++ compiler on the CPU, and found none (CXX, "
                f"{', '.join(_COMPILERS)}); install one, or set it to false"
            )
    elif device.type == "cuda" and find_spec("triton") is None:
        raise RecipeError(
            "train.compile_layers needs the package triton on a GPU, which is not installed; "
            "install it, or set it to false"
        )


@contextmanager
def compiled_layers(language_model: Any, *, backend: str = "inductor") -> Iterator[None]:
    """Within it each layer of a language model is compiled, but only where `compile_enabled` says
    so.

    Layers are alike, so the first one's code serves all of them: it is made once for a length that
    does not change, and once more for all others. Encoders, splicing and the loss, with their
    choices by what a batch holds, stay outside. Raises LanguageModelError for a family that does
    not name its layers.
    """
    layers = decoder_layers(language_model, "train.compile_layers")
    # it reads the borders of segments, and would be compiled again for each pack
    disabled: Any = torch.compiler.disable(segment_attention)
    AttentionInterface.register(SEGMENT_ATTENTION, disabled)
    for layer in layers:
        layer.compile(backend=backend)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
        for layer in layers:
            layer._compiled_call_impl = None


def compile_enabled(wanted: bool) -> Any:
    """Around a training step inside of `compiled_layers`: compiled code is used.

    Elsewhere, in answers to held-out rows say, each new length and cache would be compiled for.
    """
    return torch.compiler.set_stance("default") if wanted else nullcontext()


def use_liger(language_model: Any, device: torch.device) -> None:
    """Liger's rotary embedding, norms and gated layers (Hsu et al., arXiv:2410.10989) in place of a
    language model's own, for good; doing it again changes nothing.

    Raises RecipeError on the CPU, without the package, and for a family that Liger does not know.
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
