"""Importer of a SOURCE, chosen by its files and never by its name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multi_token.checkpoint.hub import local_folder
from multi_token.convert.original import import_original, is_original
from multi_token.errors import ConvertError
from multi_token.model import MultiTokenConfig

_NEEDED_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin", "*.model")
_EXPECTED = (
    "expected one of: a folder that sshh12/multi_token trained (config.json with `modality_builder`"
    "), LLaVA as transformers keeps it (config.json of type llava or llava_next), or LLaVA's own "
    "(mm_projector.bin, or LoRA beside a config.json with `mm_vision_tower`)"
)


def import_run(
    source: str | os.PathLike[str],
    out: Path,
    *,
    revision: str | None = None,
    language_model: str | None = None,
    encoder: str | None = None,
    chat_template: str | None = None,
) -> None:
    """A folder or hub name in another format -> the run `out`.

    Nothing is written unless all of it can be mapped. Raises ConvertError or CheckpointError.
    """
    from multi_token.convert.llava import import_llava, is_llava

    folder = local_folder(source, revision=revision, only=_NEEDED_FILES)
    fields = _config(folder)
    if fields.get("model_type") == MultiTokenConfig.model_type:
        raise ConvertError(f"{folder} is a run of multi_token already; it needs no import")
    if is_original(fields):
        import_original(
            folder,
            out,
            language_model=language_model,
            encoder=encoder,
            chat_template=chat_template,
        )
    elif is_llava(folder) or (folder / "mm_projector.bin").is_file():
        if chat_template is not None:
            raise ConvertError("--chat-template is for folders of sshh12/multi_token, not LLaVA's")
        import_llava(folder, out, language_model=language_model, encoder=encoder)
    else:
        held = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(held[:8]) + (", ..." if len(held) > 8 else "")
        kind = fields.get("model_type")
        raise ConvertError(
            f"{folder} is of no kind that can be imported: it holds {shown or 'nothing'}"
            + (f", and config.json is of type {kind!r}" if kind else "")
            + f"; {_EXPECTED}"
        )


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json, or nothing if there is none. Raises ConvertError."""
    if not folder.is_dir():
        raise ConvertError(
            f"there is no folder {folder}, and the name is not one of a hub repository (user/name)"
        )
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConvertError(f"{path} is no mapping of keys to values")
    return fields
