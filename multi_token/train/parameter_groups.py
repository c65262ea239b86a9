"""Parameter groups of a stage's `learn` section, with learning rate and weight decay.

All other parameters are frozen. Trained parameters are float32.
"""

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
    """Parameters with one learning rate and weight decay."""

    name: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter]
    decays_vectors: bool = False
    """Decay biases and norms too, which are spared by default."""


def parameter_groups(
    model: MultiTokenForConditionalGeneration, learn: Trainable, *, weight_decay: float = 0.0
) -> list[ParameterGroup]:
    """Return the groups of a stage. `weight_decay`: default for groups without their own."""
    groups: list[ParameterGroup] = []

    def add(name: str, setting: LearningRate, parameters: list[nn.Parameter]) -> None:
        decay = weight_decay if setting.weight_decay is None else setting.weight_decay
        groups.append(ParameterGroup(name, setting.lr, decay, parameters))

    biases: list[nn.Parameter] = []
    # one group for all projectors, or one for each where the recipe names them
    rest: dict[str, tuple[LearningRate, list[nn.Parameter]]] = {}
    for name, projector in model.projectors.items():
        setting = learn.projector(name)
        if setting is None:
            continue
        apart: set[int] = set()
        if isinstance(projector, Projector):
            if projector.closed_form:
                # frozen: training starts from zero beside it (see decision 0009)
                apart |= {id(p) for p in projector.closed_form.parameters()}
            if learn.projector_biases is not None:
                last = [layer.bias for layer in projector.final_layers()]
                apart |= {id(p) for p in last}
                biases += last
        group = f"projector {name}" if isinstance(learn.projectors, dict) else "projectors"
        rest.setdefault(group, (setting, []))[1].extend(
            p for p in projector.parameters() if id(p) not in apart
        )
    if learn.projector_biases is not None:
        setting = learn.projector_biases
        groups.append(
            # biases are vectors: a decay that the recipe gives this group is meant for them
            ParameterGroup(
                "projector_biases",
                setting.lr,
                setting.weight_decay or 0.0,
                biases,
                decays_vectors=True,
            )
        )
    for group, (setting, parameters) in rest.items():
        add(group, setting, parameters)
    if learn.adapter is not None:
        add("adapter", learn.adapter, adapter_parameters(model.language_model))
    if learn.language_model is not None:
        add("language_model", learn.language_model, list(model.language_model.parameters()))
    for name, spec in trainable_encoders(model, learn).items():
        add(f"encoder {name}", spec, trainable_parameters(name, model.encoder(name), spec))
    return groups


def optimizer_groups(groups: Iterable[ParameterGroup]) -> list[dict[str, Any]]:
    """Return groups for torch's optimizers, each split into decayed and spared parameters."""
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
    """Return the encoders that a stage trains, by instance.

    An encoder with random weights is trained with its projector, unless the recipe names it.
    """
    found = {}
    for name in model.modalities:
        encoder, setting = model.encoder(name), learn.projector(name)
        if name in learn.encoders:
            found[name] = learn.encoders[name]
        elif (
            setting is not None
            and not encoder.pretrained
            and any(True for _ in encoder.parameters())
        ):
            found[name] = TrainableEncoder(lr=setting.lr, weight_decay=setting.weight_decay)
    return found


def freeze_and_unfreeze(
    model: MultiTokenForConditionalGeneration, learn: Trainable, *, to_be_sharded: bool = False
) -> None:
    """Unfreeze the parameters of a stage, and freeze all others.

    `to_be_sharded`: leave the language model's precision to `FsdpShards`, which casts by layer.
    Raises MultiTokenError for a group without parameters, and for a language model whose weights
    cannot be trained.
    """
    # all at first: an earlier stage may have trained parts that this one freezes
    model.requires_grad_(False)
    for name, spec in trainable_encoders(model, learn).items():
        model.trained_encoders[name] = unfreeze(
            name, model.encoder(name), spec, model.trained_encoders.get(name)
        )
    if learn.language_model is not None:
        _check_unfreezable(model)
        model.trained_language_model = True
        if not to_be_sharded:
            # 16 bits would round small updates away
            model.language_model.float()
    for group in parameter_groups(model, learn):
        if not group.parameters:
            raise MultiTokenError(f"nothing to train under {group.name!r}")
        for parameter in group.parameters:
            parameter.requires_grad_(True)


def _check_unfreezable(model: MultiTokenForConditionalGeneration) -> None:
    """Raise MultiTokenError for a language model whose weights cannot be trained."""
    if quantized_parameters(model.language_model):
        raise MultiTokenError(
            "learn.language_model trains all weights, but those of the language model are "
            "quantized; train an `adapter` on it (QLoRA), or set model.quantization to null and "
            "name weights that are not quantized"
        )
    if hasattr(model.language_model, "peft_config"):
        raise MultiTokenError(
            "learn.language_model trains the weights that the model's adapter was trained for; "
            "train `adapter`, or merge it first (`multi-token export RUN --to merged`) and train "
            "the result"
        )
