"""Uploads a run to the hub: its result and a model card, and nothing else of the folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from multi_token.checkpoint.language_model_folder import LANGUAGE_MODEL
from multi_token.checkpoint.load import read_config
from multi_token.checkpoint.save import ADAPTER, CONFIG, ENCODER_WEIGHTS, PROJECTORS
from multi_token.convert.export import ENCODERS, MANIFEST
from multi_token.convert.model_card import GENERATED_MARK, RECIPE, read_recipe, render_card
from multi_token.errors import ConvertError

CARD = "README.md"
_FOLDERS = (ADAPTER, LANGUAGE_MODEL, ENCODERS)
_ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"


def push(
    run: Path,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    **upload: Any,
) -> dict[str, int]:
    """Write the run's card and upload the result to `name`; returns each file's bytes.

    A README.md that `push` did not write stays as it is. `dry_run`: write the card, upload nothing.
    `upload`: `token`, `commit_message`, `create_pr`.

    Raises ConvertError for a run that names folders of this machine, or an upload that fails, and
    CheckpointError for a folder that is not a complete run.
    """
    fields = read_config(run)
    _check_no_local_references(run, fields["model"])
    write_card(run, name)
    files = dict(_files(run, name, fields))
    if not dry_run:
        _upload(files, name, private=private, revision=revision, **upload)
    return {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in files.items()
    }


def write_card(run: Path, name: str) -> None:
    """Write the card of a run that will be `name`, unless a README.md of someone else is there."""
    readme = run / CARD
    if not readme.is_file() or GENERATED_MARK in readme.read_text(encoding="utf-8"):
        readme.write_text(render_card(run, name, read_config(run)), encoding="utf-8")


def _check_no_local_references(run: Path, model: Mapping[str, Any]) -> None:
    references = {"language_model": model["language_model"]}
    references |= {
        f"modalities.{name}.{key}": value
        for name, fields in model["modalities"].items()
        for key, value in fields.items()
        if isinstance(value, str)
    }
    local = [f"{key} is {value}" for key, value in references.items() if Path(value).is_absolute()]
    if local:
        raise ConvertError(
            f"{run} names folders of this machine, which other machines do not have "
            f"({'; '.join(local)}): copy them inside with `multi-token export {run} --to merged`, "
            "or train with hub names"
        )


def _files(run: Path, name: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, Path | bytes]]:
    """Paths in the repository and what goes there: files, or bytes without local paths."""
    for path in (CONFIG, PROJECTORS, ENCODER_WEIGHTS, CARD, MANIFEST):
        if (run / path).is_file():
            yield path, run / path
    combined = [entry["recipe"] for entry in fields.get("combined_from") or []]
    for path in (RECIPE, *(path for path in combined if path)):
        recipe = read_recipe(run / path, name)
        if recipe is not None:
            yield path, yaml.safe_dump(recipe, sort_keys=False).encode()
    for folder in _FOLDERS:
        for file in sorted((run / folder).rglob("*")):
            path = file.relative_to(run)
            if not file.is_file() or any(part.startswith(".") for part in path.parts):
                continue
            if path.as_posix() == _ADAPTER_CONFIG:
                # PEFT wrote the local path of the base
                adapter = json.loads(file.read_text(encoding="utf-8"))
                adapter["base_model_name_or_path"] = fields["model"]["language_model"]
                yield path.as_posix(), json.dumps(adapter, indent=2).encode()
            else:
                yield path.as_posix(), file


def _upload(
    files: Mapping[str, Path | bytes],
    name: str,
    *,
    private: bool,
    revision: str | None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi(library_name="multi_token", token=token)
    operations = [
        CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
        for path, source in files.items()
    ]
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        # create_commit does not create a branch
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        # one commit: a repository is never half a run
        hub.create_commit(
            name,
            operations,
            commit_message=commit_message or "A run of multi_token",
            revision=revision,
            create_pr=create_pr,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        raise ConvertError(
            f"the run could not be uploaded to {name}: {reason}; check the connection, and log in "
            "with `hf auth login`"
        ) from None
