"""A name -> a class: built-ins, installed packages, `register_*` for notebooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from multi_token.errors import RecipeError, RegistryError

Kind = Literal["modality", "projector"]
Model = TypeVar("Model", bound=BaseModel)

_GROUPS: dict[Kind, str] = {
    "modality": "multi_token.modalities",
    "projector": "multi_token.projectors",
}
_BUILT_INS: dict[Kind, dict[str, str]] = {
    "modality": {
        "image": "multi_token.modalities.image:ImageModality",
        "speech": "multi_token.modalities.speech:SpeechModality",
        "sound": "multi_token.modalities.sound:SoundModality",
        "video": "multi_token.modalities.video:VideoModality",
        "document": "multi_token.modalities.document:DocumentModality",
        "joint": "multi_token.modalities.joint:JointModality",
        "timeseries": "multi_token.modalities.timeseries:TimeseriesModality",
        "vector": "multi_token.modalities.vector:VectorModality",
        "sequence": "multi_token.modalities.sequence:SequenceModality",
        "volume": "multi_token.modalities.volume:VolumeModality",
    },
    "projector": {
        "linear": "multi_token.projectors.kinds:Linear",
        "mlp": "multi_token.projectors.kinds:Mlp",
        "expand": "multi_token.projectors.kinds:Expand",
        "pool": "multi_token.projectors.kinds:Pool",
        "stack": "multi_token.projectors.kinds:Stack",
        "pixel_shuffle": "multi_token.projectors.kinds:PixelShuffle",
        "resample": "multi_token.projectors.resampler:Resample",
    },
}
_registered: dict[Kind, dict[str, type]] = {"modality": {}, "projector": {}}


@dataclass(frozen=True)
class Entry:
    """Facts about a registered name."""

    name: str
    owner: str
    """The package of the class."""
    state: Literal["ready", "missing extra", "broken"]
    summary: str = ""
    """The first line of the class's docstring."""
    fault: str = ""
    """Reason why it is not ready, and the remedy."""


def register_modality(name: str, cls: type) -> None:
    """Register a modality in this process, as a notebook does; packages use entry points.

    Args:
        name: The `type` in recipes.
        cls: A subclass of `Modality`. Registering the same class again changes nothing.

    Raises:
        RegistryError: If another class has the name.
    """
    _register("modality", name, cls)


def register_projector(name: str, cls: type) -> None:
    """Register a projector in this process, as a notebook does; packages use entry points.

    Args:
        name: The `type` of a `projector` in recipes.
        cls: A subclass of `ProjectorSpec`. Registering the same class again changes nothing.

    Raises:
        RegistryError: If another class has the name.
    """
    _register("projector", name, cls)


def _register(kind: Kind, name: str, cls: type) -> None:
    owner = _owner(kind, name)
    # the same class again is no fault: a notebook's cell may run twice
    if owner is not None and _registered[kind].get(name) is not cls:
        raise RegistryError(
            f"{kind} {name!r} is already owned by {owner}; {cls.__module__}.{cls.__qualname__} "
            "needs another name"
        )
    _registered[kind][name] = cls


def _owner(kind: Kind, name: str) -> str | None:
    if name in _registered[kind]:
        cls = _registered[kind][name]
        return f"{cls.__module__}.{cls.__qualname__}"
    if name in _BUILT_INS[kind]:
        return _BUILT_INS[kind][name]
    installed = _installed(kind).get(name)
    return installed[0].value if installed else None


def _installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=_GROUPS[kind]):
        found.setdefault(point.name, []).append(point)
    return found


def registered_names(kind: Kind) -> list[str]:
    """All registered names, sorted."""
    return sorted({*_BUILT_INS[kind], *_registered[kind], *_installed(kind)})


def resolve(kind: Kind, name: str) -> type:
    """The class of a name.

    Raises RegistryError for an unknown name (with the nearest one) or a name with two owners. A
    broken plug-in raises its own error.
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    installed = _installed(kind).get(name, [])
    # entry points are compared by target, since an editable install may list one twice
    owners = [point.value for point in installed]
    if name in _BUILT_INS[kind]:
        owners.insert(0, _BUILT_INS[kind][name])
    if len(set(owners)) > 1:
        raise RegistryError(f"{kind} {name!r} has several owners: {', '.join(owners)}")
    if installed:
        return installed[0].load()
    if name in _BUILT_INS[kind]:
        module, _, attribute = _BUILT_INS[kind][name].partition(":")
        return getattr(import_module(module), attribute)
    raise RegistryError(
        f"unknown {kind} {name!r}{did_you_mean(name, registered_names(kind))}; "
        f"known: {', '.join(registered_names(kind))}. "
        f"One from another package must be installed (pip install PACKAGE) and declare the entry "
        f"point group {_GROUPS[kind]!r}"
    )


def entry(kind: Kind, name: str, base: type) -> Entry:
    """Entry of a name: its class if it can be imported and is a `base`, else the fault."""
    owner = _package(kind, name)
    try:
        cls = resolve(kind, name)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            return Entry(name, owner, "broken", fault=f"{cls!r} is not a {base.__name__}")
    except Exception as error:  # noqa: BLE001 - importing a plug-in may raise anything
        fault = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Entry(name, owner, "broken", fault=fault)
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    # modalities alone have these two; the registry knows neither base class
    packages, extra = getattr(cls, "requires", ()), getattr(cls, "install_extra", "")
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        fault = f'{", ".join(missing)} not installed: pip install "{extra}"'
        return Entry(name, owner, "missing extra", summary, fault)
    return Entry(name, owner, "ready", summary)


def _package(kind: Kind, name: str) -> str:
    if name in _registered[kind]:
        return _registered[kind][name].__module__
    points = [point.dist for point in _installed(kind).get(name, [])]
    owners = ["multi_token"] if name in _BUILT_INS[kind] else []
    owners += [f"{dist.name} {dist.version}" for dist in points if dist is not None]
    return ", ".join(owners)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def build(kind: Kind, fields: Any, base: type[Model]) -> Model:
    """An object from a mapping with `type`; an object is returned as it is.

    Raises RecipeError or RegistryError.
    """
    if isinstance(fields, base):
        return fields
    if not isinstance(fields, Mapping) or not isinstance(fields.get("type"), str):
        raise RecipeError(
            f"a {kind} is a mapping with a `type` (one of "
            f"{', '.join(registered_names(kind))}), got {fields!r}"
        )
    cls = resolve(kind, fields["type"])
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise RegistryError(f"{kind} {fields['type']!r} is {cls!r}, not a {base.__name__}")
    return validate_fields(cls, fields, where=f"{kind} of type {fields['type']!r}")


def validate_fields(cls: type[Model], fields: Mapping[str, Any], *, where: str) -> Model:
    """`cls(**fields)`. Raises RecipeError with a sentence for every fault: key, expected, given."""
    try:
        return cls.model_validate(dict(fields))
    except ValidationError as error:
        sentences = [_sentence(cls, dict(fault)) for fault in error.errors()]
        raise RecipeError(f"{where}: " + "; ".join(sentences)) from None
    except RecipeError as error:  # from one of our validators, which knows no file
        raise RecipeError(f"{where}: {error}") from None


def _sentence(cls: type[BaseModel], fault: dict[str, Any]) -> str:
    loc = [str(part) for part in fault["loc"]]
    key = ".".join(loc)
    if fault["type"] == "extra_forbidden":
        known = fields_at(cls, loc[:-1])
        return f"unknown key {key!r}{did_you_mean(loc[-1], known)} (known: {', '.join(known)})"
    if fault["type"] == "missing":
        return f"{key!r} is required and missing"
    said = f"{key!r}: " * bool(key) + fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and isinstance(fault["input"], Mapping):
        return said  # the fault of a section, whose fields would say nothing
    return f"{said}, got {fault['input']!r}"


def fields_at(cls: type[BaseModel], loc: list[str]) -> list[str]:
    """The field names of the model that a pydantic location leads to."""
    current: type[BaseModel] = cls
    for part in loc:
        field = current.model_fields.get(part)
        if field is None:
            continue  # an index of a list or a key of a mapping
        inner = [a for a in _walk(field.annotation) if issubclass(a, BaseModel)]
        # of a union (section or None), the section
        if inner:
            current = inner[0]
    return sorted(current.model_fields)


def _walk(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return [annotation]
    return [t for arg in getattr(annotation, "__args__", ()) for t in _walk(arg)]
