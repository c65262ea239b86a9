"""References from a checkpoint to parts outside of it: relative, absolute and hub names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multi_token.errors import CheckpointError


def absolute_name(name: str) -> str:
    """A file or folder by its absolute path, a hub name as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def relativize(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `model` section as it is written into `folder`: what lies inside begins with `./`.

    All else is absolute already, so that a checkpoint is true wherever it is saved again: it goes
    on naming the parts where they are, and copies none of them.
    """

    def relative(name: str) -> str:
        path = Path(name)
        if path.is_absolute() and path.is_relative_to(folder.absolute()):
            return f"./{path.relative_to(folder.absolute()).as_posix()}"
        return name

    return _map_names(fields, relative)


def resolve(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The `model` section as it was read from `folder`: `./` names become absolute paths.

    Raises CheckpointError for a part that is not there, or one outside the folder.
    """

    def found(name: str) -> str:
        if not name.startswith("./"):
            return name
        path = (folder / name).absolute()
        if ".." in Path(name).parts:
            raise CheckpointError(f"{folder} names {name}, which is outside of it")
        if not path.exists():
            raise CheckpointError(
                f"{folder} says that {name} lies in it, and there is nothing: it is half-written "
                "or was copied in part"
            )
        return str(path)

    return _map_names(fields, found)


def absolutize(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section with every part that is on this machine by its absolute path."""
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
