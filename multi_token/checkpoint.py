"""One folder: what was trained in safetensors, references and revisions of the rest.

    config.json             schema, language model, modalities, projectors' shapes
    projectors.safetensors  <modality>.<parameter>
    adapter/                LoRA, as PEFT writes it (if any)

Border: the only file that reads or writes this folder. Names of classes on disk are registry names,
never import paths; loading is strict.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multi_token import __version__
from multi_token.chat import ChatFormat
from multi_token.errors import CheckpointError
from multi_token.hub import local_folder
from multi_token.language_model import load_language_model, load_tokenizer
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenConfig, MultiTokenForConditionalGeneration
from multi_token.reader import Reader
from multi_token.recipe import ModelSpec
from multi_token.references import absolutes, identity, refuse_another, resolved, stored
from multi_token.registry import validated

SCHEMA = 1
CONFIG, PROJECTORS, ADAPTER = "config.json", "projectors.safetensors", "adapter"


def compose(
    spec: ModelSpec, *, max_tokens: int | None = None
) -> MultiTokenForConditionalGeneration:
    """The model of a recipe before any training: frozen parts loaded, projectors new."""
    language_model = load_language_model(
        spec.language_model,
        revision=spec.revision,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        quantization=spec.quantization,
    )
    width = language_model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]
    encoders = {name: modality.build_encoder() for name, modality in spec.modalities.items()}
    projectors = {
        name: modality.projector.build(encoders[name].dim, int(width))
        for name, modality in spec.modalities.items()
    }
    reader = Reader(
        chat=ChatFormat(
            load_tokenizer(spec.language_model, spec.revision), spec.chat_template, spec.learn_turns
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
            **absolutes(spec.model_dump(mode="json")),
            "revision": commit or spec.revision,
            # the template itself, so that a checkpoint does not hang on a file elsewhere
            "chat_template": reader.chat.template if spec.chat_template else None,
        },
        "identity": identity(language_model),
        "base_model": None,
    }
    config = MultiTokenConfig(**fields)
    return MultiTokenForConditionalGeneration(
        config, language_model, spec.modalities, encoders, projectors, reader
    )


def save(model: MultiTokenForConditionalGeneration, folder: str | os.PathLike[str]) -> None:
    """Write what was trained. `config.json` comes last: a folder without it is half-written.

    References to parts that lie inside the folder are written relative to it (`./language_model`),
    so that it may be moved; all others stay what they are.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).unlink(missing_ok=True)
    tensors = {
        f"{name}.{key}": tensor.detach().contiguous().cpu()
        for name, projector in model.projectors.items()
        for key, tensor in projector.state_dict().items()
    }
    _atomically(out / PROJECTORS, lambda path: save_file(tensors, path, {"format": "pt"}))
    has_adapter = hasattr(model.language_model, "peft_config")
    if has_adapter:
        model.language_model.save_pretrained(out / ADAPTER)
        (out / ADAPTER / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    fields = {
        "model_type": MultiTokenConfig.model_type,
        "schema": SCHEMA,
        "multi_token_version": __version__,
        "model": stored(model.config.model, out),
        "identity": model.config.identity,
        "base_model": model.config.base_model,
        "adapter": has_adapter,
        "closed_form": sorted(
            name
            for name, projector in model.projectors.items()
            if getattr(projector, "closed_form", None) is not None
        ),
    }
    text = json.dumps(fields, indent=2) + "\n"
    _atomically(out / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


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
            f"{path} has checkpoint schema {fields.get('schema')!r}, this version "
            f"({__version__}) reads {SCHEMA}; it was written by multi_token "
            f"{fields.get('multi_token_version')}"
        )
    return fields


def load(
    folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    language_model: str | None = None,
    device: str | None = None,
) -> MultiTokenForConditionalGeneration:
    """A run's folder or hub name -> the model with its reader, in eval mode.

    `revision`: branch, tag or commit of a hub name (`user/run@revision` says the same).
    `language_model`: where the frozen language model is now, if its folder has moved.

    Raises CheckpointError for a folder that is not ours, lacks or has too many tensors, or belongs
    to another language model.
    """
    fields = read_config(folder, revision=revision)
    path = local_folder(folder, revision=revision)
    spec_fields = dict(fields["model"])
    if language_model is not None:
        spec_fields |= {"language_model": language_model, "revision": None}
    spec = validated(ModelSpec, resolved(spec_fields, path), where=str(path / CONFIG))
    model = compose(spec)
    model.config.base_model = fields.get("base_model")
    load_trained(model, path, fields)
    return move(model, device).eval() if device else model.eval()


def move(
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
    """Read the trained parts of a checkpoint into a composed model, strictly."""
    fields = fields or read_config(folder)
    path = Path(folder)
    if fields.get("identity"):
        refuse_another(
            fields["identity"],
            model.config.identity,
            folder=path,
            name=model.config.model["language_model"],
        )
    for name in fields["closed_form"]:
        if model.projector(name).closed_form is None:
            model.projector(name).add_closed_form()
    try:
        tensors = load_file(path / PROJECTORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / PROJECTORS} cannot be read: {error}") from None
    expected = {
        f"{name}.{key}": tensor
        for name, projector in model.projectors.items()
        for key, tensor in projector.state_dict().items()
    }
    refuse_disagreement(path / PROJECTORS, expected, tensors)
    for name, projector in model.projectors.items():
        prefix = f"{name}."
        projector.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    if fields["adapter"]:
        load_adapter(model, path / ADAPTER)


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
    refuse_disagreement(where or path / "adapter_model.safetensors", expected, tensors)
    set_peft_model_state_dict(model.language_model, tensors)
    for parameter in model.language_model.parameters():
        parameter.requires_grad_(False)


def refuse_disagreement(
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
