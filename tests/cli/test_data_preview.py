"""`multi-token data preview`, and the findings of `data check` as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner, Result

from multi_token.cli import app


def run_data(*words: str | Path) -> Result:
    env = {"COLUMNS": "300", "NO_COLOR": "1"}
    return CliRunner().invoke(app, ["data", *map(str, words)], env=env)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_preview_needs_no_recipe(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"image": "a.png", "question": "What?", "answer": "cat"})
    done = run_data("preview", rows)
    assert done.exit_code == 0
    assert "modalities: image (image)" in done.output
    assert "read as qa: image <- image, question <- question, answer <- answer" in done.output
    assert "row rows.jsonl[0]\nuser: [image a.png]\nWhat?\nassistant: cat" in done.output


def test_a_preview_finds_modalities_by_slots_and_columns(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "x"}]
    rows = write(tmp_path / "video.jsonl", {"video": "a.mp4", "conversations": turns})
    done = run_data("preview", rows)
    assert done.exit_code == 0 and "[video a.mp4]\nWhat happens?" in done.output
    rows = write(tmp_path / "sums.jsonl", {"article": "Long.", "highlights": "Short.", "id": "1"})
    done = run_data("preview", rows)
    assert done.exit_code == 0 and "assistant: Short." in done.output
    rows = write(tmp_path / "vectors.jsonl", {"embedding": [0.5, 1.0], "text": "aspirin"})
    done = run_data("preview", rows)
    assert done.exit_code == 0 and "[vector [0.5, 1.0]]" in done.output


def test_a_preview_takes_modalities_and_keys(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", {"ecg_id": 7, "report": "normal"})
    path = "media.ecg=records/{{ '%05d' % ecg_id }}_lr"
    done = run_data("preview", rows, "--modality", "ecg=timeseries", "--read", path)
    assert done.exit_code == 0 and "[ecg records/00007_lr]" in done.output
    failed = run_data("preview", rows, "--modality", "ecg=timeseries", "--read", "media.ecg=ecgid")
    assert failed.exit_code == 1


def test_a_check_writes_its_findings_as_json(
    recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_fields(tmp_path / "run")))
    image = str(next(iter(data.glob("*.png"))))
    rows = write(
        tmp_path / "rows.jsonl",
        {"photo": image, "caption": "red"},
        {"photo": "gone.png", "caption": "red"},
    )
    done = run_data("check", rows, "--recipe", recipe, "--json", tmp_path / "found.json")
    assert done.exit_code == 1 and "read as captions" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["rows"], found["good"], found["bad"]) == (2, 1, 1)
    assert "read as captions: image <- photo" in found["read_as"]
    (problem,) = found["problems"]
    assert problem["row_id"] == "rows.jsonl[1]" and problem["kind"] == "missing_file"
