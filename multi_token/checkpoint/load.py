"""Reads a checkpoint into a composed model.

Loading raises for every tensor that is missing, unknown or of another shape. The model is any
object with the parts of `ComposedModel`: this folder imports no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from multi_token import __version__
from multi_token.checkpoint.fingerprint import base_model_tensors, check_fingerprint
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.language_model_folder import LANGUAGE_MODEL, read_language_model
from multi_token.checkpoint.references import resolve_references
from multi_token.checkpoint.save import (
    ADAPTER,
    CONFIG,
    ENCODER_WEIGHTS,
    MODEL_TYPE,
    PROJECTORS,
    SCHEMA,
    base_fingerprint,
    encoder_tensors,
    projector_tensors,
)
from multi_token.encoders import TrainedEncoderState, attach_lora
from multi_token.errors import CheckpointError
from multi_token.language_model.lora import place_adapter
from multi_token.language_model.quantization import quantized_parameters
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.renamed import check_renamed
from multi_token.registry import validate_fields
from multi_token.types import ComposedModel


def read_config(folder: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """The checked `config.json` of a checkpoint, in a folder or on the hub.

    Raises CheckpointError.
    """
    path = local_folder(folder, revision=revision, only=[CONFIG])
    if not path.is_dir():
        raise CheckpointError(f"expected the folder of a run, found nothing at {path.absolute()}")
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG}: it is not a checkpoint of multi_token, or its training has "
            "not finished (to resume it, run `multi-token train` again with the same recipe)"
        )
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is not JSON: {error}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"{path} holds a model of type {kind!r}; expected one of type {MODEL_TYPE!r}, written "
            "by `multi-token train`"
        )
    if fields.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} has checkpoint schema {fields.get('schema')!r}, this version reads {SCHEMA} "
            f"({__version__}); it was written by multi_token {fields.get('multi_token_version')}"
        )
    try:
        check_renamed(fields["model"], "model")
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from None
    return fields


def run_digest(run: str | os.PathLike[str]) -> str:
    """Return a digest of a run's trained tensors and config: 32 hexadecimal digits.

    Of a language model, only its fingerprint in the config counts. Raises CheckpointError if there
    is no complete run.
    """
    read_config(run)
    folder, digest = local_folder(run), hashlib.sha256()
    names = (folder / CONFIG, folder / PROJECTORS, folder / ENCODER_WEIGHTS)
    for path in (*names, *sorted((folder / ADAPTER).glob("*"))):
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()[:32]


def read_spec(
    folder: Path, fields: Mapping[str, Any], *, language_model: str | None = None, **changes: Any
) -> ModelSpec:
    """The model section of a checkpoint, with absolute paths. Raises RecipeError.

    `language_model`: path or hub name of the frozen language model, if it has moved. `changes`:
    fields of the section to replace, None for none.
    """
    section = dict(fields["model"])
    section |= {name: value for name, value in changes.items() if value is not None}
    if language_model is not None:
        section |= {"language_model": language_model, "revision": None}
    return validate_fields(
        ModelSpec, resolve_references(section, folder), where=str(folder / CONFIG)
    )


def load_trained(
    model: ComposedModel,
    folder: str | os.PathLike[str],
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Read the trained parts of a checkpoint into a composed model.

    Modalities that only the model has keep their weights. Raises CheckpointError.
    """
    fields = fields or read_config(folder)
    path = Path(folder)
    name = model.config.model["language_model"]
    # nothing to copy if the recipe names the trained language model itself (`RUN/language_model`)
    if fields.get("base_identity") and Path(name) != (path / LANGUAGE_MODEL).absolute():
        check_fingerprint(fields["base_identity"], base_fingerprint(model), folder=path, name=name)
        _load_language_model(model, path, fields)
    elif fields.get("identity"):
        check_fingerprint(fields["identity"], model.config.identity, folder=path, name=name)
    # the closed-form part is a module that only a fitted projector has
    for name in fields["closed_form"]:
        if model.projector(name).closed_form is None:
            model.projector(name).add_closed_form()
    _read_into(projector_tensors(model, fields["model"]["modalities"]), path / PROJECTORS)
    _load_encoders(model, path, fields)
    if fields["adapter"]:
        load_adapter(model, path / ADAPTER)


def _load_language_model(model: ComposedModel, path: Path, fields: Mapping[str, Any]) -> None:
    if quantized_parameters(model.language_model):
        raise CheckpointError(
            f"{path} holds a fully trained language model, and that of the recipe is quantized; "
            f"set model.language_model to {path / LANGUAGE_MODEL} and quantize that"
        )
    found = read_language_model(path / LANGUAGE_MODEL, fields["identity"])
    expected = base_model_tensors(model.language_model.state_dict(keep_vars=True).items())
    if any(isinstance(tensor, DTensor) for tensor in expected.values()):
        _copy_into(expected, found, path / LANGUAGE_MODEL)
    else:
        check_state_dict(path / LANGUAGE_MODEL, expected, found)
        for key, tensor in expected.items():
            # float32, whatever the precision of the base; on the host mapped from the file, so that
            # the processes of a machine share its pages
            tensor.data = found[key].to(tensor.device)
    model.trained_language_model = True
    model.config.base_identity = fields["base_identity"]
    # the precision it was trained to compute in, in which the result is loaded
    model.config.model = {**model.config.model, "dtype": fields["model"]["dtype"]}


def _load_encoders(model: ComposedModel, path: Path, fields: Mapping[str, Any]) -> None:
    trained = {
        name: validate_fields(
            TrainedEncoderState, entry, where=f"{path / CONFIG}, encoder of {name}"
        )
        for name, entry in fields.get("encoders", {}).items()
    }
    for name in fields["model"]["modalities"]:
        if name in model.trained_encoders and name not in trained:
            raise CheckpointError(
                f"{path} lacks the weights of the encoder of {name!r}, which starts from random "
                "weights, so no other file has them; copy the run again, or train it again"
            )
    for name, state in trained.items():
        if state.lora is None:
            model.encoder(name).float()  # its precision in training
        else:
            attach_lora(name, model.encoder(name), state.lora)
    # also a file that nothing refers to, so that it is reported as unknown tensors
    if trained or (path / ENCODER_WEIGHTS).exists():
        _read_into(encoder_tensors(model, trained), path / ENCODER_WEIGHTS)
    model.trained_encoders |= trained


def _read_into(expected: Mapping[str, Tensor], path: Path) -> None:
    """Copy a file's tensors into those of a model. Raises CheckpointError unless all fit."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _copy_into(expected, found, path)


@torch.no_grad()
def _copy_into(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    check_state_dict(path, expected, found)
    for key, tensor in expected.items():
        copy_full(found[key], tensor)


def copy_full(full: Tensor, target: Tensor) -> None:
    """Copy a full tensor, which every process has, into one that may be in shards."""
    if isinstance(target, DTensor):
        # without a source rank: each process cuts its own shard, and none sends
        full = distribute_tensor(
            full.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(full)


def load_adapter(model: ComposedModel, path: Path, *, where: Path | None = None) -> None:
    """Attach the adapter of a PEFT folder (safetensors) to the language model, frozen.

    `where`: folder that errors name; default: `path`. Raises CheckpointError.
    """
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        tensors = load_file(path / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(path))
        # the base's path now: PEFT would warn about the one at the time of saving
        config.base_model_name_or_path = getattr(model.language_model, "name_or_path", None)
        if not isinstance(model.language_model, PeftModel):
            # raises for target modules that the language model does not have
            model.language_model = get_peft_model(model.language_model, config)
            place_adapter(model.language_model)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{where or path} cannot be read: {error}") from None
    expected = get_peft_model_state_dict(model.language_model)
    check_state_dict(where or path / "adapter_model.safetensors", expected, tensors)
    set_peft_model_state_dict(model.language_model, tensors)
    for parameter in model.language_model.parameters():
        parameter.requires_grad_(False)


def check_state_dict(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError with every tensor that is missing, unknown or of another shape."""
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key].shape != found[key].shape
    ]
    faults = [
        *([f"lacks {', '.join(missing)}"] if missing else []),
        *([f"has unknown {', '.join(extra)}"] if extra else []),
        *shapes,
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit its {CONFIG}: it {'; '.join(faults)}")
