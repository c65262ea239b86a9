"""An image and a spoken question about it: a language model answers from both.

    python examples/see_and_hear.py --out runs/see_and_hear

A row is "<image><speech>": a thing on a coloured ground, and a voice that asks for its name, its
kind or the background colour. Held out are renderings and voices (so every held-out pair is new),
and *combinations*: things whose kind or colour was never asked for in training.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parts.command import run_command, stage_losses
from parts.encoders import speech_encoder_folder
from parts.gallery import ACCENTS, COLOURS, QUESTIONS, Gallery, Kind
from parts.page import ReportSection, Tile, loss_figure, table, write_page
from parts.voices import Voice
from rich.console import Console

from multi_token.demo.parts import encoder_folder, language_model_folder
from multi_token.demo.report import Example, sheet_of
from multi_token.demo.run import is_exact_name
from multi_token.demo.things import CATEGORY_PHRASES, Thing, things
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.recipe import Recipe, parse_recipe
from multi_token.report.machine import machine_facts
from multi_token.train.run import train

SYSTEM = "Answer in one word."
SPEAKERS = ("f1", "f2", "f3", "f4", "m1", "m2", "m3", "m4", "m5", "m6")


@dataclass(frozen=True)
class Size:
    """Numbers of rows, steps and questions."""

    num_things: int = 40
    num_renderings: int = 8
    num_speakers: int = 7
    num_held_out_speakers: int = 3
    num_rows: int = 2400
    num_steps: int = 150
    batch_size: int = 16
    num_asked: int = 100
    """Held-out rows of each group."""


QUICK = Size(
    num_things=8,
    num_renderings=4,
    num_speakers=2,
    num_held_out_speakers=1,
    num_rows=160,
    num_steps=12,
    batch_size=8,
    num_asked=12,
)


@dataclass(frozen=True)
class Asked:
    """A held-out row and what came of it."""

    kind: Kind
    group: str
    row: Mapping[str, Any]
    truth: str
    answer: str = ""

    @property
    def right(self) -> bool:
        return is_exact_name(self.answer, self.truth)


class World:
    """Rows of things and voices; what is held out is decided here."""

    def __init__(self, folder: Path, size: Size, seed: int) -> None:
        self.size = size
        self.numbers = random.Random(seed)
        self.gallery = Gallery(folder, self.numbers)
        known = [t for t in things(200) if t.category in CATEGORY_PHRASES]
        self.things = sorted(self.numbers.sample(known, size.num_things), key=lambda t: t.name)
        speakers = self.numbers.sample(SPEAKERS, len(SPEAKERS))
        self.held_out_voices = self._voices(speakers[: size.num_held_out_speakers])
        self.voices = self._voices(speakers[size.num_held_out_speakers :][: size.num_speakers])
        # of every thing one question that training never asks of it: not its name, or nothing of
        # the image would be known
        self.never_asked: dict[str, Kind] = {
            thing.name: self.numbers.choice(("kind", "colour")) for thing in self.things
        }

    def _voices(self, speakers: Sequence[str]) -> list[Voice]:
        """Each speaker in every accent, at a pitch and a pace of its own."""
        return [
            Voice(
                f"{accent}+{speaker}",
                pitch=self.numbers.randint(30, 70),
                rate=self.numbers.randint(140, 190),
            )
            for speaker in speakers
            for accent in ACCENTS
        ]

    def row(self, thing: Thing, kind: Kind, index: int, voice: Voice) -> tuple[dict[str, Any], str]:
        """A row without its answer, and the answer."""
        colour = self.numbers.choice(list(COLOURS))
        answers: dict[Kind, str] = {"name": thing.name, "kind": thing.category, "colour": colour}
        row = {
            "images": [self.gallery.image(thing, colour, index)],
            "speechs": [self.gallery.speech(kind, voice)],
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": "<image><speech>"},
            ],
        }
        return row, answers[kind]

    def training_rows(self) -> list[dict[str, Any]]:
        """Seen renderings, seen voices, and no combination that is held out."""
        rows = []
        for i in range(self.size.num_rows):
            thing = self.things[i % len(self.things)]
            never = self.never_asked[thing.name]
            kinds: list[Kind] = [kind for kind in QUESTIONS if kind != never]
            index = self.numbers.randrange(self.size.num_renderings)
            kind = self.numbers.choice(kinds)
            row, answer = self.row(thing, kind, index, self.numbers.choice(self.voices))
            messages = [*row["messages"], {"role": "assistant", "content": answer}]
            rows.append({"id": f"train-{i}", **row, "messages": messages})
        return rows

    def caption_rows(self) -> list[dict[str, Any]]:
        """One item and what it is: the closed-form start of each modality."""
        rows = []
        for thing in self.things:
            for index in range(self.size.num_renderings):
                path = self.gallery.image(thing, self.numbers.choice(list(COLOURS)), index)
                rows.append(_caption("image", path, thing.name))
        for voice in self.voices:
            for kind in QUESTIONS:
                path = self.gallery.speech(kind, voice)
                text = QUESTIONS[kind][int(Path(path).stem.rpartition("-")[2])]
                rows.append(_caption("speech", path, text))
        return rows

    def questions(self) -> list[Asked]:
        """Held-out rows: new renderings and voices; then never-asked combinations as well."""
        asked = []
        for new_combination in (False, True):
            for i in range(self.size.num_asked):
                thing = self.things[i % len(self.things)]
                # Kinds that were asked of this thing in training, or the one that never was.
                never = self.never_asked[thing.name]
                kinds: list[Kind] = [k for k in QUESTIONS if (k == never) == new_combination]
                kind = kinds[i // len(self.things) % len(kinds)]
                voice = self.held_out_voices[i % len(self.held_out_voices)]
                row, answer = self.row(thing, kind, 1_000_000 + i, voice)
                group = "new combination" if new_combination else "new rendering and voice"
                asked.append(Asked(kind, group, {"id": f"asked-{len(asked)}", **row}, answer))
        return asked


def _caption(name: str, path: str, text: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"<{name}>"},
        {"role": "assistant", "content": text},
    ]
    return {"id": f"caption-{path}", f"{name}s": [path], "messages": messages}


def recipe(data: Path, out: Path, size: Size, seed: int) -> Recipe:
    """The recipe of this example: the same keys as any user's."""
    fields: dict[str, Any] = {
        "model": {
            "language_model": str(language_model_folder()),
            "modalities": {
                "image": {
                    "type": "image",
                    "encoder": str(encoder_folder()),
                    "features": "pooled",
                    "projector": {"type": "expand", "factor": 4},
                },
                "speech": {
                    "type": "speech",
                    "encoder": str(speech_encoder_folder()),
                    "projector": {"type": "stack", "factor": 8},
                },
            },
        },
        "data": {"train": [{"rows": str(data / "rows.jsonl")}]},
        "train": {
            "output_dir": str(out),
            "seed": seed,
            "closed_form": {
                "rows": [{"rows": str(data / "captions.jsonl")}],
                "targets": "by_position",  # what is said goes through its text from first to last
            },
            "feature_cache": True,
            "packing": {"share": True},
            "stages": [
                {
                    "name": "projector",
                    "learn": {"projectors": 1e-3, "projector_biases": 3e-3},
                    "args": {"max_steps": size.num_steps},
                }
            ],
            "args": {
                "per_device_train_batch_size": size.batch_size,
                "logging_steps": 2,
            },
        },
    }
    return parse_recipe(json.dumps(fields), where="the recipe of see_and_hear")


def ask(
    model: MultiTokenForConditionalGeneration, questions: Sequence[Asked], folder: Path
) -> list[Asked]:
    """Greedy answers, right only if they *are* the expected word."""
    answers = model.generate(
        [question.row for question in questions],
        root=str(folder),
        max_new_tokens=6,
        batch_size=25,
    )
    return [
        Asked(q.kind, q.group, q.row, q.truth, answer)
        for q, answer in zip(questions, answers, strict=True)
    ]


def exchanged(questions: Sequence[Asked], field: str) -> list[Asked]:
    """Each question with the image of another answer, or a voice that asks for something else.

    Its own answer stays the right one.
    """
    mixed = []
    for i, q in enumerate(questions):
        others = [*questions[i + 1 :], *questions[:i]]
        # The next question with another answer, round the list: the same one in every run.
        other = next(
            o for o in others if (o.kind != q.kind if field == "speechs" else o.truth != q.truth)
        )
        mixed.append(Asked(q.kind, q.group, {**q.row, field: other.row[field]}, q.truth))
    return mixed


def share(asked: Sequence[Asked]) -> float:
    """Shares of right answers."""
    return round(sum(a.right for a in asked) / max(len(asked), 1), 4)


def run(out: Path, size: Size, seed: int, console: Console) -> dict[str, Any]:
    """Everything, with the report written to `out`; returns its numbers."""
    began = time.perf_counter()
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    world = World(data, size, seed)
    for name, rows in (("rows", world.training_rows()), ("captions", world.caption_rows())):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    questions = world.questions()

    started = time.perf_counter()
    model = train(recipe(data, out, size, seed), console=console)
    train_seconds = time.perf_counter() - started

    answered = ask(model, questions, data)
    known = [q for q in questions if q.group != "new combination"]
    seen = [a for a in answered if a.group != "new combination"]
    new = [a for a in answered if a.group == "new combination"]
    report: dict[str, Any] = {
        "held_out_accuracy": share(seen),
        "by_question": {kind: share([a for a in seen if a.kind == kind]) for kind in QUESTIONS},
        "new_combination_accuracy": share(new),
        "other_image_accuracy": share(ask(model, exchanged(known, "images"), data)),
        "other_voice_accuracy": share(ask(model, exchanged(known, "speechs"), data)),
        "most_frequent_answer_accuracy": _most_frequent(known),
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "num_steps": size.num_steps,
        "num_things": size.num_things,
        "seed": seed,
        "machine": machine_facts(),
    }
    losses = stage_losses(out)
    examples = [
        {"kind": a.kind, "group": a.group, "answer": a.answer, "truth": a.truth, "right": a.right}
        | {"image": a.row["images"][0], "speech": a.row["speechs"][0]}
        for a in answered
    ]
    text = json.dumps({**report, "losses": losses, "examples": examples}, indent=1)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    _page(out, report, losses, answered)
    return report


def _most_frequent(questions: Sequence[Asked]) -> float:
    """Return the best share of right answers from the question alone."""
    right = 0
    for kind in QUESTIONS:
        truths = [q.truth for q in questions if q.kind == kind]
        right += max((truths.count(t) for t in set(truths)), default=0)
    return round(right / len(questions), 4)


def _page(
    out: Path,
    report: Mapping[str, Any],
    losses: Sequence[tuple[int, float]],
    answered: Sequence[Asked],
) -> None:
    def percent(key: str) -> str:
        return f"{report[key]:.1%}"

    rows = [
        ["new images, new voices", percent("held_out_accuracy")],
        *[
            [f"  asked for its {kind}", f"{part:.1%}"]
            for kind, part in report["by_question"].items()
        ],
        ["a question never asked of this thing", percent("new_combination_accuracy")],
        ["with another image", percent("other_image_accuracy")],
        ["with another question in the voice", percent("other_voice_accuracy")],
        ["baseline: the most frequent answer", percent("most_frequent_answer_accuracy")],
    ]
    shown = answered[:: max(1, len(answered) // 24)]
    examples = (
        Example(
            f"its {a.kind}? ({a.group})",
            a.answer,
            a.truth,
            a.right,
            images=(a.row["images"][0],),
            audio=(a.row["speechs"][0],),
        )
        for a in shown
    )
    write_page(
        out / "report.html",
        title="A language model sees and hears",
        claim="SmolLM2-135M answers a spoken question about an image. Both the voice and the image "
        "are new to it. The language model and both encoders stayed frozen.",
        tiles=[
            Tile(
                "Right answers",
                percent("held_out_accuracy"),
                "new images, new voices",
                report["held_out_accuracy"],
            ),
            Tile(
                "New combinations",
                percent("new_combination_accuracy"),
                "a question that was never asked of this thing",
                report["new_combination_accuracy"],
            ),
            Tile("Without the right image", percent("other_image_accuracy"), "so it looks"),
            Tile("Without the right question", percent("other_voice_accuracy"), "so it listens"),
        ],
        sections=[
            ReportSection(
                "Answers",
                "An answer counts only if it is the expected word.",
                table(["", "right"], rows),
            ),
            ReportSection(
                "Some of them",
                "Image, the question as it was spoken, and the answer.",
                sheet_of(examples, out / "data"),
            ),
            ReportSection("Training", f"{report['num_steps']} steps.", loss_figure(losses)),
        ],
        facts={"Machine": report["machine"]},
    )


if __name__ == "__main__":
    run_command("see_and_hear", __doc__ or "", run, full=Size(), quick=QUICK)
