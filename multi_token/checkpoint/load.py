"""One folder: what was trained in safetensors, references and revisions of the rest.

    config.json             schema, language model, modalities, what of encoders was trained
    projectors.safetensors  <modality>.<parameter>
    encoders.safetensors    <modality>.<parameter> of encoders that were trained (if any)
    adapter/                LoRA, as PEFT writes it (if any)
    language_model/         the language model, as transformers writes it (if all of it was trained)

Border: the only file that reads or writes this folder. Names of classes on disk are registry names,
never import paths; loading is strict.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multi_token import __version__
from multi_token.chat.format import ChatFormat
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.language_model_folder import (
    LANGUAGE_MODEL,
    read_language_model,
    with_saved_language_model,
    write_language_model,
)
from multi_token.checkpoint.references import (
    absolutize,
    base_model_tensors,
    check_fingerprint,
    fingerprint,
    relativize,
    resolve,
)
from multi_token.encoders import TrainedEncoderState, attach_lora, build_encoders, trained_tensors
from multi_token.errors import CheckpointError
from multi_token.language_model.embeddings_only import load_embeddings
from multi_token.language_model.loading import load_language_model, load_tokenizer
from multi_token.language_model.quantization import quantized_parameters
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenConfig, MultiTokenForConditionalGeneration
from multi_token.processor import MultiTokenProcessor
from multi_token.recipe.conflicts import check_renamed
from multi_token.recipe.recipe import ModelSpec
from multi_token.registry import validate_fields

SCHEMA = 1
CONFIG, PROJECTORS, ADAPTER = "config.json", "projectors.safetensors", "adapter"
ENCODER_WEIGHTS = "encoders.safetensors"


def compose(
    spec: ModelSpec, *, max_tokens: int | None = None, with_layers: bool = True
) -> MultiTokenForConditionalGeneration:
    """The model of a recipe before any training: frozen parts loaded, projectors new.

    Unless `with_layers`, of the language model its embeddings alone (`EmbeddingsOnly`).
    """
    load_child = load_language_model if with_layers else load_embeddings
    language_model: Any = load_child(
        spec.language_model,
        revision=spec.revision,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        quantization=spec.quantization,
    )
    width = language_model.get_input_embeddings().weight.shape[1]
    encoders = build_encoders(spec.modalities)
    projectors = {
        name: modality.projector.build(encoders[name].dim, int(width))
        for name, modality in spec.modalities.items()
    }
    processor = MultiTokenProcessor(
        chat=ChatFormat(
            load_tokenizer(spec.language_model, spec.revision),
            spec.chat_template,
            spec.train_on_turns,
        ),
        modalities=spec.modalities,
        fetch=Fetch(),
        max_tokens=max_tokens,
    )
    commit = getattr(language_model.config, "_commit_hash", None)
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": {
            **absolutize(spec.model_dump(mode="json")),
            "revision": commit or spec.revision,
            # the template itself, so that a checkpoint does not hang on a file elsewhere
            "chat_template": processor.chat.template if spec.chat_template else None,
        },
        "identity": fingerprint(language_model),
        "base_identity": None,
        "base_model": None,
    }
    config = MultiTokenConfig(**fields)
    return MultiTokenForConditionalGeneration(
        config, language_model, spec.modalities, encoders, projectors, processor
    )


def save(model: MultiTokenForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
    """Write what was trained. `config.json` comes last: a folder without it is half-written.

    References to parts that lie inside the folder are written relative to it (`./language_model`),
    so that it may be moved; all others stay what they are.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).unlink(missing_ok=True)
    _write(out / PROJECTORS, _projector_tensors(model, model.modalities))
    if model.trained_encoders:
        _write(out / ENCODER_WEIGHTS, _encoder_tensors(model, model.trained_encoders))
    else:
        (out / ENCODER_WEIGHTS).unlink(missing_ok=True)
    has_adapter = hasattr(model.language_model, "peft_config")
    if has_adapter:
        model.language_model.save_pretrained(out / ADAPTER)
        (out / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    base_model = model.config.base_model
    described = model.config.model
    if model.trained_language_model:
        assert model.processor is not None, "a model that was composed or loaded has a reader"
        chat = model.processor.chat
        write_language_model(
            model.language_model, chat.tokenizer, chat.template, out / LANGUAGE_MODEL
        )
        if not Path(described["language_model"]).exists():
            base_model = base_model or described["language_model"]
        described = {**with_saved_language_model(described), "dtype": "auto"}
    fields = {
        "model_type": MultiTokenConfig.model_type,
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": relativize(described, out),
        "identity": (
            fingerprint(model.language_model)
            if model.trained_language_model
            else model.config.identity
        ),
        "base_identity": _base_fingerprint(model) if model.trained_language_model else None,
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
    }
    text = json.dumps(fields, indent=2) + "\n"
    _atomically(out / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _base_fingerprint(model: MultiTokenForConditionalGeneration) -> dict[str, Any]:
    """Of the language model before all of it was trained."""
    return model.config.base_identity or model.config.identity or {}


def _projector_tensors(
    model: MultiTokenForConditionalGeneration, names: Iterable[str]
) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in model.projectors[name].state_dict(keep_vars=True).items()
    }


def _encoder_tensors(
    model: MultiTokenForConditionalGeneration, trained: Mapping[str, TrainedEncoderState]
) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, what in trained.items()
        for key, tensor in trained_tensors(model.encoder(name), what).items()
    }


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    kept = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    _atomically(path, lambda partial: save_file(kept, partial, {"format": "pt"}))


def _atomically(path: Path, write: Any) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read_config(folder: str | os.PathLike[str], *, revision: str | None = None) -> dict[str, Any]:
    """The checked `config.json` of a checkpoint of ours, in a folder or on the hub.

    Raises CheckpointError.
    """
    path = local_folder(folder, revision=revision, only=[CONFIG])
    if not path.is_dir():
        raise CheckpointError(f"expected the folder of a run, found nothing at {path.absolute()}")
    if not (path / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no {CONFIG}: it is not a checkpoint of multi_token, or its training has "
            "not finished (run `multi-token train` again with the same recipe to go on)"
        )
    try:
        fields = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG} is not JSON: {error}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != MultiTokenConfig.model_type:
        raise CheckpointError(
            f"{path} holds a model of type {kind!r}, made by something else; expected one of type "
            f"{MultiTokenConfig.model_type!r}, written by `multi-token train`"
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


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    language_model: str | None = None,
    device: str | None = None,
    with_layers: bool = True,
) -> MultiTokenForConditionalGeneration:
    """A run's folder or hub name -> the model with its reader, in eval mode.

    `revision`: branch, tag or commit of a hub name (`user/run@revision` says the same).
    `language_model`: where the frozen one is now, if it has moved. `with_layers`: see `compose`.

    Raises CheckpointError for one that is not ours, not whole, or of another language model.
    """
    fields = read_config(folder, revision=revision)
    path = local_folder(folder, revision=revision)
    spec_fields = dict(fields["model"])
    if language_model is not None:
        spec_fields |= {"language_model": language_model, "revision": None}
    spec = validate_fields(ModelSpec, resolve(spec_fields, path), where=str(path / CONFIG))
    model = compose(spec, with_layers=with_layers)
    model.config.base_model = fields.get("base_model")
    load_trained(model, path, fields)
    if fields.get("base_identity"):
        model.trained_language_model = True
        model.config.base_identity = fields["base_identity"]
    return move_to_device(model, device).eval() if device else model.eval()


def move_to_device(
    model: MultiTokenForConditionalGeneration, device: Any
) -> MultiTokenForConditionalGeneration:
    """The model on a device (transformers' decorator hides the arguments of `to` from checkers)."""
    nn.Module.to(model, device)  # in place
    return model


def load_trained(
    model: MultiTokenForConditionalGeneration,
    folder: str | os.PathLike[str],
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Read the trained parts of a checkpoint into a composed model, strictly.

    Modalities that the model has beside those of the checkpoint stay as they are.
    """
    fields = fields or read_config(folder)
    path = Path(folder)
    name = model.config.model["language_model"]
    if fields.get("base_identity") and Path(name) != (path / LANGUAGE_MODEL).absolute():
        check_fingerprint(fields["base_identity"], _base_fingerprint(model), folder=path, name=name)
        _load_language_model(model, path, fields)
    elif fields.get("identity"):
        check_fingerprint(fields["identity"], model.config.identity, folder=path, name=name)
    for name in fields["closed_form"]:
        if model.projector(name).closed_form is None:
            model.projector(name).add_closed_form()
    _read_into(_projector_tensors(model, fields["model"]["modalities"]), path / PROJECTORS)
    _load_encoders(model, path, fields)
    if fields["adapter"]:
        load_adapter(model, path / ADAPTER)


def _load_language_model(
    model: MultiTokenForConditionalGeneration, path: Path, fields: Mapping[str, Any]
) -> None:
    """Read a language model that was trained over the one that it was trained from."""
    if quantized_parameters(model.language_model):
        raise CheckpointError(
            f"{path} holds a language model all of which was trained, and that of the recipe is "
            f"quantized; set model.language_model to {path / LANGUAGE_MODEL} and quantize that"
        )
    found = read_language_model(path / LANGUAGE_MODEL, fields["identity"])
    model.language_model.float()
    expected = base_model_tensors(model.language_model.state_dict(keep_vars=True).items())
    _copy_into(expected, found, path / LANGUAGE_MODEL)
    model.trained_language_model = True
    model.config.base_identity = fields["base_identity"]


def _load_encoders(
    model: MultiTokenForConditionalGeneration, path: Path, fields: Mapping[str, Any]
) -> None:
    """Read what of the encoders was trained, and only that."""
    trained = {
        name: validate_fields(
            TrainedEncoderState, entry, where=f"{path / CONFIG}, encoder of {name}"
        )
        for name, entry in fields.get("encoders", {}).items()
    }
    for name in fields["model"]["modalities"]:
        if name in model.trained_encoders and name not in trained:
            raise CheckpointError(
                f"{path} lacks the weights of the encoder of {name!r}, which are nowhere else: it "
                "starts from random ones"
            )
    for name, what in trained.items():
        if what.lora is None:
            model.encoder(name).float()  # as it was when it learned
        else:
            attach_lora(name, model.encoder(name), what.lora)
    if trained or (path / ENCODER_WEIGHTS).exists():
        _read_into(_encoder_tensors(model, trained), path / ENCODER_WEIGHTS)
    model.trained_encoders |= trained


def _read_into(expected: Mapping[str, Tensor], path: Path) -> None:
    """Copy a file's tensors into those of a model. Raises CheckpointError if any is amiss."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    _copy_into(expected, found, path)


@torch.no_grad()
def _copy_into(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    check_state_dict(path, expected, found)
    for key, tensor in expected.items():
        tensor.copy_(found[key])


def load_adapter(
    model: MultiTokenForConditionalGeneration, path: Path, *, where: Path | None = None
) -> None:
    """Put the adapter of a PEFT folder (safetensors) on the language model, frozen.

    `where`: what a fault is said of, if not of this folder. Raises CheckpointError.
    """
    from peft import PeftConfig, PeftModel, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    try:
        tensors = load_file(path / "adapter_model.safetensors")
        config = PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    # where the base is now, not where it was when the adapter was saved
    config.base_model_name_or_path = getattr(model.language_model, "name_or_path", None)
    if not isinstance(model.language_model, PeftModel):
        model.language_model = get_peft_model(model.language_model, config)
    expected = get_peft_model_state_dict(model.language_model)
    check_state_dict(where or path / "adapter_model.safetensors", expected, tensors)
    set_peft_model_state_dict(model.language_model, tensors)
    for parameter in model.language_model.parameters():
        parameter.requires_grad_(False)


def check_state_dict(
    path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError, with every tensor that is missing, unknown or of other shape."""
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
