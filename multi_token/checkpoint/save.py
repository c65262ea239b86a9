"""Writes a checkpoint: one folder with the trained tensors and references to all other parts.

    config.json             schema, language model, modalities, trained parts of encoders
    projectors.safetensors  <modality>.<parameter>
    encoders.safetensors    <modality>.<parameter> of trained encoders (if any)
    adapter/                LoRA, as PEFT writes it (if any)
    language_model/         the language model, as transformers writes it (if all of it was trained)

Names of classes on disk are registry names, never import paths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from multi_token import __version__
from multi_token.chat.format import ChatFormat
from multi_token.checkpoint.atomic import atomic_file
from multi_token.checkpoint.fingerprint import fingerprint
from multi_token.checkpoint.language_model_folder import (
    LANGUAGE_MODEL,
    with_saved_language_model,
    write_language_model,
)
from multi_token.checkpoint.references import absolutize, relativize
from multi_token.encoders import TrainedEncoderState, trained_tensors
from multi_token.recipe.model import ModelSpec
from multi_token.types import ComposedModel

SCHEMA = 1
MODEL_TYPE = "multi_token"
CONFIG, PROJECTORS, ADAPTER = "config.json", "projectors.safetensors", "adapter"
ENCODER_WEIGHTS = "encoders.safetensors"


def untrained_fields(spec: ModelSpec, language_model: Any, chat: ChatFormat) -> dict[str, Any]:
    """Return the fields of config.json that describe a composed model before any training."""
    commit = getattr(language_model.config, "_commit_hash", None)
    return {
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": {
            **absolutize(spec.model_dump(mode="json")),
            # the commit itself, since a branch or a tag may move
            "revision": commit or spec.revision,
            # the template itself, since a file elsewhere may change
            "chat_template": chat.source if spec.chat_template else None,
        },
        "identity": fingerprint(language_model),
        "base_identity": None,
        "base_model": None,
    }


def save(model: ComposedModel, folder: str | os.PathLike[str]) -> None:
    """Write the trained tensors, and references to all other parts.

    References to parts inside the folder are relative (`./language_model`), so that the folder may
    be moved. All others are unchanged.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    # config.json is removed first and written last: a folder without it is read as incomplete
    (out / CONFIG).unlink(missing_ok=True)
    write_tensors(out / PROJECTORS, projector_tensors(model, model.modalities))
    if model.trained_encoders:
        write_tensors(out / ENCODER_WEIGHTS, encoder_tensors(model, model.trained_encoders))
    else:
        (out / ENCODER_WEIGHTS).unlink(missing_ok=True)
    # PEFT's own attribute, which a model without wrapper does not have
    has_adapter = hasattr(model.language_model, "peft_config")
    if has_adapter:
        model.language_model.save_pretrained(out / ADAPTER)
        (out / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    base_model = model.config.base_model
    described = model.config.model
    if model.trained_language_model:
        assert model.processor is not None, "from_spec and from_pretrained give a processor"
        chat = model.processor.chat
        write_language_model(
            model.language_model, chat.tokenizer, chat.template, out / LANGUAGE_MODEL
        )
        # the hub name is kept for the model card; the weights are in the run now
        if not Path(described["language_model"]).exists():
            base_model = base_model or described["language_model"]
        described = with_saved_language_model(described)
    fields = {
        "model_type": MODEL_TYPE,
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": relativize(described, out),
        "identity": (
            fingerprint(model.language_model)
            if model.trained_language_model
            else model.config.identity
        ),
        "base_identity": base_fingerprint(model) if model.trained_language_model else None,
        "base_model": base_model,
        "adapter": has_adapter,
        "closed_form": sorted(
            name
            for name, projector in model.projectors.items()
            if getattr(projector, "closed_form", None) is not None
        ),
        "encoders": {
            name: trained.model_dump(mode="json")
            for name, trained in sorted(model.trained_encoders.items())
        },
        # of a run of `combine` alone
        **({"combined_from": combined} if (combined := model.config.combined_from) else {}),
    }
    text = json.dumps(fields, indent=2) + "\n"
    with atomic_file(out / CONFIG) as partial:
        partial.write_text(text, encoding="utf-8")


def base_fingerprint(model: ComposedModel) -> dict[str, Any]:
    """Fingerprint of the language model before any of its own weights were trained."""
    return model.config.base_identity or model.config.identity or {}


def projector_tensors(model: ComposedModel, names: Iterable[str]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in model.projectors[name].state_dict(keep_vars=True).items()
    }


def encoder_tensors(
    model: ComposedModel, trained: Mapping[str, TrainedEncoderState]
) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, state in trained.items()
        for key, tensor in trained_tensors(model.encoder(name), state).items()
    }


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device as one safetensors file, completely or not at all."""
    kept = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    with atomic_file(path) as partial:
        save_file(kept, partial, {"format": "pt"})
