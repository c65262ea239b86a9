"""Rows of any columns in a run, and `data` of a stage in place of `data.train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.errors import RecipeError
from multi_token.recipe.recipe import Recipe
from multi_token.train.prepare import open_stages, prepare
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
QUIET = Console(quiet=True)


def two_stages(fields: Fields, data: Path, folder: Path) -> dict[str, Any]:
    """A recipe whose first stage trains on captions, and whose second on `data.train`."""
    captions = folder / "captions.jsonl"
    images = sorted(path.name for path in data.glob("*.png"))[:3]
    lines = [json.dumps({"photo": n, "caption": n[:-4], "fold": i}) for i, n in enumerate(images)]
    captions.write_text("\n".join(lines))
    found = fields(folder / "run")
    source = {"rows": str(captions), "root": str(data), "where": "fold > 0"}
    source |= {"question": ["What is it?", "Name it."]}
    (stage,) = found["train"]["stages"]
    learn = {"projectors": 1e-2}
    args = {"max_steps": 2}
    first = {"name": "captions", "learn": learn, "data": [source], "args": args}
    found["train"]["stages"] = [first, {**stage, "args": args}]
    return found


def test_a_stage_trains_on_rows_of_its_own_and_others_on_data_train(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    recipe = Recipe(**two_stages(recipe_fields, data, tmp_path))
    run = prepare(recipe, open_stages(recipe), QUIET)
    (first, dataset), (second, others) = (run.rows_of(s.spec) for s in run.stages)
    assert [source.name for source in first] == [str(tmp_path / "captions.jsonl")]
    assert [source.name for source in second] == [str(data / "rows.jsonl")]
    assert len(dataset) == 2 and len(others) == len(second[0].rows)  # type: ignore[arg-type]
    assert len(run.sources) == 2, "the closed-form start and the plan see all rows"
    assert dataset[0].id == "captions.jsonl[1]"
    train(recipe, console=QUIET)
    for number, name in ((1, "captions"), (2, "projector")):
        assert (tmp_path / "run" / "stages" / f"{number}-{name}" / "done.json").is_file()


def test_a_stage_whose_data_lack_a_modality_that_it_trains_is_refused(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    fields = two_stages(recipe_fields, data, tmp_path)
    vector = {"type": "vector", "dim": 5, "projector": {"type": "linear"}}
    fields["model"]["modalities"]["vector"] = vector
    recipe = Recipe(**fields)
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, open_stages(recipe), QUIET)
    assert str(caught.value) == (
        "stage 'captions' trains vector, but no row of its `data` "
        f"({tmp_path / 'captions.jsonl'}) has an item of it; add such rows, or train others alone "
        "(`projectors: {image: ...}`)"
    )


def test_data_of_a_stage_and_a_stream_exclude_each_other(
    recipe_fields: Fields, data: Path, tmp_path: Path
) -> None:
    fields = two_stages(recipe_fields, data, tmp_path)
    fields["data"]["stream"] = True
    with pytest.raises(RecipeError, match="stage 'captions' has `data` of its own"):
        Recipe(**fields)
