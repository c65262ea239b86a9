"""`multi-token data check` by several processes: the last of them reports on all rows, exactly."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from multi_token.cli import app
from multi_token.errors import MultiTokenError
from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

pytestmark = pytest.mark.slow

Fields = Callable[..., dict[str, Any]]


def check(*words: str | Path, **env: str) -> Result:
    env = {"COLUMNS": "300", "NO_COLOR": "1", **env}
    return CliRunner().invoke(app, ["data", "check", *map(str, words)], env=env)


@pytest.fixture
def recipe(recipe_fields: Fields, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(tmp_path / "run")))
    return path


@pytest.fixture
def rows(data: Path, tmp_path: Path) -> Path:
    """Twelve rows of several lengths, three of them bad."""
    lines = (data / "rows.jsonl").read_text().splitlines()
    made = []
    for number in range(12):
        row = json.loads(lines[number % 4])
        row["id"] = f"row-{number}"
        row["images"] = [str(data / row["images"][0])]
        row["messages"][1]["content"] += " red" * number
        if number in (3, 4, 10):
            row["images"] = [f"gone-{number}.png"]
        made.append(json.dumps(row) + "\n")
    path = tmp_path / "twelve.jsonl"
    path.write_text("".join(made))
    return path


def test_the_last_share_reports_what_one_process_would(
    recipe: Path, rows: Path, tmp_path: Path
) -> None:
    alone = check(rows, "--recipe", recipe)
    assert alone.exit_code == 1 and "12 rows: 9 good, 3 bad" in alone.output
    assert not (tmp_path / "run").exists(), "one process leaves no files"
    for attempt in range(2):  # the second time all good rows are known
        kept = tmp_path / "kept"
        for share in (2, 0, 1):
            shares = ("--num-shards", "3", "--shard", str(share), "--keep", kept)
            done = check(rows, "--recipe", recipe, *shares)
            assert f"shard {share} of 3: 4 of 12 rows, " in done.output
            if share != 1:
                assert done.exit_code == 0, "torchrun would end the others"
                assert "the last shard to finish reports" in done.output
        first, _, rest = done.output.partition("\n")
        assert (done.exit_code, rest) == (alone.exit_code, alone.output), attempt
        assert first.endswith("2 bad")
        assert list(kept.glob("*.done")) == []


def test_training_reads_no_media_of_rows_that_were_checked(
    recipe_fields: Fields, data: Path, tmp_path: Path, recipe: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((data / "rows.jsonl").read_text())
    for name in ("red", "blue", "green", "white"):
        (tmp_path / f"{name}.png").write_bytes((data / f"{name}.png").read_bytes())
    for share in range(2):
        env = {"RANK": str(share), "WORLD_SIZE": "2"}
        done = check(rows, "--recipe", recipe, **env)
    assert "4 rows: 4 good, 0 bad" in done.output
    for name in ("red", "blue"):  # no image any more, which only a reading of the file finds
        path = tmp_path / f"{name}.png"
        before = path.stat()
        path.write_bytes(b"x" * before.st_size)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    fields = recipe_fields(tmp_path / "run", closed_form=None, calibration_items=1)
    fields["data"]["train"] = [{"rows": str(rows)}]
    console = Console(record=True, width=300, file=io.StringIO())
    with pytest.raises(MultiTokenError, match="red|blue"):
        train(Recipe.model_validate(fields), console=console)
    assert "4 good, 0 skipped" in console.export_text()


def test_shares_that_cannot_be_are_a_sentence(recipe: Path, rows: Path) -> None:
    done = check(rows, "--recipe", recipe, "--shard", "1")
    assert isinstance(done.exception, MultiTokenError)
    assert "--shard and --num-shards belong together" in str(done.exception)


def test_torchrun_shares_the_check(recipe: Path, rows: Path) -> None:
    alone = check(rows, "--recipe", recipe)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["-m", "multi_token", "data", "check", str(rows), "--recipe", str(recipe)]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert alone.output in done.stdout
