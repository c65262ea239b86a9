"""data/sources.py: rows are read once, by all processes together, and not again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from multi_token.data.files.open import load_rows
from multi_token.data.sources import TrainingSource, good_rows
from multi_token.errors import RowError
from multi_token.processor import build_processor
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

Fields = Callable[..., dict[str, Any]]
SCRIPT = Path(__file__).with_name("scanning.py")
ROOT = Path(__file__).resolve().parents[2]
NUM = 80


def write_rows(folder: Path) -> None:
    """Write 80 rows with an image each; the twelfth image cannot be read."""
    folder.mkdir()
    lines = []
    for number in range(NUM):
        if number != 11:
            Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
        row = {
            "id": str(number),
            "images": [f"{number}.png"],
            "messages": [
                {"role": "user", "content": "What is <image>?" + " so" * (number % 7)},
                {"role": "assistant", "content": "red"},
            ],
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))


def source_of(folder: Path, recipe: Recipe) -> TrainingSource:
    processor = build_processor(recipe, root=str(folder))
    return TrainingSource(load_rows(str(folder / "rows.jsonl")), processor, "rows.jsonl")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_second_start_opens_no_media(
    recipe_fields: Fields, tmp_path: Path, num_workers: int
) -> None:
    write_rows(tmp_path / "rows")
    fields = recipe_fields(tmp_path / "run")
    fields["data"]["on_bad_row"] = "skip"
    fields["train"]["args"]["dataloader_num_workers"] = num_workers
    recipe, quiet = Recipe.model_validate(fields), Console(quiet=True)
    (first,) = good_rows([source_of(tmp_path / "rows", recipe)], recipe, quiet)
    assert list(first.good_indices or ()) == [i for i in range(NUM) if i != 11]
    for path in (tmp_path / "rows").glob("*.png"):
        before = path.stat()
        path.write_bytes(b"x" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (second,) = good_rows([source_of(tmp_path / "rows", recipe)], recipe, quiet)
    assert (second.good_indices, second.lengths) == (first.good_indices, first.lengths)
    os.utime(tmp_path / "rows" / "3.png")
    (third,) = good_rows([source_of(tmp_path / "rows", recipe)], recipe, quiet)
    assert list(third.good_indices or ()) == [i for i in range(NUM) if i not in (3, 11)]


def test_a_resumed_run_remembers_its_rows_and_still_refuses_a_bad_one(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows")
    fields = recipe_fields(tmp_path / "run", closed_form=None, calibration_items=1)
    fields["data"]["train"] = [{"rows": str(tmp_path / "rows" / "rows.jsonl")}]
    quiet = Console(quiet=True)
    for _ in range(2):
        with pytest.raises(RowError, match=r"row 11: image: no file .* \(1 of 80 rows are bad"):
            train(Recipe.model_validate(fields), console=quiet)
    Image.new("RGB", (4, 4)).save(tmp_path / "rows" / "11.png")
    train(Recipe.model_validate(fields), console=quiet)
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.slow
def test_two_processes_share_the_reading_and_notice_a_machine_without_the_media(
    recipe_fields: Fields, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows")
    write_rows(tmp_path / "bare")
    for path in (tmp_path / "bare").glob("*.png"):
        path.unlink()
    fields = recipe_fields(tmp_path / "run")
    fields["data"]["on_bad_row"] = "skip"

    def seen(*folders: str) -> list[dict[str, Any]]:
        job, out = tmp_path / "job.json", tmp_path / "seen.json"
        paths = [str(tmp_path / name) for name in folders]
        job.write_text(json.dumps({"out": str(out), "fields": fields, "folders": paths}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", "2", str(SCRIPT), str(job)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())

    for one in seen("rows", "bare"):
        for start in ("first", "second"):
            assert (
                "the data (media of rows.jsonl) of process 1 differs from that"
                in one[start]["error"]
            )
    fields["train"]["output_dir"] = str(tmp_path / "other")
    zero, one = seen("rows", "rows")
    alone = Recipe.model_validate(
        {**fields, "train": {**fields["train"], "output_dir": str(tmp_path / "alone")}}
    )
    (expected,) = good_rows([source_of(tmp_path / "rows", alone)], alone, Console(quiet=True))
    for process in (zero, one):
        for start in ("first", "second"):
            assert process[start]["good"] == list(expected.good_indices or ())
            assert process[start]["lengths"] == list(expected.lengths)
    compared = set(map(str, range(0, NUM, 3)))
    assert set(zero["first"]["opened"]) - compared == {str(i) for i in range(0, NUM, 2)} - compared
    assert set(one["first"]["opened"]) - compared == {str(i) for i in range(1, NUM, 2)} - compared
    assert set(zero["second"]["opened"]) | set(one["second"]["opened"]) <= {"11"}
