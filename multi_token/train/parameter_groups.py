"""Parameter groups of a stage: trainable parts, learning rates and precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from multi_token.encoders import trainable_parameters, unfreeze
from multi_token.errors import MultiTokenError
from multi_token.language_model.lora import adapter_parameters
from multi_token.language_model.quantization import quantized_parameters
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.projectors.base import Projector
from multi_token.recipe.train import LearningRate, Trainable, TrainableEncoder


class ParameterGroup(NamedTuple):
    """Parameters that learn alike."""

    name: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter]
    decays_vectors: bool = False
    """Otherwise biases and norms are spared, as usual."""


def parameter_groups(
    model: MultiTokenForConditionalGeneration, learn: Trainable, *, weight_decay: float = 0.0
) -> list[ParameterGroup]:
    """Return a stage's parameter groups. `weight_decay` is the default of groups without one."""
    groups: list[ParameterGroup] = []

    def add(name: str, pace: LearningRate, parameters: list[nn.Parameter]) -> None:
        decay = weight_decay if pace.weight_decay is None else pace.weight_decay
        groups.append(ParameterGroup(name, pace.lr, decay, parameters))

    biases: list[nn.Parameter] = []
    # one group where all learn alike, one for each instance where the recipe tells them apart
    rest: dict[str, tuple[LearningRate, list[nn.Parameter]]] = {}
    for name, projector in model.projectors.items():
        pace = learn.projector(name)
        if pace is None:
            continue
        apart: set[int] = set()
        if isinstance(projector, Projector):
            if projector.closed_form:
                apart |= {id(p) for p in projector.closed_form.parameters()}
            if learn.projector_biases is not None:
                last = [layer.bias for layer in projector.final_layers()]
                apart |= {id(p) for p in last}
                biases += last
        group = f"projector {name}" if isinstance(learn.projectors, dict) else "projectors"
        rest.setdefault(group, (pace, []))[1].extend(
            p for p in projector.parameters() if id(p) not in apart
        )
    if learn.projector_biases is not None:
        pace = learn.projector_biases
        groups.append(
            # vectors all of them: what is said of them here is meant for them
            ParameterGroup(
                "projector_biases", pace.lr, pace.weight_decay or 0.0, biases, decays_vectors=True
            )
        )
    for group, (pace, parameters) in rest.items():
        add(group, pace, parameters)
    if learn.adapter is not None:
        add("adapter", learn.adapter, adapter_parameters(model.language_model))
    if learn.language_model is not None:
        add("language_model", learn.language_model, list(model.language_model.parameters()))
    for name, spec in trainable_encoders(model, learn).items():
        add(f"encoder {name}", spec, trainable_parameters(name, model.encoder(name), spec))
    return groups


def optimizer_groups(groups: Iterable[ParameterGroup]) -> list[dict[str, Any]]:
    """As torch's optimizers take them, each split into what is decayed and what is not."""
    found = []
    for group in groups:
        for decayed in (True, False):
            chosen = [
                p for p in group.parameters if (p.ndim > 1 or group.decays_vectors) == decayed
            ]
            if chosen:
                own = group.weight_decay if decayed else 0.0
                found.append(
                    {"params": chosen, "lr": group.lr, "weight_decay": own, "name": group.name}
                )
    return found


def trainable_encoders(
    model: MultiTokenForConditionalGeneration, learn: Trainable
) -> dict[str, TrainableEncoder]:
    """Return the trainable part of each encoder in a stage, by instance.

    One that starts from random weights learns with its projector, unless the recipe says more.
    """
    found = {}
    for name in model.modalities:
        encoder, pace = model.encoder(name), learn.projector(name)
        if name in learn.encoders:
            found[name] = learn.encoders[name]
        elif (
            pace is not None and not encoder.pretrained and any(True for _ in encoder.parameters())
        ):
            found[name] = TrainableEncoder(lr=pace.lr, weight_decay=pace.weight_decay)
    return found


def freeze_and_unfreeze(model: MultiTokenForConditionalGeneration, learn: Trainable) -> None:
    """Let the stage's parameters learn, freeze all others.

    Raises MultiTokenError if none learn, or for a language model that cannot learn as a whole.
    """
    model.requires_grad_(False)
    for name, spec in trainable_encoders(model, learn).items():
        model.trained_encoders[name] = unfreeze(
            name, model.encoder(name), spec, model.trained_encoders.get(name)
        )
    if learn.language_model is not None:
        _unfreeze_language_model(model)
    for group in parameter_groups(model, learn):
        if not group.parameters:
            raise MultiTokenError(f"nothing to learn under {group.name!r}")
        for parameter in group.parameters:
            parameter.requires_grad_(True)


def _unfreeze_language_model(model: MultiTokenForConditionalGeneration) -> None:
    """All of it in float32: small steps would be lost in 16 bits, and integers take none."""
    if quantized_parameters(model.language_model):
        raise MultiTokenError(
            "learn.language_model trains all weights, but those of the language model are "
            "quantized; learn an `adapter` on it (QLoRA), or set model.quantization to null and "
            "name weights that are not quantized"
        )
    if hasattr(model.language_model, "peft_config"):
        raise MultiTokenError(
            "learn.language_model trains the weights that the model's adapter was made for; learn "
            "`adapter`, or merge it first (`multi-token export RUN --to merged`) and train that"
        )
    model.language_model.float()
    model.trained_language_model = True
