"""docs/modalities: every modality has its page, and the commands of a page work unchanged."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from multi_token import registry
from multi_token.projectors.base import ProjectorSpec
from multi_token.recipe.recipe import parse_recipe

PAGES_FOLDER = Path(__file__).resolve().parent.parent / "docs" / "modalities"
PAGES = sorted(page for page in PAGES_FOLDER.glob("*.md") if page.name != "README.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TRY, RECIPE = "## Try it here", "## A recipe"


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def run(folder: Path, *words: str) -> None:
    """A command that has to succeed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def test_every_built_in_modality_has_its_page_and_its_line_in_the_index() -> None:
    names = {page.stem for page in PAGES}
    assert names >= set(registry._BUILT_INS["modality"])
    index = (PAGES_FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([a-z-]+)\.md\)", index)) == names


@pytest.mark.parametrize("name", sorted(registry._BUILT_INS["modality"]))
def test_a_page_has_a_recipe_for_real_models_and_one_to_try(name: str) -> None:
    text = (PAGES_FOLDER / f"{name}.md").read_text(encoding="utf-8")
    before, found, trial = text.partition(TRY)
    assert found and RECIPE in before, f"{name}.md has no {TRY!r} or no {RECIPE!r}"
    for part in (before, trial):
        recipes = [parse_recipe(body) for body in blocks(part, "yaml")]
        types = {m.type for recipe in recipes for m in recipe.model.modalities.values()}
        assert name in types, f"{name}.md: no recipe with type {name}"
    (recipe,) = blocks(trial, "yaml")
    assert parse_recipe(recipe).train.output_dir == f"runs/{name}"


def test_the_facts_in_the_pages_are_those_of_the_modalities() -> None:
    path = PAGES_FOLDER.parent / "facts.py"
    spec = importlib.util.spec_from_file_location("facts_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page, text in module.pages().items():
        shown = page.read_text(encoding="utf-8")
        assert module.rendered(shown, text) == shown, f"{page.name} is old: run `make fix`"


def test_the_numbers_of_tokens_of_images_are_those_of_the_projectors() -> None:
    table = (PAGES_FOLDER / "image.md").read_text("utf-8").partition("## How many tokens")[2]
    rows = re.findall(r"^\| (`\{type.*?) \| (\d+) \|", table, re.MULTILINE)
    assert len(rows) == 6
    for kinds, num_tokens in rows:
        for fields in re.findall(r"`(\{.*?\})`", kinds):
            spec = registry.build("projector", yaml.safe_load(fields), ProjectorSpec)
            assert spec.num_tokens(576) == int(num_tokens), fields


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if TRY in p.read_text("utf-8")], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_work_unchanged(page: Path, tmp_path: Path) -> None:
    trial = page.read_text(encoding="utf-8").partition(TRY)[2]
    (code,) = blocks(trial, "python")
    run(tmp_path, sys.executable, "-c", code)
    (tmp_path / "recipe.yaml").write_text(blocks(trial, "yaml")[-1], encoding="utf-8")
    commands = blocks(trial, "")[-1].splitlines()
    assert commands[0] == "multi-token train recipe.yaml" and len(commands) > 1
    for command in commands:
        run(tmp_path, *shlex.split(command))
