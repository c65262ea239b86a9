"""Encoders as a recipe wants them: in which precision, and what learns (by default nothing).

Border: one encoder and what a recipe says of it. Learning rates are the trainer's, files are
checkpoint/load.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """What of an encoder was ever trained; a checkpoint holds exactly these tensors."""

    tensors: Literal["all"] | tuple[str, ...]
    """Their names, or `all` that the encoder has (its buffers too)."""
    lora: LoraSpec | None = None
    """The LoRA that some of these names belong to."""


def build_encoders(modalities: Mapping[str, Modality]) -> dict[str, Encoder]:
    """Instance name -> its encoder, in the precision that the recipe gives."""
    encoders = {name: modality.build_encoder() for name, modality in modalities.items()}
    for name, modality in modalities.items():
        if isinstance(modality, PretrainedModality) and modality.dtype != "float32":
            cast_encoder(encoders[name], getattr(torch, modality.dtype))
    return encoders


def cast_encoder(encoder: Encoder, dtype: torch.dtype) -> None:
    """Keep an encoder's weights in fewer bits, as `from_pretrained(dtype=...)` does.

    It then takes the same inputs and gives float32 features, also if it becomes float32 later.
    Buffers that no file holds (frequencies of rotary positions) stay as they are.
    """
    for module in encoder.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                setattr(module, name, buffer.to(dtype))
    encoder.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    encoder.register_forward_hook(_upcast_features)


def _cast_inputs(
    encoder: nn.Module, args: tuple[Any, ...], inputs: dict[str, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Tensor]]:
    # LoRA is float32 whatever it stands beside
    own = (p.dtype for name, p in encoder.named_parameters() if "lora_" not in name)
    dtype = next(own, torch.float32)
    floats = {key: value.to(dtype) for key, value in inputs.items() if value.is_floating_point()}
    return args, {**inputs, **floats}


def _upcast_features(_: nn.Module, args: tuple[Any, ...], features: Features) -> Features:
    return replace(features, values=features.values.float())


def is_randomly_initialized(encoder: Encoder) -> bool:
    """Whether its weights are nowhere but in the run."""
    return not encoder.pretrained and bool(encoder.state_dict())


def trainable_parameters(name: str, encoder: Encoder, spec: TrainableEncoder) -> list[nn.Parameter]:
    """The parameters that `spec` names. Raises RecipeError for layers that are not there.

    LoRA has to be attached before (`attach_lora`). `name`: the instance, for what is said of it.
    """
    if spec.lora is not None:
        return [p for key, p in encoder.named_parameters() if "lora_" in key]
    if spec.last_layers is None:
        return list(encoder.parameters())
    return [
        p for layer in _last_layers(name, encoder, spec.last_layers) for p in layer.parameters()
    ]


def _last_layers(name: str, encoder: Encoder, num_layers: int) -> list[nn.Module]:
    layers = list(encoder.layers())
    if num_layers > len(layers):
        raise RecipeError(
            f"learn.encoders.{name}: expected `last_layers` to be at most {len(layers)}, the "
            f"number of layers that its encoder has, got {num_layers}"
            + ("" if layers else "; learn all of it (a rate alone), or use `lora`")
        )
    return layers[len(layers) - num_layers :]


def unfreeze(
    name: str, encoder: Encoder, spec: TrainableEncoder, before: TrainedEncoderState | None
) -> TrainedEncoderState:
    """Let what `spec` names learn, and say what has then ever been trained.

    What learns is float32; around whole layers that learn, so is the rest of the encoder, or they
    could not be fed.
    """
    _check_same_lora(name, encoder, spec, before)
    chosen = {id(p) for p in trainable_parameters(name, encoder, spec)}
    for parameter in encoder.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    if spec.lora is None:
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
    """LoRA's names are not the layers' own, so one encoder is trained one way or the other."""
    if spec.lora is not None and not encoder.pretrained:
        raise RecipeError(
            f"learn.encoders.{name}: LoRA is for an encoder with trained weights, and this one "
            "starts from random ones; leave `lora` out"
        )
    if before is not None and before.lora != spec.lora:
        was = "without LoRA" if before.lora is None else f"with LoRA ({before.lora})"
        raise RecipeError(
            f"learn.encoders.{name}: its encoder was trained {was} before; go on the same way, or "
            "leave it frozen"
        )


def attach_lora(name: str, encoder: Encoder, spec: LoraSpec) -> None:
    """Put LoRA on every linear layer of an encoder, in float32; its own layers stay as they are.

    Raises RecipeError for an encoder without linear layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_lora(encoder):
        return
    names = _linear_layers(encoder)
    if not names:
        raise RecipeError(
            f"learn.encoders.{name}: its encoder ({type(encoder).__name__}) has no linear layer "
            "that LoRA can be put on; learn all of it (a rate alone), or its `last_layers`"
        )
    device = next(encoder.parameters()).device
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        # a pattern of whole names: a list would also match what only ends like one of them
        target_modules="|".join(re.escape(key) for key in names),
    )
    inject_adapter_in_model(config, encoder)
    for key, parameter in encoder.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(device, torch.float32)
    encoder.requires_grad_(False)


def has_lora(encoder: Encoder) -> bool:
    """Whether `attach_lora` has been here."""
    return hasattr(encoder, "peft_config")


def _linear_layers(encoder: Encoder) -> list[str]:
    """Their names, without those that torch's fused attention reads past their forward."""
    fused = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return [
        f"{name}.{child_name}" if name else child_name
        for name, module in encoder.named_modules()
        if not isinstance(module, fused)
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear) and not isinstance(child, NonDynamicallyQuantizableLinear)
    ]


def merge_lora(encoder: Encoder) -> None:
    """Fold LoRA into the layers that it stands beside."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(encoder.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            encoder.set_submodule(name, module.get_base_layer())
    delattr(encoder, "peft_config")


def trained_tensors(encoder: Encoder, trained: TrainedEncoderState) -> dict[str, Tensor]:
    """The tensors themselves, by name; of tied ones the first."""
    state = encoder.state_dict(keep_vars=True)
    if trained.tensors != "all":
        return {key: state[key] for key in trained.tensors if key in state}
    first: dict[int, str] = {}
    for key, tensor in state.items():
        first.setdefault(id(tensor), key)
    return {key: state[key] for key in first.values()}


def set_train_mode(encoder: Encoder, mode: bool) -> None:
    """Train mode for what learns as a whole, eval for all else: dropout is for learners only.

    Layers with running statistics (BatchNorm) stay in eval even where they learn. Their statistics
    belong to the pretraining: the small batches here would spoil them, and an item's features would
    hang on the other items of its batch.
    """
    encoder.eval()
    if not mode or not any(p.requires_grad for p in encoder.parameters()):
        return
    for module in encoder.modules():
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            module.train()
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, nn.Module) and any(p.requires_grad for p in parameters):
            dropout.train()
    for module in encoder.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()


def check_gradients_reach(
    name: str, encoder: Encoder, spec: TrainableEncoder, features: Features
) -> None:
    """Raise RecipeError for what would never learn: these features give it no gradient."""
    values = features.values
    if spec.last_layers is None and not values.requires_grad:
        raise RecipeError(
            f"learn.encoders.{name}: its encoder ({type(encoder).__name__}) runs without "
            "gradients, so nothing of it can learn; leave it frozen"
        )
    for number, layer in enumerate(_last_layers(name, encoder, spec.last_layers or 0), 1):
        parameters = list(layer.parameters())
        reached = values.requires_grad and any(
            gradient is not None
            for gradient in torch.autograd.grad(
                values.sum(), parameters, retain_graph=True, allow_unused=True
            )
        )
        if parameters and not reached:
            raise RecipeError(
                f"learn.encoders.{name}: no gradient reaches layer {number} of its `last_layers` "
                f"{spec.last_layers}, because the features are taken before it or the encoder runs "
                "without gradients; learn all of it (a rate alone), or use `lora`"
            )
