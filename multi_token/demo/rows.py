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
from typing import Any, Literal

from multi_token.demo.images import rendering
from multi_token.demo.things import CATEGORY_PHRASES, Thing, is_outside, things

Kind = Literal["naming", "yes_no", "category", "two_images", "known_beside_unknown"]
"""naming: What is this? · yes_no: Is this a dog? · category: Is this an animal?
two_images: Which of these is a fruit? · known_beside_unknown: the same, where the image that
fits was trained and the other was never seen."""

Split = Literal[
    "naming",
    "questions",
    "validation_naming",
    "held_out_naming",
    "held_out_yes_no",
    "held_out_two_images",
    "held_out_things",
]
"""Training: naming (one image, its name) and questions (yes/no, category, two images).
validation_naming: every validation rendering of every trained thing, which settings are chosen by.
held_out_naming, held_out_yes_no (and category), held_out_two_images: held-out renderings of trained
things. held_out_things: questions about things that training never shows."""

WHAT_IS_THIS = "What is <image>?"
_OTHER_PHRASING = "<image>\nWhat is this?"

_VERSION = 4
"""Raised with each change of the files, so that old folders are built again."""


@dataclass(frozen=True)
class DemoQuestion:
    """One question with its images and the only answer that counts."""

    id: str
    """Begins with its `Kind`."""
    text: str
    """Text of the row, with one `<image>` for each image."""
    images: tuple[str, ...]
    """Relative to the folder of the data."""
    answer: str

    @property
    def kind(self) -> str:
        """One of `Kind`."""
        return self.id.split("/")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the things in the images, in the same order."""
        # each thing has a folder of images with its name
        return tuple(Path(path).parent.name for path in self.images)


@dataclass(frozen=True)
class DemoData:
    """A folder that `build_rows` has finished."""

    folder: Path
    names: tuple[str, ...]
    """The things that are trained."""
    held_out_names: tuple[str, ...]
    """The things of which training sees no image."""

    def file(self, split: Split) -> Path:
        """Return the file with the rows of a split."""
        return self.folder / f"{split}.jsonl"

    def questions(self, split: Split) -> list[DemoQuestion]:
        """Return the questions of a split."""
        questions = []
        for line in self.file(split).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            user, assistant = (message["content"] for message in row["messages"][-2:])
            questions.append(DemoQuestion(row["id"], user, tuple(row["images"]), assistant))
        return questions


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
    num_two_images: int = 400,
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
    # Held-out things follow the trained ones in the table: clear images, of mixed categories.
    known = things(num_names + num_held_out_things)
    trained, held_out = known[:num_names], known[num_names:]
    data = DemoData(out, tuple(t.name for t in trained), tuple(t.name for t in held_out))
    manifest = out / "manifest.json"
    if manifest.is_file():
        if json.loads(manifest.read_text(encoding="utf-8")) == arguments:
            return data
        # The images of another build, and nothing else of the user's.
        manifest.unlink()
        shutil.rmtree(out / "images", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    seen = _Renderings(trained, "seen", range(num_renderings), seed)
    # Numbers that training never draws, for any num_renderings.
    held_out_numbers = range(1_000_000, 1_000_000 + num_held_out_renderings)
    unseen = _Renderings(trained, "held_out", held_out_numbers, seed)
    validation_numbers = range(2_000_000, 2_000_000 + num_validation_renderings)
    validation = _Renderings(trained, "validation", validation_numbers, seed)
    unknown = _Renderings(held_out, "held_out", held_out_numbers, seed)
    trained_categories = {thing.category for thing in trained}
    asked = [c for c in CATEGORY_PHRASES if c in trained_categories]

    def write(split: Split, *parts: Iterable[DemoQuestion]) -> None:
        rows = (json.dumps(to_row(q, system), ensure_ascii=False) for part in parts for q in part)
        data.file(split).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")

    def numbers(kind: str) -> random.Random:
        # One generator per kind: more rows of one kind leave the others unchanged. Its seed keeps
        # the old name of a kind, or the rows would be others than those of the published results.
        return random.Random(f"{seed}/{kind}")

    for renderings in (seen, validation, unseen, unknown):
        renderings.write(out)
    n = num_held_out_questions
    write("naming", _naming(seen, numbers("naming")))
    write(
        "questions",
        _yes_no(seen, num_yes_no, numbers("yes_no")),
        _categories(seen, asked, num_categories, numbers("category")),
        _two_images(seen, seen, asked, num_two_images, numbers("two_pictures")),
    )
    write("validation_naming", _naming(validation, None))
    write("held_out_naming", _naming(unseen, None))
    write(
        "held_out_yes_no",
        _yes_no(unseen, n, numbers("held_out/yes_no")),
        _categories(unseen, asked, n, numbers("held_out/category")),
    )
    write(
        "held_out_two_images",
        _two_images(unseen, unseen, asked, n, numbers("held_out/two_pictures")),
    )
    write(
        "held_out_things",
        _naming(unknown, None),
        _categories(unknown, asked, n, numbers("things/category")),
        _two_images(unknown, unknown, asked, n, numbers("things/two_pictures")),
        _two_images(unseen, unknown, asked, n, numbers("things/known")),
    )
    # Written last: its presence means a complete folder.
    manifest.write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")
    return data


@dataclass(frozen=True)
class _Renderings:
    """The renderings of some things that one split may use."""

    things: Sequence[Thing]
    split: str
    numbers: range
    seed: int

    def path(self, thing: Thing, index: int) -> str:
        return f"images/{thing.name}/{self.split}_{index:03d}.png"

    def pick(self, thing: Thing, random_numbers: random.Random) -> str:
        return self.path(thing, random_numbers.randrange(len(self.numbers)))

    def write(self, out: Path) -> None:
        def write_thing(thing: Thing) -> None:
            (out / "images" / thing.name).mkdir(parents=True, exist_ok=True)
            for index, number in enumerate(self.numbers):
                image = rendering(thing, number, self.seed)
                image.save(out / self.path(thing, index), compress_level=1)

        # Threads suffice: Pillow releases the GIL while it turns, scales and compresses.
        with ThreadPoolExecutor() as pool:
            list(pool.map(write_thing, self.things))


def _naming(
    renderings: _Renderings, random_numbers: random.Random | None
) -> Iterator[DemoQuestion]:
    """Ask for every image once; without random numbers always in the same words."""
    # Renderings outside, things inside: any first N rows hold all names about equally often.
    for index in range(len(renderings.numbers)):
        for thing in renderings.things:
            text = WHAT_IS_THIS
            if random_numbers is not None and random_numbers.random() < 0.3:
                text = _OTHER_PHRASING
            images = (renderings.path(thing, index),)
            yield DemoQuestion(f"naming/{thing.name}/{index}", text, images, thing.name)


def _yes_no(
    renderings: _Renderings, num_rows: int, random_numbers: random.Random
) -> Iterator[DemoQuestion]:
    """Ask "Is this a dog?", for each name as often with "yes" as with "no" as the answer."""
    # Else the words of the question would give the answer away, without the image.
    for i, asked in enumerate(islice(cycle(renderings.things), num_rows)):
        yes = (i // len(renderings.things) + i) % 2 == 0
        shown = asked if yes else _pick_other(asked, renderings.things, random_numbers)
        text = f"<image>\nIs this {asked.phrase}?"
        images = (renderings.pick(shown, random_numbers),)
        yield DemoQuestion(f"yes_no/{i}", text, images, "yes" if yes else "no")


def _pick_other(thing: Thing, among: Sequence[Thing], random_numbers: random.Random) -> Thing:
    """Half the time of the same category: an apple is harder to tell from a pear than a bus."""
    others = [t for t in among if t is not thing]
    near = [t for t in others if t.category == thing.category]
    return random_numbers.choice(near if near and random_numbers.random() < 0.5 else others)


def _categories(
    renderings: _Renderings, asked: Sequence[str], num_rows: int, random_numbers: random.Random
) -> Iterator[DemoQuestion]:
    """Ask "Is this an animal?": yes and no in turn, for each category that has both."""
    sides = _split_by_category(renderings, renderings, asked)
    for i, (category, inside, outside) in enumerate(islice(cycle(sides), num_rows)):
        yes = i // len(sides) % 2 == 0
        shown = random_numbers.choice(inside if yes else outside)
        text = f"<image>\nIs this {CATEGORY_PHRASES[category]}?"
        images = (renderings.pick(shown, random_numbers),)
        yield DemoQuestion(f"category/{i}", text, images, "yes" if yes else "no")


def _two_images(
    fitting: _Renderings,
    other: _Renderings,
    asked: Sequence[str],
    num_rows: int,
    random_numbers: random.Random,
) -> Iterator[DemoQuestion]:
    """Ask "Which of these is a fruit?"; the answer is its name, so it must be recognized."""
    kind: Kind = "two_images" if fitting is other else "known_beside_unknown"
    sides = _split_by_category(fitting, other, asked)
    for i, (category, inside, outside) in enumerate(islice(cycle(sides), num_rows)):
        right, wrong = random_numbers.choice(inside), random_numbers.choice(outside)
        images = [fitting.pick(right, random_numbers), other.pick(wrong, random_numbers)]
        # Each side has the answer equally often, or its position would give the answer away.
        if i // len(sides) % 2:
            images.reverse()
        text = f"Which of <image> and <image> is {CATEGORY_PHRASES[category]}?"
        yield DemoQuestion(f"{kind}/{i}", text, tuple(images), right.name)


def _split_by_category(
    fitting: _Renderings, other: _Renderings, asked: Sequence[str]
) -> list[tuple[str, list[Thing], list[Thing]]]:
    """Return the things that fit each category and those that do not, if it has both."""
    sides = []
    for category in asked:
        inside = [t for t in fitting.things if t.category == category]
        outside = [t for t in other.things if is_outside(t, category)]
        if inside and outside:
            sides.append((category, inside, outside))
    return sides


def to_row(question: DemoQuestion, system: str | None) -> dict[str, Any]:
    """Return a question with its answer as a row, after a system message if there is one."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question.text})
    messages.append({"role": "assistant", "content": question.answer})
    return {"id": question.id, "images": list(question.images), "messages": messages}
