"""checkpoint/hub.py: a hub name loads wherever a folder does, and a fault is a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token import MultiTokenForConditionalGeneration
from multi_token.checkpoint.hub import local_folder
from multi_token.checkpoint.load import read_config
from multi_token.checkpoint.save import save
from multi_token.errors import CheckpointError
from multi_token.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def cache(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The hub's cache as it is after `ada/seer` was fetched at its branches main and v1."""
    repository = tmp_path / "cache" / "models--ada--seer"
    (repository / "refs").mkdir(parents=True)
    for seed, (branch, commit) in enumerate((("main", "0" * 40), ("v1", "1" * 40))):
        torch.manual_seed(seed)
        model = MultiTokenForConditionalGeneration.from_spec(
            Recipe.model_validate(recipe_fields(tmp_path)).model
        )
        save(model, repository / "snapshots" / commit)
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return repository


def weight(model: Any) -> torch.Tensor:
    return model.projector("image").network.branches[0][0].weight


def test_a_hub_name_loads_as_a_folder_does_at_its_revision(cache: Path) -> None:
    main = MultiTokenForConditionalGeneration.from_pretrained("ada/seer")
    v1 = MultiTokenForConditionalGeneration.from_pretrained("ada/seer", revision="v1")
    assert torch.equal(
        weight(main),
        weight(
            MultiTokenForConditionalGeneration.from_pretrained(cache / "snapshots" / ("0" * 40))
        ),
    )
    assert torch.equal(
        weight(v1), weight(MultiTokenForConditionalGeneration.from_pretrained(Path("ada/seer@v1")))
    )
    assert not torch.equal(weight(main), weight(v1))


def test_a_folder_that_is_there_wins_over_a_repository(cache: Path, tmp_path: Path) -> None:
    here = shutil.copytree(cache / "snapshots" / ("1" * 40), tmp_path / "ada" / "seer")
    fields = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**fields, "multi_token_version": "here"}))
    assert read_config("ada/seer")["multi_token_version"] == "here"
    with pytest.raises(CheckpointError, match=r"revision \(v1\) is for a hub name"):
        local_folder("ada/seer", revision="v1")


@pytest.mark.parametrize("name", ["ada/nothing", "ada/nothing@v1", "runs/mistyped"])
def test_what_is_neither_here_nor_in_reach_is_one_sentence(name: str, tmp_path: Path) -> None:
    repository = name.partition("@")[0]
    with pytest.raises(CheckpointError, match=f"no folder {repository} here, and the hub's"):
        MultiTokenForConditionalGeneration.from_pretrained(name)


@pytest.mark.parametrize("name", ["runs", "/no/where", "a/b/c", "user/run@", "./user/run", "-a/b"])
def test_what_is_no_hub_name_is_taken_for_a_folder(name: str) -> None:
    assert local_folder(name) == Path(name)


def test_two_revisions_are_refused() -> None:
    with pytest.raises(CheckpointError, match="names another revision than 'v2'"):
        local_folder("user/run@v1", revision="v2")
