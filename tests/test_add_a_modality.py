"""docs/add-a-modality.md and examples/plugin_heartbeat do what they say, from an empty folder."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import multi_token
from multi_token.cli.modalities import write_package
from multi_token.testing.conformance import CLAIMS

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "plugin_heartbeat"
WALK = (ROOT / "docs" / "add-a-modality.md").read_text(encoding="utf-8")
# `In `recipe.yaml`:` or `At the end of `rows.py`:`, a block; or a block of commands alone
STEP = re.compile(
    r"(?:^(In|At the end of) `([^`\n]+)`:\n\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


class Shell:
    """Commands in one folder, with a place of its own for what pip installs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.installed = folder / ".installed"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.installed),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            # pip: into that place, from what is here already
            "PIP_TARGET": str(self.installed),
            "PIP_UPGRADE": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads "no" twice: this turns isolation off
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def __call__(self, *words: str) -> str:
        """The output of a command that has to succeed."""
        run = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{shlex.join(words)}\n{run.stdout}\n{run.stderr}"
        return run.stdout


def files(folder: Path) -> dict[str, str]:
    """Name -> text; folders are what pip and Python leave."""
    return {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.is_file()}


def steps() -> Iterator[tuple[str, str, str]]:
    """Steps of the walk, in order: ("In" or "At the end of", a file, text) or ("", "", line)."""
    for how, name, language, body in STEP.findall(WALK):
        if how:
            yield how, name, body
        elif not language:
            yield from (("", "", line) for line in body.splitlines())


def test_the_example_is_what_the_command_writes(tmp_path: Path) -> None:
    write_package("heartbeat", tmp_path / "new")
    assert files(tmp_path / "new") == files(EXAMPLE)


def test_the_modality_is_one_file_of_at_most_sixty_lines() -> None:
    lines = (EXAMPLE / "multi_token_heartbeat.py").read_text("utf-8").splitlines()
    assert len(lines) <= 60


def test_the_example_imports_only_public_names() -> None:
    """So a plug-in outlives every move of files inside the package."""
    for name, text in files(EXAMPLE).items():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("multi_token."):
                assert node.module == "multi_token.testing", f"{name} imports {node.module}"
            if isinstance(node, ast.ImportFrom) and node.module == "multi_token":
                assert {alias.name for alias in node.names} <= set(multi_token.__all__)
    for name in set(multi_token.__all__):
        assert getattr(multi_token, name) is not None


def test_the_claims_in_the_walk_are_those_of_the_kit() -> None:
    table = WALK.partition("## The checks")[2]
    listed = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    more = [
        "small micro-batches give the same features",
        "bfloat16 gives nearly the same features",
        "projector ... makes the promised embeddings",
    ]
    assert listed == ["claim", *CLAIMS, *more]


@pytest.mark.slow
def test_the_walk_leads_from_nothing_to_a_model_that_has_learned(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    outputs: list[tuple[str, str]] = []
    for how, name, text in steps():
        path = tmp_path / name
        if how == "In":
            path.write_text(text, encoding="utf-8")
        elif how:
            path.write_text(path.read_text("utf-8") + "\n\n" + text, encoding="utf-8")
        else:
            outputs.append((text, shell(*shlex.split(text))))
    checks = [output for line, output in outputs if "check heartbeat" in line]
    assert len(checks) == 2 and "BROKEN" not in "".join(checks)
    assert "gated" not in checks[0] and "projector gated makes the promised embeddings" in checks[1]
    (listed,) = [output for line, output in outputs if line == "multi-token modalities"]
    assert re.search(r"heartbeat .*multi-token-heartbeat 0\.1\.0.*ready", listed)
    answers = [output.strip() for line, output in outputs if " ask " in line]
    assert answers == ["at rest", "racing", "racing"]


@pytest.mark.slow
def test_the_example_is_installed_from_its_folder_and_its_own_tests_pass(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    source = tmp_path / "source"
    source.mkdir()  # a build leaves folders, which the repository must not get
    for name, text in files(EXAMPLE).items():
        (source / name).write_text(text, encoding="utf-8")
    shell("pip", "install", str(source))
    test = str(source / "test_heartbeat.py")
    assert "2 passed" in shell("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", test)
