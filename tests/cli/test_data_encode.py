"""`multi-token data encode`: a folder of features that training then finds, made by many hands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from multi_token.cli import app
from multi_token.data.feature_cache.cache import FeatureCache
from multi_token.errors import MultiTokenError, RecipeError
from multi_token.recipe.recipe import Recipe, load_recipe
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]


def encode(*words: str | Path, **env: str) -> Result:
    env = {"COLUMNS": "300", "NO_COLOR": "1", **env}
    return CliRunner().invoke(app, ["data", "encode", *map(str, words)], env=env)


def saved(fields: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(fields))
    return path


def test_shares_fill_one_folder_and_training_then_encodes_nothing(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    features = tmp_path / "features"
    recipe = saved(recipe_fields(tmp_path / "run"), tmp_path / "recipe.yaml")
    num_encoded = 0
    for i in range(2):
        done = encode(recipe, "--out", features, "--num-shards", "2", "--shard", str(i))
        assert done.exit_code == 0
        option = re.search(r"train with it: '(.*)'", done.output)
        assert option is not None
        for before in (True, "auto", {"dtype": "bfloat16"}):
            other = saved(
                recipe_fields(tmp_path / "run", feature_cache=before), tmp_path / "o.yaml"
            )
            cache = load_recipe(other, [option[1]]).train.feature_cache
            assert cache is not None and cache.path == str(features)
        counts = re.search(rf"\(shard {i} of 2\): (\d) encoded", done.output)
        assert counts is not None
        num_encoded += int(counts[1])
    assert num_encoded == len(FeatureCache(features)) == 4

    again = encode(recipe, "--out", features, RANK="1", WORLD_SIZE="2")
    assert again.exit_code == 0
    assert "(shard 1 of 2): 0 encoded" in again.output and f"4 in {features}" in again.output

    capsys.readouterr()
    for auto in (False, True):
        cache = {"path": str(features), "auto": auto}
        fields = recipe_fields(tmp_path / f"auto-{auto}", feature_cache=cache)
        train(Recipe.model_validate(fields), console=Console(width=300))
        shown = capsys.readouterr().out
        assert "features: 0 items encoded, 4 in the cache" in shown
        assert ("auto is on: the first 4 items are in" in shown) == auto
    assert len(FeatureCache(features)) == 4


def test_without_a_folder_features_go_where_the_recipe_says(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    recipe = saved(recipe_fields(tmp_path / "run"), tmp_path / "recipe.yaml")
    done = encode(recipe)
    assert done.exit_code == 0 and "4 items in 4 rows: 4 encoded" in done.output
    assert len(FeatureCache(tmp_path / "run" / "cache")) == 4
    named = encode(recipe, f"train.feature_cache={{path: {tmp_path / 'other'}}}")
    assert named.exit_code == 0 and "4 encoded" in named.output
    assert "train with it" not in named.output
    assert len(FeatureCache(tmp_path / "other")) == 4


def test_captioned_and_held_out_rows_are_encoded_too_and_unreadable_items_are_named_with_code_1(
    recipe_fields: Fields, tmp_path: Path, data: Path
) -> None:
    fields = recipe_fields(
        tmp_path / "run", closed_form={"rows": [{"rows": str(data / "rows.jsonl")}]}
    )
    rows = tmp_path / "rows.json"
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "no"}]
    rows.write_text(json.dumps([{"id": "lost", "images": ["gone.png"], "messages": messages}]))
    fields["data"]["train"] = [{"rows": str(rows)}]
    fields["data"]["eval"] = [{"rows": str(data / "rows.jsonl")}]
    done = encode(saved(fields, tmp_path / "recipe.yaml"))
    assert done.exit_code == 1
    assert "skipped row lost: image: " in done.output and "gone.png" in done.output
    assert "9 items in 9 rows: 4 encoded, 4 there already or repeated, 1 skipped" in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--shard", "1"), "--shard and --num-shards belong together"),
        (("--shard", "2", "--num-shards", "2"), "expected --shard from 0 to 1"),
        (
            ("train.stages.0.learn.encoders={image: 1e-5}",),
            "that of 'image' is trained in stage 'projector'",
        ),
    ],
)
def test_what_cannot_be_is_a_sentence(
    recipe_fields: Fields, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    done = encode(saved(recipe_fields(tmp_path / "run"), tmp_path / "recipe.yaml"), *words)
    assert isinstance(done.exception, (MultiTokenError, RecipeError))
    assert sentence in str(done.exception)


def test_encoders_that_a_run_has_trained_are_those_of_the_recipe_that_starts_from_it(
    recipe_fields: Fields, tmp_path: Path, capsys: Any
) -> None:
    stage = {
        "name": "all",
        "learn": {"projectors": 1e-2, "encoders": {"image": 1e-2}},
        "args": {"max_steps": 3},
    }
    train(Recipe.model_validate(recipe_fields(tmp_path / "first", stages=[stage])))
    cache = {"path": str(tmp_path / "features")}
    plain = recipe_fields(tmp_path / "plain", feature_cache=cache)
    trained = recipe_fields(tmp_path / "on", init_from=str(tmp_path / "first"))
    trained["train"]["feature_cache"] = cache
    assert "4 encoded" in encode(saved(plain, tmp_path / "plain.yaml")).output
    assert "4 encoded" in encode(saved(trained, tmp_path / "trained.yaml")).output
    capsys.readouterr()
    train(Recipe.model_validate(trained), console=Console(width=300))
    assert "features: 0 items encoded, 8 in the cache" in capsys.readouterr().out
