"""The documents are true: tree, commands, recipes, links, versions, decisions."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from multi_token import __version__
from multi_token.recipe.recipe import Recipe, load_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(
    path
    for path in (ROOT / "multi_token" / "recipes").glob("*.yaml")
    if not path.name.endswith(".job.yaml")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

# As on a wide terminal without colours, wherever the tests run: option names stay whole.
PLAIN = {"COLUMNS": "200", "TERMINAL_WIDTH": "200", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(text) if found == language]


def code_of(text: str) -> list[str]:
    """Return the lines that a reader may type: of plain fenced blocks, and between backticks."""
    lines = [line for body in blocks(text, "") for line in body.splitlines()]
    return lines + CODE.findall(FENCE.sub("", text))


@cache
def help_of(*command: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "multi_token", *command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **PLAIN},
    )
    assert run.returncode == 0, f"multi-token {' '.join(command)} --help: {run.stderr}"
    return run.stdout


def commands() -> list[tuple[str, ...]]:
    """Commands of the README, as far as their names go: ("data", "check")."""
    found = set()
    for line in code_of(README):
        if match := re.search(
            r"\bmulti-token ((?:data |evaluate |modalities |recipes )?[a-z]+)", line
        ):
            found.add(tuple(match[1].split()))
    return sorted(found)


def parsed(text: str, folder: Path) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def tree() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    assert tree().rendered(README) == README, "the README's tree is old: run `make fix`"


def test_the_readme_names_commands() -> None:
    named = {" ".join(command) for command in commands()}
    assert named >= {"train", "chat", "ask", "predict", "data check", "data show"}


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_each_command_in_the_readme_exists(command: tuple[str, ...]) -> None:
    assert command[-1] in help_of(*command[:-1])
    help_of(*command)


def test_options_in_the_readme_exist() -> None:
    for line in code_of(README):
        match = re.search(
            r"\bmulti-token ((?:data |evaluate |modalities |recipes )?[a-z]+)(.*)", line
        )
        for option in re.findall(r"--[a-z-]+", match[2]) if match else []:
            assert option in help_of(*match[1].split()), f"multi-token {match[1]} has no {option}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_each_recipe_parses(path: Path) -> None:
    assert load_recipe(path).train.output_dir == f"runs/{path.stem}"


def test_each_recipe_in_a_document_parses(tmp_path: Path) -> None:
    found = [(p, body) for p in DOCUMENTS for body in blocks(p.read_text("utf-8"), "yaml")]
    assert found, "no document shows a recipe"
    for path, body in found:
        assert parsed(body, tmp_path).model.modalities, name_of(path)


def test_training_arguments_in_recipes_are_known_to_transformers(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    recipes = {name_of(path): load_recipe(path) for path in RECIPES}
    recipes |= {
        f"README.md, block {number}": parsed(body, tmp_path)
        for number, body in enumerate(blocks(README, "yaml"))
    }
    for name, recipe in recipes.items():
        for args in [recipe.train.args, *(stage.args for stage in recipe.train.stages)]:
            assert args.keys() <= known, f"{name}: {sorted(args.keys() - known)}"


def test_python_in_documents_compiles() -> None:
    for path in DOCUMENTS:
        for body in blocks(path.read_text(encoding="utf-8"), "python"):
            compile(body, name_of(path), "exec")


def test_relative_links_lead_somewhere() -> None:
    faults = []
    for path in DOCUMENTS:
        for link in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:|#", link):
                continue
            if not (path.parent / link.partition("#")[0]).exists():
                faults.append(f"{name_of(path)}: {link} does not exist")
    assert not faults, "\n".join(faults)


def test_tests_named_in_documents_exist() -> None:
    found = [
        (page, *named)
        for page in DOCUMENTS
        for named in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", page.read_text("utf-8"))
    ]
    assert len(found) > 24, "docs/security.md names a test for each line"
    for page, path, name in found:
        text = (ROOT / path).read_text("utf-8") if (ROOT / path).exists() else ""
        assert f"def {name}(" in text, f"{name_of(page)}: {path}::{name} does not exist"


def test_make_targets_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert targets >= {"help", "demo", "test", "check", "fix", "bench"}
    for path in DOCUMENTS:
        for line in code_of(path.read_text(encoding="utf-8")):
            if match := re.match(r"make ([a-z-]+)", line):
                assert match[1] in targets, f"{name_of(path)}: no target `make {match[1]}`"


def test_make_bench_runs_scripts_that_need_no_argument() -> None:
    printed = subprocess.run(
        ["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"benchmarks/\w+\.py", printed))
    assert len(named) >= 10
    for name in named:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert '"__main__"' in text, f"{name} is a module that others import"
        required = re.findall(r"add_argument\(\"(\w+)\"(?![^)]*nargs=\"[?*]\")", text)
        assert not required, f"{name} needs {required}, and `make bench` gives none"


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in changelog, f"CHANGELOG.md has no entry for {__version__}"


def test_decisions_are_numbered_and_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    pages = sorted(folder.glob("[0-9]*.md"))
    assert [p.name[:4] for p in pages] == [f"{n:04}" for n in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix(f"# {page.name[:4]} ")
        assert f"- [{page.name[:4]}]({page.name}) {title}" in listed, f"{page.name} is not listed"
        for part in ("## Context", "## Decision", "## Consequences"):
            assert part in text, f"{page.name} has no {part!r}"


def test_constraints_pin_all_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += extra
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([a-z0-9-]+)==", constraints, re.MULTILINE))
    for requirement in declared:
        (name,) = re.findall(r"^[A-Za-z0-9_-]+", requirement)
        assert name.lower().replace("_", "-") in pinned, f"constraints.txt does not pin {name}"


def test_install_commands_in_documents_name_what_constraints_pin() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for path in DOCUMENTS:
        for line in code_of(path.read_text(encoding="utf-8")):
            for pin in re.findall(r"[a-z0-9-]+==[0-9.]+", line):
                assert pin in pins, f"{name_of(path)}: {pin} is not what constraints.txt pins"
