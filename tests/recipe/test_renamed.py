"""recipe.renamed.py: keys of earlier versions are answered with the new name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from multi_token.checkpoint.load import read_config
from multi_token.errors import CheckpointError, RecipeError
from multi_token.recipe.recipe import Recipe, load_recipe, parse_recipe
from multi_token.recipe.renamed import RENAMED_KEYS, RENAMED_VALUES
from multi_token.train.resume import claim_run_folder

Fields = Callable[..., dict[str, Any]]


def with_value(fields: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The same recipe with a value at a dotted path, `*` taken as the first or as `image`."""
    at: Any = fields
    *inner, last = path.split(".")
    for key in inner:
        if isinstance(at, list):
            at = at[0]
            continue
        key = "image" if key == "*" else key
        if not isinstance(at.get(key), (dict, list)):
            at[key] = {}
        at = at[key]
    at[last] = value
    return fields


@pytest.mark.parametrize("path", sorted(RENAMED_KEYS))
def test_a_key_of_an_earlier_version_is_answered_with_its_new_name(
    path: str, recipe_fields: Fields, tmp_path: Path
) -> None:
    text = json.dumps(with_value(recipe_fields(tmp_path / "run"), path, 1))
    old, new = path.rpartition(".")[2], RENAMED_KEYS[path]
    with pytest.raises(RecipeError, match=rf"{old}` is now `{new}`; change the key"):
        parse_recipe(text)


@pytest.mark.parametrize(("path", "value"), sorted(RENAMED_VALUES))
def test_a_value_of_an_earlier_version_is_answered_with_the_new_one(
    path: str, value: str, recipe_fields: Fields, tmp_path: Path
) -> None:
    text = json.dumps(with_value(recipe_fields(tmp_path / "run"), path, value))
    with pytest.raises(RecipeError, match=f"is now `{path}: {RENAMED_VALUES[path, value]}`"):
        parse_recipe(text)


def test_an_override_of_an_earlier_version_is_answered_too(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    text = json.dumps(recipe_fields(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"`train.align` is now `closed_form`"):
        parse_recipe(text, ["train.align=null"])


def test_all_old_keys_are_named_at_once(recipe_fields: Fields, tmp_path: Path) -> None:
    fields = with_value(recipe_fields(tmp_path / "run"), "train.align", None)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(json.dumps(with_value(fields, "model.learn_turns", "last")))
    assert "`model.learn_turns`" in str(caught.value) and "`train.align`" in str(caught.value)


def test_free_form_sections_may_use_the_old_words(recipe_fields: Fields, tmp_path: Path) -> None:
    fields = recipe_fields(tmp_path / "run", args={"teacher": 1, "rate": 2})
    assert parse_recipe(json.dumps(fields)).train.args == {"teacher": 1, "rate": 2}


def test_a_run_folder_of_an_earlier_version_is_answered_with_the_new_name(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "stages").mkdir(parents=True)
    recipe = Recipe.model_validate(recipe_fields(out))
    old = with_value(recipe.model_dump(mode="json"), "train.start_from", None)
    (out / "recipe.yaml").write_text(yaml.safe_dump(old))
    for read in (lambda: load_recipe(out / "recipe.yaml"), lambda: claim_run_folder(out, recipe)):
        with pytest.raises(RecipeError, match=r"recipe.yaml: `train.start_from` is now"):
            read()


def test_a_checkpoint_of_an_earlier_version_is_answered_with_the_new_name(tmp_path: Path) -> None:
    fields = {"model_type": "multi_token", "schema": 1, "model": {"learn_turns": "last"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="`model.learn_turns` is now `train_on_turns`"):
        read_config(tmp_path)
