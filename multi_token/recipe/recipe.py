"""Recipe of a run: YAML and `key=value` overrides -> checked model, data and training sections."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import model_validator

from multi_token.errors import RecipeError
from multi_token.recipe.conflicts import check_conflicts
from multi_token.recipe.data import DataSpec, StrictModel
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.renamed import check_renamed
from multi_token.recipe.train import TrainSpec
from multi_token.registry import did_you_mean, validate_fields


class Recipe(StrictModel):
    """Settings of a run, frozen and checked: `load_recipe` reads them from YAML.

    Args:
        model: The language model and its modalities.
        data: Training rows, held-out rows, and their order.
        train: Stages, trainable parts and learning rates, output folder.

    Raises:
        RecipeError: If settings exclude each other (recipe/conflicts.py), or a stage trains an
            unknown modality.
    """

    model: ModelSpec
    data: DataSpec
    train: TrainSpec

    @model_validator(mode="before")
    @classmethod
    def _check_renamed_keys(cls, fields: Any) -> Any:
        check_renamed(fields)
        return fields

    @model_validator(mode="after")
    def _check_settings(self) -> Recipe:
        check_conflicts(self.model, self.data, self.train)
        for stage in self.train.stages:
            named = stage.learn.projectors if isinstance(stage.learn.projectors, dict) else ()
            for part, names in (("projectors", named), ("encoders", stage.learn.encoders)):
                for name in set(names) - set(self.model.modalities):
                    raise RecipeError(
                        f"stage {stage.name!r} trains `{part}` of {name!r}, which is no modality "
                        f"of the recipe{did_you_mean(name, self.model.modalities)} (known: "
                        f"{', '.join(self.model.modalities)})"
                    )
        return self

    def save(self, path: Path) -> None:
        """Write the recipe as YAML, with all defaults.

        Args:
            path: The file.
        """
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), "utf-8")


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        recipe: A YAML file, the sections as a dict, or a recipe.
        overrides: `key=value` with dotted keys (`train.stages.0.args.max_steps=10`).

    Returns:
        The checked recipe.

    Raises:
        RecipeError: With the file, the key, and the nearest known name.
    """
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, Mapping):
        fields = set_overrides(copy.deepcopy(dict(recipe)), overrides)
        return validate_fields(Recipe, fields, where="recipe")
    if not isinstance(recipe, (str, Path)):
        raise RecipeError(
            f"expected the path of a YAML file, its sections or a recipe, got {recipe!r}"
        )
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"expected a recipe file at {path.absolute()}: {error.strerror or error}"
        ) from None
    return parse_recipe(text, overrides, where=str(path))


def parse_recipe(text: str, overrides: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """As `load_recipe`, from YAML text; `where`: name of the text in errors."""
    fields = _read_yaml(text, where)
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where}: expected keys model, data and train, got {fields!r}")
    # overrides before validation, so that `train.closed_form=null` and unknown keys are checked too
    return validate_fields(Recipe, set_overrides(fields, overrides), where=where)


def set_overrides(fields: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return fields with `key=value` overrides. Raises RecipeError."""
    tree = dict(fields)
    for override in overrides:
        key, equals, value = override.partition("=")  # the first: values may hold `=`
        if not equals:
            raise RecipeError(f"expected key=value (train.seed=1), got {override!r}")
        _set_override(tree, key.split("."), _read_yaml(value, override), override)
    return tree


def _set_override(tree: Any, keys: list[str], value: Any, override: str) -> None:
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise RecipeError(f"{override!r}: {key!r} is no index of a list of {len(tree)}")
            at: Any = int(key)
        elif isinstance(tree, dict):
            at = key
        else:
            raise RecipeError(f"{override!r}: {'.'.join(keys[:i])} is a value, not a section")
        if last:
            tree[at] = value
        else:
            # a missing section is created: validation then reports an unknown name with its path
            tree = tree[at] if isinstance(tree, list) else tree.setdefault(at, {})


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Return the values of two dumped recipes that differ: dotted name, `a`'s and `b`'s."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(key, a.get(key), b.get(key)) for key in {**a, **b}]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(a, b, strict=True))]
    else:
        return [] if a == b else [(at, a, b)]
    return [x for key, c, d in pairs for x in differences(c, d, f"{at}.{key}" if at else key)]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML follows YAML 1.1, in which 1e-3 is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(  # after the float's, which matches integers too
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {error}") from None
