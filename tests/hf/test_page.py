"""docs/hugging-face.md: its blocks run one after the other in a folder with a run."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from multi_token.recipe.recipe import Recipe
from multi_token.train.run import train

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "hugging-face.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(recipe_fields: Callable[..., dict[str, Any]], data: Path, tmp_path: Path) -> Path:
    """A folder with `runs/demo`, `cat.png` and `rows.jsonl`."""
    fields = recipe_fields(tmp_path / "runs" / "demo")
    train(Recipe.model_validate(fields), console=Console(quiet=True))
    for file in data.iterdir():
        shutil.copy(file, tmp_path / file.name)
    shutil.copy(data / "red.png", tmp_path / "cat.png")
    return tmp_path


# torch, about a machine without an accelerator
@pytest.mark.filterwarnings("ignore:.pin_memory. argument")
def test_the_blocks_of_the_page_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    assert len(BLOCKS) > 1
    for block in BLOCKS:
        exec(compile(block, "docs/hugging-face.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    new, pipe = printed[0], printed[1]
    assert new == str([names["processor"].batch_decode(names["new"], skip_special_tokens=True)[0]])
    assert pipe in new or repr(pipe)[1:-1] in new, "the pipeline gives the same answer"
