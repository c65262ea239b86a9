"""`multi-token schema`: the JSON Schema of recipes, with every installed modality, for editors."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import typer

from multi_token import registry

if TYPE_CHECKING:
    from pydantic import BaseModel

    from multi_token.registry import Kind

_SHORT: dict[str, list[dict[str, Any]]] = {
    "LearningRate": [{"type": "number", "exclusiveMinimum": 0}],
    "TrainableEncoder": [{"type": "number", "exclusiveMinimum": 0}],
    "Quantization": [{"enum": ["4bit", "8bit", "int8"]}],
    "StreamSpec": [{"type": "boolean"}],
    "FsdpSpec": [{"type": "boolean"}],
    "PackingSpec": [{"type": "boolean"}],
    "FeatureCacheSpec": [{"type": "boolean"}, {"const": "auto"}],
}
"""Section -> values that stand for it (`lr: 1.0e-3`); its validator takes them."""
_SHORT_FIELDS = {("DataSource", "question"): {"type": "string"}}
"""Field of a section -> one more form of its value."""


def schema() -> None:
    """Print the JSON Schema of recipes, by which editors complete and check them."""
    typer.echo(json.dumps(recipe_schema(), indent=1))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of a recipe, with descriptions of all keys."""
    from pydantic.json_schema import models_json_schema

    from multi_token.modalities.base import Modality
    from multi_token.projectors.base import ProjectorSpec
    from multi_token.recipe.recipe import Recipe

    bases: tuple[tuple[Kind, Any], ...] = (("modality", Modality), ("projector", ProjectorSpec))
    classes = {kind: _classes(kind, base) for kind, base in bases}
    every = {Recipe, *(cls for found in classes.values() for cls in found)}
    references, schema = models_json_schema([(cls, "validation") for cls in every])
    definitions = schema["$defs"]
    for kind, base in bases:
        choices = []
        for cls, names in classes[kind].items():
            reference = references[cls, "validation"]
            definition = definitions[reference["$ref"].rpartition("/")[2]]
            definition["properties"]["type"] = {"enum": names, "description": f"The {kind}."}
            definition["required"] = sorted({"type", *definition.get("required", [])})
            choices.append(reference)
        definitions[base.__name__] = {"oneOf": choices, "description": f"A {kind}."}
    for definition in definitions.values():
        # editors show it beside a key: the sections of a docstring are for callers in Python
        if "description" in definition:
            definition["description"] = definition["description"].partition("\n\n")[0]
    for name, short in _SHORT.items():
        definitions[name] = {"anyOf": [*short, definitions[name]]}
    for (name, field), short in _SHORT_FIELDS.items():
        if field in definitions[name]["properties"]:
            found = definitions[name]["properties"][field]
            definitions[name]["properties"][field] = {"anyOf": [short, found]}
    for name in ("TrainSpec", "Stage"):
        definitions[name]["properties"]["args"]["properties"] = _training_arguments()
    top = references[Recipe, "validation"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of multi_token",
        **top,
        "$defs": definitions,
    }


def _classes(kind: Kind, base: type[BaseModel]) -> dict[type[BaseModel], list[str]]:
    """Class of every name that can be imported -> its names."""
    found: dict[type[BaseModel], list[str]] = {}
    for name in registry.registered_names(kind):
        if registry.entry(kind, name, base).state != "broken":
            found.setdefault(registry.resolve(kind, name), []).append(name)
    return found


def _training_arguments() -> dict[str, Any]:
    """Names of transformers' training arguments, with their help where they have one."""
    from transformers import TrainingArguments

    return {
        field.name: {"description": field.metadata["help"]} if "help" in field.metadata else {}
        for field in dataclasses.fields(TrainingArguments)
        if field.init
    }
