"""Imports a folder that sshh12/multi_token trained, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multi_token.chat.format import ChatFormat
from multi_token.checkpoint.atomic import staged_folder
from multi_token.checkpoint.load import check_state_dict
from multi_token.checkpoint.save import save
from multi_token.convert.original_builders import BUILDERS, OriginalBuilder
from multi_token.convert.tensors import (
    load_foreign_adapter,
    model_files,
    read_json,
    read_tensors,
)
from multi_token.errors import ChatTemplateError, ConvertError, MultiTokenError
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.registry import did_you_mean, validate_fields
from multi_token.types import Conversation, Message, Text

_SUFFIX = "-lmm"
"""Added to the language model's type in the original's configurations."""
_WRAPPER = "base_model.model."
"""PEFT's prefix, where the model was wrapped when its tensors were saved."""
_OWN_KEYS = ("modalities", "modality_builder", "model_cls", "_name_or_path", "architectures")
_SAME = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_LANGUAGE_MODEL = "language_model"
_ADAPTER_CONFIG = "adapter_config.json"
_TOKENIZER_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Module -> the package that holds it."""


def is_original(fields: Mapping[str, Any]) -> bool:
    """Return True if the original's training wrote a config.json."""
    return "modality_builder" in fields or str(fields.get("model_type")).endswith(_SUFFIX)


def import_original(
    source: Path,
    out: Path,
    *,
    language_model: str | None = None,
    encoder: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Write the run `out` with the projector, and the adapter or language model, of `source`.

    `language_model` and `encoder` replace the names in the folder and in the original's code, if
    those cannot be loaded. Nothing is written unless every tensor fits.

    Raises ConvertError, or CheckpointError for tensors that do not fit; both name them.
    """
    fields = read_json(source / "config.json")
    builder = _find_builder(fields, source)
    projector, whole_model = _read_tensors(source, builder)
    named = language_model or _base_name(source, fields)
    with staged_folder(out) as partial:
        if whole_model:
            base = _write_language_model(source, partial, fields, whole_model, named)
        else:
            base = _check_base(source, fields, named, given=language_model is not None)
        encoder = encoder or builder.encoder
        _check_encoder_loadable(encoder, source)
        modality = {
            "type": builder.modality_type,
            "encoder": encoder,
            **(builder.fields or {}),
            "projector": builder.projector_fields,
        }
        spec = {
            "language_model": base,
            "chat_template": chat_template,
            "modalities": {builder.name: modality},
        }
        model = MultiTokenForConditionalGeneration.from_spec(
            validate_fields(ModelSpec, spec, where="the imported recipe")
        )
        _check_maskable(model.require_processor().chat)
        network = model.projector(builder.name).network
        names = {_original_name(name, builder): name for name in network.state_dict()}
        expected = {theirs: network.state_dict()[name] for theirs, name in names.items()}
        check_state_dict(source, expected, projector)
        # feature_mean and feature_scale stay 0 and 1: the original did not standardize
        network.load_state_dict({names[key]: value for key, value in projector.items()})
        if (source / _ADAPTER_CONFIG).is_file():
            load_foreign_adapter(model, source, partial)
        save(model, partial)


def _find_builder(fields: Mapping[str, Any], source: Path) -> OriginalBuilder:
    name = fields.get("modality_builder")
    if name not in BUILDERS:
        raise ConvertError(
            f"{source / 'config.json'} names the modality builder {name!r}"
            f"{did_you_mean(str(name), BUILDERS)}; known are {', '.join(BUILDERS)}"
        )
    builder = BUILDERS[name]
    if builder.fields is None:
        raise ConvertError(
            f"{source} was made with the builder {name}, which cannot be imported: {builder.reason}"
        )
    return builder


def _read_tensors(
    source: Path, builder: OriginalBuilder
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The folder's tensors of projectors, and those of a language model that was trained whole."""
    projector: dict[str, Tensor] = {}
    language_model: dict[str, Tensor] = {}
    beside = source / "non_lora_trainables.bin"
    for path in (*model_files(source), *([beside] if beside.is_file() else [])):
        for key, tensor in read_tensors(path).items():
            plain = key.removeprefix(_WRAPPER)
            # a projector of another modality too, so that it is reported as unknown
            of = projector if "_lmm_projector." in plain else language_model
            of[plain] = tensor
    if not projector:
        raise ConvertError(
            f"{source} holds no tensor of {builder.modality}_lmm_projector: it should be in "
            "non_lora_trainables.bin, or with the weights of the complete model"
        )
    return projector, language_model


def _original_name(name: str, builder: OriginalBuilder) -> str:
    """A parameter of our projector's network -> the original's name of it."""
    if builder.projector == "expand":
        name = name.replace("branches.", "mlps.", 1)
    return f"model.{builder.modality}_lmm_projector.{name}"


def _base_name(source: Path, fields: Mapping[str, Any]) -> str | None:
    adapter = read_json(source / _ADAPTER_CONFIG)
    return adapter.get("base_model_name_or_path") if adapter else fields.get("_name_or_path")


def _check_base(source: Path, fields: Mapping[str, Any], name: str | None, *, given: bool) -> str:
    """The base model's name, if it loads and is the one that the folder was trained on."""
    from transformers import AutoConfig

    if not name:
        raise ConvertError(
            f"{source} names no base model; name a folder or hub name with --language-model"
        )
    try:
        config = AutoConfig.from_pretrained(name).to_dict()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConvertError(
            f"no language model could be loaded from {name!r}: {reason}"
            if given
            else f"{source} was trained on {name!r}, which cannot be loaded from here ({reason}); "
            "name a folder or hub name of the same model with --language-model"
        ) from None
    expected = {"model_type": str(fields.get("model_type")).removesuffix(_SUFFIX)}
    # sizes alone, since a hub name or a path says nothing about the weights
    expected |= {key: fields[key] for key in _SAME if key in fields}
    differing = [
        f"{key} {config.get(key)} instead of {value}"
        for key, value in expected.items()
        if config.get(key) != value
    ]
    if differing:
        raise ConvertError(
            f"{source} was trained on another language model than {name}, which has "
            f"{', '.join(differing)}; name the right one with --language-model"
        )
    _check_tokenizer_packages(name)
    return name


def _write_language_model(
    source: Path,
    out: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    named: str | None,
) -> str:
    """Write a fully trained language model to `out`/language_model, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from multi_token.language_model.loading import load_tokenizer

    folder = out / _LANGUAGE_MODEL
    folder.mkdir()
    own = {key: value for key, value in fields.items() if key not in _OWN_KEYS}
    own["model_type"] = str(own["model_type"]).removesuffix(_SUFFIX)
    (folder / "config.json").write_text(json.dumps(own), encoding="utf-8")
    # on the meta device: all tensors come from the folder, and none is initialized
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    expected = dict(model.state_dict())
    # a tied head is in state_dict, but its file may leave it out
    tied = set(expected) - {name for name, _ in model.named_parameters()}
    check_state_dict(
        source, {k: v for k, v in expected.items() if k in tensors or k not in tied}, tensors
    )
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = next(iter(tensors.values())).dtype
    model.save_pretrained(folder)
    # a folder without a tokenizer uses that of its base
    has_tokenizer = any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    place = str(source) if has_tokenizer else named
    if place is None:
        raise ConvertError(f"{source} has no tokenizer; name a model with it by --language-model")
    _check_tokenizer_packages(place)
    try:
        load_tokenizer(place).save_pretrained(folder)
    except MultiTokenError as error:
        raise ConvertError(
            f"{source} has no tokenizer of its own, and that of its base is needed: {error}; name "
            "a folder or hub name with it by --language-model"
        ) from None
    return str(folder)


def _check_encoder_loadable(name: str, source: Path) -> None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConvertError(
            f"{source} needs the encoder {name}, which cannot be loaded from here "
            f"({str(error).partition(chr(10))[0]}); name a folder with it by --encoder"
        ) from None


def _check_tokenizer_packages(name: str) -> None:
    """Raise ConvertError for a SentencePiece tokenizer that this installation cannot read."""
    # without this check, transformers raises an error about tiktoken
    folder = Path(name)
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return
    missing = [
        package for module, package in _TOKENIZER_PACKAGES.items() if not _is_installed(module)
    ]
    if missing:
        raise ConvertError(
            f"the tokenizer of {name} is a SentencePiece model, and reading it needs "
            f"{' and '.join(missing)}: pip install 'multi_token[convert]'"
        )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around the module is missing
        return False


def _check_maskable(chat: ChatFormat) -> None:
    """Raise ConvertError for a template whose answers cannot be located exactly."""
    turns = (Message("user", (Text("Hello"),)), Message("assistant", (Text("Good day"),)))
    try:
        chat.tokenize(Conversation(turns, id="a sample"), [])
    except ChatTemplateError as error:
        raise ConvertError(
            f"the language model's chat template cannot be used: {error}; give one with "
            "--chat-template FILE"
        ) from None
