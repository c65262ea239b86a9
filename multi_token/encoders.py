"""Encoders: precision, freezing, partial training and LoRA, as a recipe asks for.

Frozen by default. Learning rates are in `train/`, files in `checkpoint/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from multi_token.errors import RecipeError
from multi_token.modalities.base import Encoder, Modality, PretrainedModality
from multi_token.recipe.train import LoraSpec, StrictModel, TrainableEncoder
from multi_token.types import Features


class TrainedEncoderState(StrictModel):
    """Tensors of an encoder that were ever trained; a checkpoint holds exactly these."""

    tensors: Literal["all"] | tuple[str, ...]
    """Their names, or `all` of the encoder's, buffers included."""
    lora: LoraSpec | None = None
    """LoRA that some of the names belong to."""


def build_encoders(modalities: Mapping[str, Modality]) -> dict[str, Encoder]:
    """Return encoders by instance name, in the recipe's precision."""
    encoders = {name: modality.build_encoder() for name, modality in modalities.items()}
    for name, modality in modalities.items():
        if isinstance(modality, PretrainedModality) and modality.dtype != "float32":
            cast_encoder(encoders[name], getattr(torch, modality.dtype))
    return encoders


def cast_encoder(encoder: Encoder, dtype: torch.dtype) -> None:
    """Cast an encoder's weights, as `from_pretrained(dtype=...)` does; features stay float32.

    Hooks cast inputs to the dtype that the weights have by then.
    """
    for module in encoder.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        # Non-persistent buffers (frequencies of rotary positions) are computed, not loaded;
        # transformers keeps them in float32, since half precision changes long positions.
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    encoder.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    encoder.register_forward_hook(_upcast_features)


def _cast_inputs(
    encoder: nn.Module, args: tuple[Any, ...], inputs: dict[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    # LoRA is float32 in any encoder, so its dtype says nothing about the layers.
    own = (p.dtype for name, p in encoder.named_parameters() if "lora_" not in name)
    dtype = next(own, torch.float32)
    floats = {key: value.to(dtype) for key, value in inputs.items() if value.is_floating_point()}
    return args, {**inputs, **floats}


def _upcast_features(_: nn.Module, args: tuple[Any, ...], features: Features) -> Features:
    return replace(features, values=features.values.float())


def is_randomly_initialized(encoder: Encoder) -> bool:
    """Return True if the weights exist only in the run, not in a pretrained encoder."""
    return not encoder.pretrained and bool(encoder.state_dict())


def trainable_parameters(name: str, encoder: Encoder, spec: TrainableEncoder) -> list[nn.Parameter]:
    """Return the parameters that `spec` trains and features depend on; LoRA is attached before.

    `name`: the instance, for errors. Raises RecipeError for more layers than the encoder has.
    """
    if spec.lora is not None:
        lora = {id(p) for key, p in encoder.named_parameters() if "lora_" in key}
        return [p for p in _used(encoder, encoder) if id(p) in lora]
    if spec.last_layers is None:
        return _used(encoder, encoder)
    layers = _last_layers(name, encoder, spec.last_layers)
    return [p for layer in layers for p in _used(encoder, layer)]


def _used(encoder: Encoder, module: nn.Module) -> list[nn.Parameter]:
    """Parameters of a module of an encoder that its features depend on."""
    unused = {id(p) for key, p in encoder.named_parameters() if key in encoder.unused_parameters}
    return [p for p in module.parameters() if id(p) not in unused]


def _last_layers(name: str, encoder: Encoder, num_layers: int) -> list[nn.Module]:
    layers = list(encoder.layers())
    if num_layers > len(layers):
        raise RecipeError(
            f"learn.encoders.{name}: expected `last_layers` to be at most {len(layers)}, the "
            f"number of layers that its encoder has, got {num_layers}"
            + ("" if layers else "; train all of it (`lr` alone), or use `lora`")
        )
    return layers[len(layers) - num_layers :]


def unfreeze(
    name: str, encoder: Encoder, spec: TrainableEncoder, before: TrainedEncoderState | None
) -> TrainedEncoderState:
    """Make trainable what `spec` names; return all tensors that were ever trained, with these."""
    _check_same_lora(name, encoder, spec, before)
    chosen = {id(p) for p in trainable_parameters(name, encoder, spec)}
    for parameter in encoder.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    if spec.lora is None:
        # Updates are smaller than half precision resolves, and float32 layers need float32 inputs,
        # so the complete encoder is cast.
        encoder.float()
    if (before is not None and before.tensors == "all") or (spec.lora, spec.last_layers) == (
        None,
        None,
    ):
        return TrainedEncoderState(tensors="all")
    names = [key for key, p in encoder.named_parameters() if id(p) in chosen]
    if before is not None:
        names += [key for key in before.tensors if key not in names]
    return TrainedEncoderState(tensors=tuple(names), lora=spec.lora)


def _check_same_lora(
    name: str, encoder: Encoder, spec: TrainableEncoder, before: TrainedEncoderState | None
) -> None:
    """Raise RecipeError for an encoder that was trained the other way, with or without LoRA."""
    # PEFT renames the layers that it wraps, so tensors of the two ways do not fit together.
    if spec.lora is not None and not encoder.pretrained:
        raise RecipeError(
            f"learn.encoders.{name}: LoRA is for pretrained encoders, and this one starts from "
            "random weights; remove `lora`"
        )
    if before is not None and before.lora != spec.lora:
        was = "without LoRA" if before.lora is None else f"with LoRA ({before.lora})"
        raise RecipeError(
            f"learn.encoders.{name}: its encoder was trained {was} before; train it the same way, "
            "or leave it frozen"
        )


def attach_lora(name: str, encoder: Encoder, spec: LoraSpec) -> None:
    """Attach LoRA to every linear layer of an encoder, in float32; its own layers stay unchanged.

    Raises RecipeError for an encoder without linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(encoder):
        return
    names = _linear_layers(encoder)
    if not names:
        raise RecipeError(
            f"learn.encoders.{name}: its encoder ({type(encoder).__name__}) has no linear layer "
            "that LoRA can be put on; train all of it (`lr` alone), or its `last_layers`"
        )
    device = next(encoder.parameters()).device
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        # One pattern of complete names: PEFT matches the entries of a list as suffixes too.
        target_modules="|".join(re.escape(key) for key in names),
    )
    inject_adapter_in_model(config, encoder)
    for key, parameter in encoder.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(device, torch.float32)
    encoder.requires_grad_(False)


def has_lora(encoder: Encoder) -> bool:
    """Return True if LoRA is attached."""
    return hasattr(encoder, "peft_config")


def _linear_layers(encoder: Encoder) -> list[str]:
    # torch's fused attention reads the weights of its children directly; LoRA on such a child
    # would train without any effect.
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return [
        f"{name}.{child_name}" if name else child_name
        for name, module in encoder.named_modules()
        if not isinstance(module, fused)
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear) and not isinstance(child, NonDynamicallyQuantizableLinear)
    ]


def merge_lora(encoder: Encoder) -> None:
    """Add LoRA to the weights of its layers, and remove it."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())
    delattr(encoder, "peft_config")


def trained_tensors(encoder: Encoder, trained: TrainedEncoderState) -> dict[str, Tensor]:
    """Return the trained tensors by name; of tied ones the first."""
    state = encoder.state_dict(keep_vars=True)
    if trained.tensors != "all":
        return {key: state[key] for key in trained.tensors if key in state}
    first: dict[int, str] = {}
    for key, tensor in state.items():
        first.setdefault(id(tensor), key)
    return {key: state[key] for key in first.values()}


def set_train_mode(encoder: Encoder, mode: bool) -> None:
    """Set train mode in trainable modules, eval mode in all others: frozen ones get no dropout."""
    encoder.eval()
    if not mode or not any(p.requires_grad for p in encoder.parameters()):
        return
    for module in encoder.modules():
        parameters = _used(encoder, module)
        if parameters and all(p.requires_grad for p in parameters):
            module.train()
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.Module) and any(p.requires_grad for p in parameters):
            dropout.train()
    # BatchNorm stays in eval even if it is trained: small batches would spoil the statistics of the
    # pretraining, and an item's features would depend on the other items of its batch.
    for module in encoder.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


def find_unused_parameters(
    name: str, encoder: Encoder, spec: TrainableEncoder, features: Iterable[Features]
) -> frozenset[str]:
    """Return the names of parameters that none of these features depends on.

    DDP waits for the gradient of every trainable parameter, so those must stay frozen. The features
    have to be computed in `gradients_enabled`. Raises RecipeError if no gradient reaches what
    `spec` trains.
    """
    parameters = dict(encoder.named_parameters())
    unused = {key for key, p in parameters.items() if p.is_floating_point()}
    for one in features:
        some = [(key, p) for key, p in parameters.items() if key in unused]
        if not some or not one.values.requires_grad:
            break
        gradients = torch.autograd.grad(one.values.sum(), [p for _, p in some], allow_unused=True)
        unused -= {key for (key, _), g in zip(some, gradients, strict=True) if g is not None}
    used = {id(p) for key, p in parameters.items() if key not in unused}
    if spec.last_layers is None and not used:
        raise RecipeError(
            f"learn.encoders.{name}: its encoder ({type(encoder).__name__}) runs without "
            "gradients, so it cannot be trained; leave it frozen"
        )
    for number, layer in enumerate(_last_layers(name, encoder, spec.last_layers or 0), 1):
        own = list(layer.parameters())
        if own and not any(id(p) in used for p in own):
            raise RecipeError(
                f"learn.encoders.{name}: no gradient reaches layer {number} of its `last_layers` "
                f"{spec.last_layers}, because the features are taken before it or the encoder runs "
                "without gradients; train all of it (`lr` alone), or use `lora`"
            )
    return frozenset(unused)


@contextmanager
def gradients_enabled(encoder: Encoder) -> Iterator[None]:
    """Within, all parameters of an encoder require gradients, in eval mode."""
    before = [(p, p.requires_grad) for p in encoder.parameters()]
    was_training = encoder.training
    encoder.eval()
    for parameter, _ in before:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        set_train_mode(encoder, was_training)
