"""Rows of the demo: images and questions, in the form of any user's rows.

Only this file splits them into trained and held-out ones.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

from multi_token.demo.pictures import rendering
from multi_token.demo.things import CATEGORY_PHRASES, Category, Thing, is_outside, things

Kind = Literal["naming", "yes_no", "category", "two_pictures", "known_beside_unknown"]
"""naming: What is this? · yes_no: Is this a dog? · category: Is this an animal?
two_pictures: Which of these is a fruit? · known_beside_unknown: the same, where the image that
fits was trained and the other was never seen."""

WHAT_IS_THIS = "What is <image>?"
_OTHER_PHRASING = "<image>\nWhat is this?"

_VERSION = 3
"""Raised with each change of the files, so that old folders are built again."""


@dataclass(frozen=True)
class DemoQuestion:
    """One question with its images and the only answer that counts."""

    id: str
    kind: Kind
    text: str
    """Text of the row, with one `<image>` for each image."""
    pictures: tuple[str, ...]
    """Relative to the folder of the data."""
    names: tuple[str, ...]
    """Names of the things in the images, in the same order."""
    answer: str


@dataclass(frozen=True)
class DemoData:
    """A folder that `build_rows` has finished."""

    folder: Path
    names: tuple[str, ...]
    """The things that are trained."""
    held_out_names: tuple[str, ...]
    """The things of which training sees no image."""

    @property
    def naming(self) -> Path:
        """Training: one image, its name."""
        return self.folder / "naming.jsonl"

    @property
    def questions(self) -> Path:
        """Training: yes/no, category and two-image questions."""
        return self.folder / "questions.jsonl"

    @property
    def validation_naming(self) -> Path:
        """Every validation rendering of every trained thing: what settings are chosen by."""
        return self.folder / "validation_naming.jsonl"

    @property
    def held_out_naming(self) -> Path:
        """Every held-out rendering of every trained thing."""
        return self.folder / "held_out_naming.jsonl"

    @property
    def held_out_yes_no(self) -> Path:
        """Yes/no and category questions about held-out renderings."""
        return self.folder / "held_out_yes_no.jsonl"

    @property
    def held_out_two_pictures(self) -> Path:
        """Two-image questions about held-out renderings."""
        return self.folder / "held_out_two_pictures.jsonl"

    @property
    def held_out_things(self) -> Path:
        """Questions about things that training never shows."""
        return self.folder / "held_out_things.jsonl"


def build_rows(
    out: Path,
    *,
    num_names: int,
    num_renderings: int,
    num_held_out_renderings: int,
    seed: int,
    num_validation_renderings: int = 0,
    num_yes_no: int = 400,
    num_categories: int = 200,
    num_two_pictures: int = 400,
    num_held_out_questions: int = 100,
    num_held_out_things: int = 20,
    system: str | None = None,
) -> DemoData:
    """Write images and rows to `out`; the same arguments give the same files.

    Naming has one row for each rendering; the three numbers of questions are rows for training,
    `num_held_out_questions` is the number of held-out rows of each kind. Validation renderings are
    in neither: settings are chosen on them, so that the held-out ones stay untouched.
    A folder that is already finished with the same arguments is left alone.
    """
    arguments = {k: v for k, v in locals().items() if k != "out"} | {"version": _VERSION}
    known = things(num_names + num_held_out_things)
    trained, held_out = known[:num_names], known[num_names:]
    data = DemoData(out, tuple(t.name for t in trained), tuple(t.name for t in held_out))
    if _is_finished(out, arguments):
        return data
    _clear(out)

    seen = _Pictures(trained, "seen", range(num_renderings), seed)
    # Numbers that training never draws, for any num_renderings.
    held_out_numbers = range(1_000_000, 1_000_000 + num_held_out_renderings)
    unseen = _Pictures(trained, "held_out", held_out_numbers, seed)
    validation_numbers = range(2_000_000, 2_000_000 + num_validation_renderings)
    validation = _Pictures(trained, "validation", validation_numbers, seed)
    unknown = _Pictures(held_out, "held_out", held_out_numbers, seed)
    trained_categories = {thing.category for thing in trained}
    asked: list[Category] = [c for c in CATEGORY_PHRASES if c in trained_categories]

    def write(path: Path, questions: Iterable[DemoQuestion]) -> None:
        lines = (json.dumps(_row(q, system), ensure_ascii=False) for q in questions)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def numbers(kind: str) -> random.Random:
        # One generator per kind: more rows of one kind leave the others unchanged.
        return random.Random(f"{seed}/{kind}")

    for pictures in (seen, validation, unseen, unknown):
        pictures.write(out)
    write(data.naming, _naming(seen, numbers("naming")))
    write(
        data.questions,
        [
            *_yes_no(seen, num_yes_no, numbers("yes_no")),
            *_categories(seen, asked, num_categories, numbers("category")),
            *_two_pictures(seen, seen, asked, num_two_pictures, numbers("two_pictures")),
        ],
    )
    n = num_held_out_questions
    write(data.validation_naming, _naming(validation, None))
    write(data.held_out_naming, _naming(unseen, None))
    write(
        data.held_out_yes_no,
        [
            *_yes_no(unseen, n, numbers("held_out/yes_no")),
            *_categories(unseen, asked, n, numbers("held_out/category")),
        ],
    )
    write(
        data.held_out_two_pictures,
        _two_pictures(unseen, unseen, asked, n, numbers("held_out/two_pictures")),
    )
    write(
        data.held_out_things,
        [
            *_naming(unknown, None),
            *_categories(unknown, asked, n, numbers("things/category")),
            *_two_pictures(unknown, unknown, asked, n, numbers("things/two_pictures")),
            *_two_pictures(unseen, unknown, asked, n, numbers("things/known")),
        ],
    )
    (out / "manifest.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    return data


def read_questions(path: Path) -> list[DemoQuestion]:
    """The questions of a file that `build_rows` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_parse_question(json.loads(line)) for line in lines]


@dataclass(frozen=True)
class _Pictures:
    """The renderings of some things that one split may use."""

    things: Sequence[Thing]
    split: str
    numbers: range
    seed: int

    def path(self, thing: Thing, place: int) -> str:
        return f"pictures/{thing.name}/{self.split}_{place:03d}.png"

    def pick(self, thing: Thing, random_numbers: random.Random) -> str:
        return self.path(thing, random_numbers.randrange(len(self.numbers)))

    def write(self, out: Path) -> None:
        def write_thing(thing: Thing) -> None:
            (out / "pictures" / thing.name).mkdir(parents=True, exist_ok=True)
            for place, number in enumerate(self.numbers):
                picture = rendering(thing, number, self.seed)
                picture.save(out / self.path(thing, place), compress_level=1)

        # Threads suffice: Pillow releases the GIL while it turns, scales and compresses.
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_thing, self.things))


def _naming(pictures: _Pictures, random_numbers: random.Random | None) -> Iterator[DemoQuestion]:
    """Every image once; without random numbers always in the same words."""
    for place in range(len(pictures.numbers)):
        for thing in pictures.things:
            text = WHAT_IS_THIS
            if random_numbers is not None and random_numbers.random() < 0.3:
                text = _OTHER_PHRASING
            path = pictures.path(thing, place)
            yield DemoQuestion(
                f"naming/{thing.name}/{place}", "naming", text, (path,), (thing.name,), thing.name
            )


def _yes_no(
    pictures: _Pictures, num_rows: int, random_numbers: random.Random
) -> Iterator[DemoQuestion]:
    """Each name is asked for as often with "yes" as with "no", so the words alone tell nothing."""
    for i, asked in enumerate(islice(cycle(pictures.things), num_rows)):
        yes = (i // len(pictures.things) + i) % 2 == 0
        shown = asked if yes else _pick_other(asked, pictures.things, random_numbers)
        yield DemoQuestion(
            f"yes_no/{i}",
            "yes_no",
            f"<image>\nIs this {asked.phrase}?",
            (pictures.pick(shown, random_numbers),),
            (shown.name,),
            "yes" if yes else "no",
        )


def _pick_other(thing: Thing, among: Sequence[Thing], random_numbers: random.Random) -> Thing:
    """Half the time of the same category: an apple is harder to tell from a pear than a bus."""
    others = [t for t in among if t is not thing]
    near = [t for t in others if t.category == thing.category]
    return random_numbers.choice(near if near and random_numbers.random() < 0.5 else others)


def _categories(
    pictures: _Pictures, asked: Sequence[Category], num_rows: int, random_numbers: random.Random
) -> Iterator[DemoQuestion]:
    """Is this an animal? Yes and no in turn, for each category that has both."""
    sides = _split_by_category(pictures, pictures, asked)
    for i, (category, inside, outside) in enumerate(islice(cycle(sides), num_rows)):
        yes = i // len(sides) % 2 == 0
        shown = random_numbers.choice(inside if yes else outside)
        yield DemoQuestion(
            f"category/{i}",
            "category",
            f"<image>\nIs this {CATEGORY_PHRASES[category]}?",
            (pictures.pick(shown, random_numbers),),
            (shown.name,),
            "yes" if yes else "no",
        )


def _two_pictures(
    fitting: _Pictures,
    other: _Pictures,
    asked: Sequence[Category],
    num_rows: int,
    random_numbers: random.Random,
) -> Iterator[DemoQuestion]:
    """Ask "Which of these is a fruit?"; the answer is its name, so it must be recognized."""
    kind: Kind = "two_pictures" if fitting is other else "known_beside_unknown"
    sides = _split_by_category(fitting, other, asked)
    for i, (category, inside, outside) in enumerate(islice(cycle(sides), num_rows)):
        right, wrong = random_numbers.choice(inside), random_numbers.choice(outside)
        pair = [
            (fitting.pick(right, random_numbers), right.name),
            (other.pick(wrong, random_numbers), wrong.name),
        ]
        if i // len(sides) % 2:
            pair.reverse()
        yield DemoQuestion(
            f"{kind}/{i}",
            kind,
            f"Which of <image> and <image> is {CATEGORY_PHRASES[category]}?",
            tuple(path for path, _ in pair),
            tuple(name for _, name in pair),
            right.name,
        )


def _split_by_category(
    fitting: _Pictures, other: _Pictures, asked: Sequence[Category]
) -> list[tuple[Category, list[Thing], list[Thing]]]:
    """Return the things that fit each category and those that do not, if it has both."""
    sides: list[tuple[Category, list[Thing], list[Thing]]] = []
    for category in asked:
        inside = [t for t in fitting.things if t.category == category]
        outside = [t for t in other.things if is_outside(t, category)]
        if inside and outside:
            sides.append((category, inside, outside))
    return sides


def _row(question: DemoQuestion, system: str | None) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question.text})
    messages.append({"role": "assistant", "content": question.answer})
    return {"id": question.id, "images": list(question.pictures), "messages": messages}


def _parse_question(row: dict[str, Any]) -> DemoQuestion:
    kind = row["id"].split("/")[0]
    assert kind in get_args(Kind), kind
    names = tuple(Path(path).parent.name for path in row["images"])
    user, assistant = row["messages"][-2:]
    return DemoQuestion(
        row["id"],
        cast(Kind, kind),
        user["content"],
        tuple(row["images"]),
        names,
        assistant["content"],
    )


def _is_finished(out: Path, arguments: dict[str, Any]) -> bool:
    """Return True if `out` was completed with these arguments."""
    manifest = out / "manifest.json"
    # The manifest is written last, so that its presence means a complete folder.
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")) == arguments


def _clear(out: Path) -> None:
    """Remove the images of an earlier build, and nothing else of the user's."""
    manifest = out / "manifest.json"
    if manifest.is_file():
        manifest.unlink()
        shutil.rmtree(out / "pictures", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
