"""The classes for Ray Data: as functions of a batch, and as actors of a local Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml

from multi_token import EncodeRows, EvaluateRows, PredictRows, RecipeError, RowError
from multi_token.evaluate.scores import score_rows

ROOT = Path(__file__).resolve().parents[2]
NUM_NEW = 5
COLOURS = ("red", "blue", "green", "white")


def row(i: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"What is <image>? {'Look well. ' * (i % 4)}"}
    answer = {"role": "assistant", "content": COLOURS[i % 4]}
    return {"id": f"r{i}", "images": [f"{COLOURS[i % 4]}.png"], "messages": [question, answer]}


ROWS = [row(i) for i in range(20)]


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ray") / "run"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recipe(recipe_fields: Callable[..., dict[str, Any]], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(folder / "out")))
    return path


def columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Rows as Ray gives them: an array of each column."""
    found = {name: np.empty(len(rows), object) for name in rows[0]}
    for index, one in enumerate(rows):
        for name, value in one.items():
            found[name][index] = np.array(value, object) if isinstance(value, list) else value
    return found


def test_a_batch_gets_the_answers_of_generate(run: str, model: Any, data: Path) -> None:
    expected = model.generate(ROWS, max_new_tokens=NUM_NEW, root=str(data))
    predict = PredictRows(run, root=str(data), max_new_tokens=NUM_NEW, batch_size=3)
    found = predict(columns(ROWS))
    assert found["answer"].tolist() == expected and set(found["error"]) == {""}
    assert found["answer"].dtype == object, "a column of one width has the longest answer's"
    assert found["id"].tolist() == [r["id"] for r in ROWS]
    empty = predict({name: np.empty(0, object) for name in ROWS[0]})
    assert set(empty) == set(found) and not len(empty["answer"])
    table = predict(pyarrow.Table.from_pylist(ROWS[:7]))
    assert table["answer"].to_pylist() == expected[:7]
    assert table.column_names == ["id", "images", "messages", "answer", "error"]


def test_a_batch_gets_the_scores_of_score_rows(run: str, model: Any, data: Path) -> None:
    evaluate = EvaluateRows(run, root=str(data), batch_size=4)
    found = evaluate(columns(ROWS))
    samples = [evaluate.processor(conversation) for conversation in map(_conversation, ROWS)]
    expected = score_rows(model, samples)
    np.testing.assert_allclose(found["loss"], expected.loss, rtol=1e-5)
    np.testing.assert_array_equal(found["exact"], expected.accuracy)


def _conversation(row: dict[str, Any]) -> Any:
    from multi_token.data.formats import to_conversation

    return to_conversation(row, ["image"], row_id=row["id"])


def test_a_bad_row_is_a_sentence_in_its_row_or_raised(run: str, data: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "images": ["none.png"]}, ROWS[2]]
    found = EvaluateRows(run, root=str(data))(columns(rows))
    assert [text[:18] for text in found["error"]] == ["", "image: no file at ", ""]
    assert np.isnan(found["loss"]).tolist() == [False, True, False]
    predict = PredictRows(run, root=str(data), max_new_tokens=2, on_bad_row="raise")
    with pytest.raises(RowError, match="row r1: image: no file at"):
        predict(columns(rows))


def test_a_batch_is_encoded_into_the_cache_of_the_recipe(
    recipe: Path, data: Path, tmp_path: Path
) -> None:
    encode = EncodeRows(str(recipe), out=str(tmp_path / "cache"), root=str(data))
    found = encode(columns([ROWS[0], {**ROWS[1], "images": ["none.png"]}]))
    assert found["id"].tolist() == ["r0", "r1"] and found["error"][0] == ""
    assert found["error"][1].startswith("image: no file at")
    encode(columns(ROWS))
    assert len(encode.cache) == len(COLOURS)


def test_random_preprocessing_is_refused_in_the_first_batch_that_has_an_item(
    recipe: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = EncodeRows(str(recipe), out=str(tmp_path / "cache"), root=str(data))
    monkeypatch.setattr(
        "multi_token.ray_data.random_preprocessing", lambda items, _: "is random" if items else None
    )
    texts = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    encode(columns([{"id": "text", "messages": texts}]))
    with pytest.raises(RecipeError, match="is random"):
        encode(columns(ROWS))


def test_the_classes_need_no_ray() -> None:
    script = "import sys, multi_token.ray_data; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`")
def test_on_a_local_ray_rows_in_any_order_get_the_same_and_a_killed_actor_is_replaced(
    run: str, recipe: Path, model: Any, data: Path, tmp_path: Path
) -> None:
    rows = list(ROWS)
    random.Random(0).shuffle(rows)
    job = {"run": run, "recipe": str(recipe), "root": str(data), "rows": rows}
    job |= {"mark": str(tmp_path / "mark"), "out": str(tmp_path / "out.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "ray_program.py"), str(tmp_path / "job.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "mark").exists(), "no actor was killed"
    written = json.loads((tmp_path / "out.json").read_text())
    found = {line["id"]: line for line in written["found"]}
    assert len(written["found"]) == len(found) == len(ROWS)
    expected = model.generate(ROWS, max_new_tokens=NUM_NEW, root=str(data))
    assert [found[r["id"]]["answer"] for r in ROWS] == expected
    here = EvaluateRows(run, root=str(data))(columns(ROWS))
    np.testing.assert_allclose([found[r["id"]]["loss"] for r in ROWS], here["loss"], rtol=1e-5)
    assert {line["error"] for line in written["encoded"]} == {""}
    cache = EncodeRows(str(recipe), root=str(data)).cache
    assert len(cache) == len(COLOURS)
