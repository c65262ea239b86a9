"""The demo's rows: balanced, decidable, the same every time, and the held-out really unseen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from multi_token.demo.rows import WHAT_IS_THIS, DemoData, DemoQuestion, Split, build_rows
from multi_token.demo.things import CATEGORY_PHRASES, THINGS, is_outside
from multi_token.errors import MultiTokenError

NAMED = {thing.name: thing for thing in THINGS}
PHRASED = {phrase: category for category, phrase in CATEGORY_PHRASES.items()}


def build(out: Path, *, seed: int = 0, num_names: int = 16, system: str | None = None) -> DemoData:
    return build_rows(
        out,
        num_names=num_names,
        num_renderings=3,
        num_held_out_renderings=2,
        num_validation_renderings=2,
        seed=seed,
        num_yes_no=64,
        num_categories=60,
        num_two_images=60,
        num_held_out_questions=24,
        num_held_out_things=12,
        system=system,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return build(tmp_path_factory.mktemp("demo"))


def every_question(data: DemoData) -> list[DemoQuestion]:
    return [q for split in get_args(Split) for q in data.questions(split)]


def of_kind(questions: list[DemoQuestion], *kinds: str) -> list[DemoQuestion]:
    return [q for q in questions if q.kind in kinds]


def test_rows_have_the_original_shape(data: DemoData) -> None:
    for path in data.folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert set(row) == {"id", "images", "messages"}
            assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
            assert row["messages"][0]["content"].count("<image>") == len(row["images"])


def test_every_image_of_a_row_exists_and_has_the_size_of_the_encoder(data: DemoData) -> None:
    for path in {p for q in every_question(data) for p in q.images}:
        with Image.open(data.folder / path) as image:
            assert image.size == (224, 224) and image.mode == "RGB"


def test_naming_has_every_rendering_once_and_answers_with_the_bare_name(data: DemoData) -> None:
    trained = data.questions("naming")
    assert len(trained) == 16 * 3 == len({q.images for q in trained})
    held_out = data.questions("held_out_naming")
    assert len(held_out) == 16 * 2 and {q.text for q in held_out} == {WHAT_IS_THIS}
    assert all((q.answer,) == q.names for q in trained + held_out)
    assert "<image>\nWhat is this?" in {q.text for q in trained}


def test_training_validation_and_held_out_share_no_image(data: DemoData) -> None:
    def bytes_of(questions: list[DemoQuestion]) -> set[bytes]:
        paths = {path for q in questions for path in q.images}
        return {(data.folder / path).read_bytes() for path in paths}

    trained = data.questions("naming") + data.questions("questions")
    splits = [split for split in get_args(Split) if split.startswith("held_out_")]
    held_out = [q for split in splits for q in data.questions(split)]
    validation = data.questions("validation_naming")
    assert len(validation) == 16 * 2
    three = [bytes_of(trained), bytes_of(validation), bytes_of(held_out)]
    assert sum(map(len, three)) == len(set().union(*three))


def test_training_sees_no_image_of_a_held_out_thing(data: DemoData) -> None:
    trained = data.questions("naming") + data.questions("questions")
    assert {name for q in trained for name in q.names} == set(data.names)
    assert not set(data.names) & set(data.held_out_names) and len(data.held_out_names) == 12


def test_yes_and_no_are_balanced_and_true(data: DemoData) -> None:
    questions = of_kind(data.questions("questions"), "yes_no")
    assert Counter(q.answer for q in questions) == {"yes": 32, "no": 32}
    asked: dict[str, Counter[str]] = {}
    for question in questions:
        assert (NAMED[question.names[0]].phrase in question.text) == (question.answer == "yes")
        asked.setdefault(question.text, Counter())[question.answer] += 1
    # else the words of the question would give the answer away
    assert all(count["yes"] == count["no"] for count in asked.values())


def test_category_questions_are_decidable_and_true(data: DemoData) -> None:
    for question in of_kind(every_question(data), "category"):
        category = PHRASED[question.text.removeprefix("<image>\nIs this ").removesuffix("?")]
        shown = NAMED[question.names[0]]
        if question.answer == "yes":
            assert shown.category == category
        else:
            assert question.answer == "no" and is_outside(shown, category)


def test_two_image_questions_have_exactly_one_answer_on_either_side(data: DemoData) -> None:
    questions = of_kind(every_question(data), "two_images", "known_beside_unknown")
    for question in questions:
        category = PHRASED[question.text.split(" is ")[1].removesuffix("?")]
        fitting = [n for n in question.names if NAMED[n].category == category]
        assert fitting == [question.answer]
        assert all(is_outside(NAMED[n], category) for n in question.names if n not in fitting)
    trained = of_kind(data.questions("questions"), "two_images")
    first = sum(q.names[0] == q.answer for q in trained)
    assert len(trained) == 60 and 24 <= first <= 36


def test_questions_about_held_out_things_have_the_known_side_right(data: DemoData) -> None:
    questions = data.questions("held_out_things")
    assert Counter(q.kind for q in questions) == {
        "naming": 24,
        "category": 24,
        "two_images": 24,
        "known_beside_unknown": 24,
    }
    for question in questions:
        known = {name for name in question.names if name in data.names}
        assert known == ({question.answer} if question.kind == "known_beside_unknown" else set())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_arguments_give_the_same_files(data: DemoData, tmp_path: Path) -> None:
    again = build(tmp_path / "again")
    other = build(tmp_path / "other", seed=1)
    assert contents(again.folder) == contents(data.folder) != contents(other.folder)


def modified(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    first = build(tmp_path)
    before = modified(tmp_path)
    assert build(tmp_path) == first and modified(tmp_path) == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda out: (out / "manifest.json").unlink(),
        lambda out: build(out, num_names=4),
    ],
    ids=["interrupted", "other arguments"],
)
def test_an_unfinished_or_different_folder_is_built_again(
    spoil: Callable[[Path], object], data: DemoData, tmp_path: Path
) -> None:
    build(tmp_path)
    spoil(tmp_path)
    build(tmp_path)
    assert contents(tmp_path) == contents(data.folder)


def test_a_system_message_opens_every_row_when_given(tmp_path: Path) -> None:
    data = build(tmp_path, num_names=4, system="You see.")
    rows = data.file("naming").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, rows):
        assert row["messages"][0] == {"role": "system", "content": "You see."}
    assert "<image>" in data.questions("naming")[0].text


def test_more_names_than_there_are_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MultiTokenError, match="names"):
        build(tmp_path, num_names=len(THINGS))
