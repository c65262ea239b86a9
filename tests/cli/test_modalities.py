"""`multi-token modalities`: what there is, whether it is right, and a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multi_token import registry
from multi_token.cli.modalities import write_package
from multi_token.errors import MultiTokenError
from multi_token.modalities.base import Modality
from multi_token.modalities.vector import VectorModality
from multi_token.projectors.base import ProjectorSpec

BROKEN = '''"""A modality whose own library is not there."""

import a_library_that_is_not_installed
'''
CHANCE = '''"""A modality that promises too much."""

from typing import Literal

from multi_token.modalities.vector import VectorModality


class Chance(VectorModality):
    """Vectors, counted wrongly [with brackets]."""

    type: Literal["chance"] = "chance"
    dim: int = 2

    def prepare(self, raw):
        item = super().prepare(raw)
        return type(item)(item.inputs, item.num_features + 1)

    @classmethod
    def example(cls, folder):
        return {}, [[1.0, 2.0], [[3.0, 4.0], [5.0, 6.0]]]
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder as pip would leave it: one broken and one wrong modality, and a name used twice."""
    folder = tmp_path / "installed"
    for name, points, source in (
        ("smell", "smell = smell:Smell\nimage = smell:Smell", BROKEN),
        ("chance", "chance = chance:Chance", CHANCE),
    ):
        info = folder / f"{name}_modality-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}-modality\nVersion: 1.2\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[multi_token.modalities]\n{points}\n", encoding="utf-8"
        )
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def command(
    *words: str | Path, path: Path | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multi_token", "modalities", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "PYTHONPATH": str(path or "")},
    )


def row(output: str, name: str) -> str:
    """The line of a table that begins with `name`."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"│ {name} ")]
    return line


def test_a_list_shows_state_owner_and_purpose_of_each(plugins: Path) -> None:
    done = command(path=plugins)
    assert done.returncode == 0, done.stderr
    assert "ready" in row(done.stdout, "vector") and "A precomputed vector [dim]" in row(
        done.stdout, "vector"
    )
    smell = row(done.stdout, "smell")
    assert "smell-modality 1.2" in smell and "broken" in smell
    assert "No module named 'a_library_that_is_not_installed'" in smell
    assert "Vectors, counted wrongly [with brackets]." in row(done.stdout, "chance")
    twins = row(done.stdout, "image")
    assert "multi_token, smell-modality 1.2" in twins and "has several owners" in twins


def test_check_prints_each_claim_and_ends_with_a_code(plugins: Path) -> None:
    good = command("check", "vector")
    assert good.returncode == 0, good.stderr
    assert "holds" in row(good.stdout, "a mixed batch equals one by one")
    assert "BROKEN" not in good.stdout
    wrong = command("check", "chance", path=plugins)
    assert wrong.returncode == 1 and "broken: chance" in wrong.stdout
    claim = row(wrong.stdout, "the encoder gives the promised features")
    assert "BROKEN" in claim and "promises 2 features, the encoder gives 1" in claim
    assert "holds" in row(wrong.stdout, "a mixed batch equals one by one")


def test_a_modality_that_cannot_be_imported_is_one_broken_claim(plugins: Path) -> None:
    done = command("check", "smell", path=plugins)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "a_library_that_is_not_installed" in row(done.stdout, "it can be imported")


@pytest.mark.slow
def test_every_modality_keeps_every_claim() -> None:
    done = command("check", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in registry.registered_names("modality"):
        assert f" {name} (multi_token) " in done.stdout
    assert "not checked" not in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("check",), "expected the name of a modality, or --all"),
        (("check", "vector", "--all"), "expected the name of a modality, or --all"),
        (("check", "vectr"), "did you mean 'vector'"),
        (("new", "image"), "modality 'image' is owned by multi_token; choose another name"),
        (("new", "Heart"), "'Heart' cannot name a modality: expected small letters"),
        (("new", "heart-beat"), "cannot name a modality"),
        (("new", "text"), "'text' cannot name a modality"),
    ],
)
def test_bad_input_is_a_sentence_and_a_code(
    words: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_new_writes_a_package_and_says_what_comes_next(tmp_path: Path) -> None:
    done = command("new", "left_radar", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "multi-token-left-radar"
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "multi_token_left_radar.py",
        "pyproject.toml",
        "test_left_radar.py",
    }
    assert "class LeftRadarModality(Modality)" in (folder / "multi_token_left_radar.py").read_text()
    assert "multi-token modalities check left_radar" in done.stderr
    again = command("new", "left_radar", cwd=tmp_path)
    assert again.returncode == 1 and "is there already" in again.stderr


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(MultiTokenError, match="expected a new or empty folder"):
        write_package("radar", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VectorModality, "requires", ("soundfile", "no_such_package"))
    monkeypatch.setattr(VectorModality, "install_extra", "multi_token[audio]")
    entry = registry.entry("modality", "vector", Modality)
    assert entry.state == "missing extra"
    assert entry.fault == 'no_such_package not installed: pip install "multi_token[audio]"'


def test_every_extra_that_a_modality_names_has_its_packages_in_the_project() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    names = {"bs4": "beautifulsoup4"}  # imported under another name than installed
    extras = set()
    for name in registry._BUILT_INS["modality"]:
        cls: Any = registry.resolve("modality", name)
        assert bool(cls.requires) == bool(cls.install_extra), name
        if not cls.requires:
            continue
        extra = cls.install_extra.removeprefix("multi_token[").removesuffix("]")
        extras.add(extra)
        (line,) = [line for line in project.splitlines() if line.startswith(f"{extra} = [")]
        for package in cls.requires:
            assert f'"{names.get(package, package)}>=' in line
    assert extras == {"audio", "video", "document", "volume"}


def test_a_registered_name_is_owned_by_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._registered["modality"], "pulse", VectorModality)
    entry = registry.entry("modality", "pulse", Modality)
    assert (entry.state, entry.owner) == ("ready", "multi_token.modalities.vector")
    monkeypatch.setitem(registry._registered["projector"], "pulse", VectorModality)
    wrong = registry.entry("projector", "pulse", ProjectorSpec)
    assert wrong.state == "broken" and "is not a ProjectorSpec" in wrong.fault
