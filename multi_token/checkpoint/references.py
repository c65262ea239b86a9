"""References from a checkpoint to parts outside of it: relative, absolute and hub names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multi_token.errors import CheckpointError


def absolute_name(name: str) -> str:
    """The absolute path of a file or folder; a hub name unchanged."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def relativize(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `model` section for the config.json of `folder`: paths inside begin with `./`."""

    def relative(name: str) -> str:
        path = Path(name)
        if path.is_absolute() and path.is_relative_to(folder.absolute()):
            return f"./{path.relative_to(folder.absolute()).as_posix()}"
        return name

    return _map_names(fields, relative)


def resolve_references(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `model` section from the config.json of `folder`: `./` names become absolute paths.

    Raises CheckpointError for a part that is missing or outside the folder.
    """

    def found(name: str) -> str:
        if not name.startswith("./"):
            return name
        path = (folder / name).absolute()
        # a run from the hub must not name files elsewhere on this machine
        if ".." in Path(name).parts:
            raise CheckpointError(f"{folder} names {name}, which is outside of it")
        if not path.exists():
            raise CheckpointError(
                f"{folder} lacks {name}, which its config.json names: it is half-written or was "
                "copied in part"
            )
        return str(path)

    return _map_names(fields, found)


def absolutize(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section with the absolute path of every part on this machine."""
    return _map_names(fields, absolute_name)


def _map_names(fields: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    modalities = {
        name: {**modality, "encoder": change(modality["encoder"])}
        if isinstance(modality.get("encoder"), str)
        else dict(modality)
        for name, modality in fields["modalities"].items()
    }
    language_model = change(fields["language_model"])
    return {**fields, "language_model": language_model, "modalities": modalities}
