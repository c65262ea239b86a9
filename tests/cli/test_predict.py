"""`multi-token predict` as users start it: one process, several shards, torchrun, and bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from multi_token.cli import app
from multi_token.cli.predict import bad_row_rule, open_run_rows
from multi_token.data.row_source import open_rows
from multi_token.errors import MultiTokenError, RecipeError
from multi_token.evaluate.scores import score_rows, with_processor
from multi_token.recipe.data import DataSource
from tests.train.launchers import launched

NUM_ROWS = 20


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "run"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows about images of many colours beside them."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for i in range(NUM_ROWS):
        Image.new("RGB", (16, 16), (12 * i, 255 - 9 * i, 40)).save(folder / f"{i}.png")
        question = {"role": "user", "content": f"What is <image>? {'Look well. ' * (i % 4)}"}
        answer = {"role": "assistant", "content": "left out"}
        lines.append({"id": f"r{i}", "images": [f"{i}.png"], "messages": [question, answer]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def expected(model: Any, rows: Path) -> list[tuple[str, str]]:
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    answers = model.generate(found, max_new_tokens=5, root=str(rows.parent))
    return [(row["id"], answer) for row, answer in zip(found, answers, strict=True)]


def predict(run: Path, rows: Path, out: Path, *words: str) -> Result:
    given = [str(word) for word in (run, rows, "--out", out, "--max-new-tokens", "5", *words)]
    return CliRunner().invoke(app, ["predict", *given], env={"COLUMNS": "300"})


def read(out: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    return [(line["id"], line["answer"]) for line in lines]


def test_predict_answers_in_order_and_a_second_start_has_nothing_to_do(
    run: Path, rows: Path, tmp_path: Path, expected: Any
) -> None:
    out = tmp_path / "answers" / "out.jsonl"
    done = predict(run, rows, out, "--batch-size", "3", "--num-workers", "2")
    assert done.exit_code == 0 and "20 results written to" in done.output, done.output
    assert read(out) == expected
    again = predict(run, rows, out)
    assert again.exit_code == 0 and "20 of 20 rows are answered already" in again.output


def test_shards_write_one_file_and_a_killed_one_continues(
    run: Path, rows: Path, tmp_path: Path, expected: Any
) -> None:
    out = tmp_path / "out.parquet"
    first = predict(run, rows, out, "--num-shards", "2", "--shard", "0", "--batch-size", "4")
    assert first.exit_code == 0 and not out.exists()
    assert "part-0-of-2 is done; the last process to finish writes" in first.output
    part = tmp_path / "out.parquet.parts" / "part-0-of-2.jsonl"
    lines = part.read_text().splitlines(True)
    kept = [{**json.loads(line), "answer": "kept"} for line in lines[:5]]
    part.write_text("".join(json.dumps(line) + "\n" for line in kept) + lines[5][:7])
    # another number of processes, and a smaller batch
    second = predict(run, rows, out, "--batch-size", "2")
    assert second.exit_code == 0, second.output
    assert "5 of 20 rows are answered already" in second.output
    found = pyarrow.parquet.read_table(out).to_pylist()
    ids = {line["id"] for line in kept}
    assert [(row["id"], row["answer"]) for row in found] == [
        (id, "kept" if id in ids else answer) for id, answer in expected
    ]


@pytest.mark.slow
def test_torchrun_answers_as_one_process(
    run: Path, rows: Path, tmp_path: Path, expected: Any
) -> None:
    out = tmp_path / "out.jsonl"
    words = ["predict", str(run), str(rows), "--out", str(out), "--max-new-tokens", "5"]
    printed = launched(2, ["-m", "multi_token", *words])
    assert read(out) == expected
    assert printed.count("20 results written to") == 1


def test_evaluate_rows_writes_the_scores_of_score_rows_and_prints_their_means(
    run: Path, rows: Path, tmp_path: Path, model: Any
) -> None:
    out = tmp_path / "scores.jsonl"
    words = ["evaluate", "rows", str(run), "--rows", str(rows), "--out", str(out)]
    first = CliRunner().invoke(app, [*words, "--num-shards", "2", "--shard", "1"])
    assert first.exit_code == 0 and not out.exists()
    done = CliRunner().invoke(app, [*words, "--batch-size", "3"])
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    source = open_rows(DataSource(rows=str(rows)), model.modalities)
    chosen = with_processor(source, model, range(NUM_ROWS))
    expected = score_rows(model, [processor(conversation) for conversation, processor in chosen])
    assert [line["id"] for line in found] == [f"r{i}" for i in range(NUM_ROWS)]
    assert [line["loss"] for line in found] == pytest.approx(expected.loss.tolist(), rel=1e-4)
    assert [line["exact"] for line in found] == expected.accuracy.tolist()
    assert f"loss {expected.loss.mean():.3f} ±" in done.output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--max-new-tokens", "6"), "differs in max_new_tokens 5 there, 6 here"),
        (("--temperature", "0.5"), "differs in temperature 0.0 there, 0.5 here; seed None there"),
        (("--split", "test"), "which have no split 'test'"),
        (("--num-shards", "2", "--shard", "2"), "expected --shard from 0 to 1"),
        (("--num-shards", "2"), "belong together"),
    ],
)
def test_another_job_is_refused_before_the_model_is_loaded(
    run: Path, rows: Path, tmp_path: Path, words: Any, sentence: str
) -> None:
    out = tmp_path / "out.jsonl"
    assert predict(run, rows, out, "--num-shards", "4", "--shard", "0").exit_code == 0
    done = predict(run, rows, out, *words, "--language-model", "nowhere")
    assert isinstance(done.exception, MultiTokenError) and sentence in str(done.exception)


def test_the_blind_test_is_not_repeated_by_several_processes(
    run: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(app, ["evaluate", "blind", str(run), "--rows", str(rows)])
    assert isinstance(done.exception, MultiTokenError) and "in one process" in str(done.exception)


def test_another_run_is_refused(run: Path, rows: Path, tmp_path: Path, model: Any) -> None:
    out = tmp_path / "out.jsonl"
    assert predict(run, rows, out).exit_code == 0
    other = tmp_path / "other"
    model.save_pretrained(other)
    # an equal run in another folder is the same
    assert "answered already" in predict(other, rows, out).output
    config = other / "config.json"
    config.write_text(config.read_text().replace('"expand"', '"expand" '))
    done = predict(other, rows, out)
    assert isinstance(done.exception, MultiTokenError) and "differs in run" in str(done.exception)


def test_a_bad_row_is_named_and_the_rule_is_that_of_the_recipe(
    run: Path,
    rows: Path,
    tmp_path: Path,
    model: Any,
    recipe_fields: Callable[..., dict[str, Any]],
) -> None:
    lines = rows.read_text().splitlines()[:3]
    lines[1] = lines[1].replace("1.png", "none.png")
    bad = rows.parent / "bad.jsonl"
    bad.write_text("\n".join(lines))
    raised = predict(run, bad, tmp_path / "raised.jsonl", "--batch-size", "1")
    assert isinstance(raised.exception, MultiTokenError)
    assert "row r1: image: no file at" in str(raised.exception)
    skipping = tmp_path / "run"
    model.save_pretrained(skipping)
    fields = recipe_fields(skipping)
    fields["data"]["on_bad_row"] = "skip"
    (skipping / "recipe.yaml").write_text(json.dumps(fields))
    out = tmp_path / "skipped.jsonl"
    skipped = predict(skipping, bad, out)
    assert skipped.exit_code == 0 and "bad row r1: image: no file at" in skipped.output
    assert "3 results written to" in skipped.output and "1 of them bad rows" in skipped.output
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(line) for line in found] == [["answer", "id"], ["error", "id"], ["answer", "id"]]


def test_rows_of_a_run_on_the_hub_are_read_as_its_recipe_reads_them(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe_fields: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "cache" / "models--ada--seer"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(run, snapshot)
    (repository / "refs").mkdir()
    for branch in ("main", "v1"):
        (repository / "refs" / branch).write_text("0" * 40)
    Path("rows.jsonl").write_text('{"file": "a.png", "kind": "cat"}\n')
    fields = recipe_fields(tmp_path / "out")
    turns = [{"user": "<image> Which animal?"}, {"assistant": "{{ kind }}"}]
    source = {"rows": "rows.jsonl", "media": {"image": "file"}, "turns": turns}
    fields["data"] = {"train": [source], "on_bad_row": "skip"}
    (snapshot / "recipe.yaml").write_text(json.dumps(fields))
    for name in (Path("ada/seer"), Path("ada/seer@v1")):
        opened = open_run_rows(name, "rows.jsonl", "train", None)
        assert "Which animal?" in str(opened.rows[0]["messages"])
        assert bad_row_rule(name, None) == "skip"
    (snapshot / "recipe.yaml").write_text("data: {}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        open_run_rows(Path("ada/seer"), "rows.jsonl", "train", None)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        bad_row_rule(Path("ada/seer"), None)
    (snapshot / "recipe.yaml").unlink()
    assert open_run_rows(Path("ada/seer"), "rows.jsonl", "train", None).rows[0]["kind"] == "cat"
    assert bad_row_rule(Path("ada/seer"), None) == "raise"
