"""The demo's report: `report.json`, one self-contained `report.html`, and the sheet as an image."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from multi_token.report.chart import chart
from multi_token.report.html import Tile, columns, facts_table, page, tile_list
from multi_token.report.machine import machine_facts

_FOOTER = (
    "Pictures: OpenMoji (openmoji.org), CC BY-SA 4.0.\n"
    "The same numbers and examples are in report.json beside this file."
)


@dataclass(frozen=True)
class Example:
    """One question with the model's answer."""

    question: str
    answer: str
    truth: str
    right: bool
    pictures: tuple[str, ...]
    """Relative to the report's folder, in the order of the question's `<image>`."""
    group: str = "Renderings it was not trained on"
    """The heading under which it is shown."""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    examples: Sequence[Example],
    losses: Sequence[tuple[int, float]],
) -> None:
    """Write `report.json` and `report.html` to `folder`.

    `report`: the numbers. Of its other keys, `recipe` (a mapping) and `machine_facts` (by default
    `machine_facts()`) become tables, `probes` ([(step, accuracy)]) a curve.
    """
    whole = {**report, "machine": report.get("machine") or machine_facts()}
    shown = {**whole, "losses": list(losses), "examples": [asdict(e) for e in examples]}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    whole_page = page(
        "demo",
        title="A language model learned to see",
        claim=_claim_html(whole),
        body=[
            tile_list(_tiles(whole)),
            _charts(losses, whole.get("probes") or ()),
            *_sheets(folder, examples),
            columns(_facts(whole)),
        ],
        footer=_FOOTER,
    )
    (folder / "report.html").write_text(whole_page, encoding="utf-8")


def _claim_html(report: Mapping[str, Any]) -> str:
    names = escape(str(report.get("num_names", "some")))
    return (
        "A language model of text alone was given a frozen picture encoder and a small projector "
        f"between them. Only the projector was trained, in <strong>"
        f"{_duration(report.get('train_seconds', 0))}</strong>. It now names "
        f"<strong>{_percent(report.get('held_out_accuracy', 0))}</strong> of new renderings of "
        f"{names} things, turned, scaled and placed as it has never seen them."
    )


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    """Return the measured key numbers, each with its meaning."""
    chance = _percent(1 / report["num_names"]) if report.get("num_names") else "near zero"
    rates = {
        "held_out_accuracy": ("Held out", "of new renderings named exactly"),
        "shuffled_accuracy": ("Shuffled", f"the same with wrong pictures; chance is {chance}"),
        "closed_form_accuracy": ("Before training", "closed-form start: the name is in the answer"),
        "two_picture_accuracy": ("Two pictures", "Which of these is a fruit? Answered by name"),
    }
    tiles = [
        Tile(label, _percent(report[key]), note, part=float(report[key]))
        for key, (label, note) in rates.items()
        if report.get(key) is not None
    ]
    if report.get("text_logits_identical") is not None:
        value = "identical" if report["text_logits_identical"] else "changed"
        tiles.append(Tile("Text ability", value, "the logits of a text prompt, to the bit"))
    if report.get("train_seconds") is not None:
        whole = report.get("total_seconds")
        note = f"the whole demo took {_duration(whole)}" if whole is not None else ""
        tiles.append(Tile("Training", _clock(report["train_seconds"]), note))
    return tiles


def _charts(losses: Sequence[tuple[int, float]], probes: Sequence[tuple[int, float]]) -> str:
    figures = []
    if losses:
        figures.append(
            "<figure><figcaption><b>Loss</b>Cross entropy at learned tokens, step by step, from "
            f"{losses[0][1]:.3g} to {losses[-1][1]:.3g} (log scale)</figcaption>"
            f"{chart(losses, label='loss', log=True)}</figure>"
        )
    if probes:
        figures.append(
            "<figure><figcaption><b>Held-out accuracy</b>Exact names while training, from "
            f"{_percent(probes[0][1])} to {_percent(probes[-1][1])}</figcaption>"
            f"{chart(probes, label='accuracy', log=False)}</figure>"
        )
    if not figures:
        return ""
    return f'<h2>Training</h2>\n<div class="charts">{"".join(figures)}</div>'


def _sheets(folder: Path, examples: Sequence[Example]) -> list[str]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    sheets = []
    for group, members in groups.items():
        num_right = sum(example.right for example in members)
        cards = (
            Card(
                _question_text(example.question),
                example.answer,
                example.truth,
                example.right,
                pictures=tuple(folder / path for path in example.pictures),
            )
            for example in members
        )
        sheets.append(
            f"<h2>{escape(group)}</h2>\n<p>{num_right} of these {len(members)} answers are right."
            f"</p>\n{sheet_of(cards)}"
        )
    return sheets


def _question_text(question: str) -> str:
    """Return the question without its image slot; slots inside a sentence are numbered."""
    text = question.removeprefix("<image>").strip()
    if text.count("<image>") == 1:
        return text.replace("<image>", "this")
    for ordinal in ("the first", "the second", "the third"):
        text = text.replace("<image>", ordinal, 1)
    return text


def _facts(report: Mapping[str, Any]) -> list[str]:
    tables = {"recipe": "Recipe", "machine": "Machine"}
    facts = [_table(title, report[key]) for key, title in tables.items() if report.get(key)]
    numbers = {k: v for k, v in report.items() if isinstance(v, (bool, int, float, str))}
    return [_table("All numbers", numbers), *facts]


def _table(title: str, facts: Mapping[str, Any]) -> str:
    named = {str(key).replace("_", " "): _value(str(key), value) for key, value in facts.items()}
    return facts_table(title, named)


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if key.endswith(("accuracy", "share")):
            return _percent(value)
        if key.endswith("seconds"):
            return _duration(value)
        return f"{value:.4g}"
    return str(value)


def _percent(part: float) -> str:
    return f"{100 * part:.1f}".removesuffix(".0") + " %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"


def _clock(seconds: float) -> str:
    """Format a duration for a tile."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else _duration(seconds)


def draw_sheet(
    examples: Sequence[Example], path: Path, *, folder: Path, columns: int = 5, rows: int = 3
) -> None:
    """Draw the first `columns` x `rows` examples as one PNG, for a README.

    `folder`: what the images of the examples are relative to.
    """
    width, height, gap = 232, 324, 16
    shown = list(examples[: columns * rows])
    num_rows = -(-len(shown) // columns)
    size = (gap + columns * (width + gap), gap + num_rows * (height + gap) + 20)
    canvas = Image.new("RGB", size, "#f6f5f2")
    for i, example in enumerate(shown):
        place = (gap + i % columns * (width + gap), gap + i // columns * (height + gap))
        canvas.paste(_draw_card(example, folder, (width, height)), place)
    credit = "Pictures: OpenMoji, CC BY-SA 4.0"
    ImageDraw.Draw(canvas).text((gap, size[1] - 26), credit, "#5a626c", ImageFont.load_default(13))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _draw_card(example: Example, folder: Path, size: tuple[int, int]) -> Image.Image:
    width, height = size
    card = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(card)
    side = width // len(example.pictures)
    for i, picture in enumerate(example.pictures):
        with Image.open(folder / picture) as opened:
            thumb = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        card.paste(thumb, (i * side, (width - side) // 2))
    color, ground = ("#14713f", "#e3f3e9") if example.right else ("#b3261e", "#fbe7e5")
    verdict = "right" if example.right else f"truth: {example.truth}"
    draw.text(
        (12, width + 8), *_fit_text(draw, _question_text(example.question), "#5a626c", 14, width)
    )
    draw.text((12, width + 28), *_fit_text(draw, example.answer.strip(), "#1b1f24", 22, width))
    draw.rectangle((0, height - 30, width, height), ground)
    mark = [(12, -15), (17, -9), (27, -21)] if example.right else [(13, -21), (25, -9)]
    draw.line([(x, height + y) for x, y in mark], color, 3)
    if not example.right:
        draw.line([(25, height - 21), (13, height - 9)], color, 3)
    draw.text((36, height - 25), *_fit_text(draw, verdict, color, 15, width - 24))
    draw.rectangle((0, 0, width - 1, height - 1), outline="#dedcd6" if example.right else color)
    return card


def _fit_text(
    draw: ImageDraw.ImageDraw, text: str, color: str, size: int, width: int
) -> tuple[str, str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """The text, its color and font: cut with dots where it is wider than a card."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split()) or "(no answer)"
    if draw.textlength(text, font) > width - 24:
        while draw.textlength(f"{text}...", font) > width - 24:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    return text, color, font


_THUMB = 160
"""Shown at 112 to 180 pixels; most screens have two for each."""

_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2.5 8.5l3.5 4 7.5-9"/></svg>'
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 3l10 10M13 3L3 13"/></svg>'


@dataclass(frozen=True)
class Card:
    """One question with the model's answer."""

    question: str
    answer: str
    truth: str
    right: bool
    pictures: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()
    """.wav files, with a player each."""


def sheet_of(cards: Iterable[Card]) -> str:
    """Return the cards as HTML, with images and audio inside the page."""
    return '<ul class="sheet">\n' + "\n".join(map(_card, cards)) + "\n</ul>"


def _card(card: Card) -> str:
    images = "".join(
        f'<img src="{_picture(path)}" alt="{_alt(card, i)}" loading="lazy">'
        for i, path in enumerate(card.pictures)
    )
    pictures = f'<div class="pictures">{images}</div>' if images else ""
    players = "".join(
        f'<audio controls preload="none" src="{_sound(path)}"></audio>' for path in card.sounds
    )
    verdict = "Right"
    if not card.right:
        verdict = f'<span class="hidden">Wrong.</span> Truth: {escape(card.truth)}'
    classes = ["card", "right" if card.right else "wrong"]
    if len(card.pictures) > 1:
        classes.append("pair")
    return (
        f'<li class="{" ".join(classes)}">{pictures}'
        f'<div class="words"><p class="question">{escape(card.question)}</p>{players}'
        f'<p class="answer">{escape(card.answer.strip() or "(no answer)")}</p></div>'
        f'<p class="verdict">{_TICK if card.right else _CROSS}<span>{verdict}</span></p></li>'
    )


def _alt(card: Card, place: int) -> str:
    if len(card.pictures) == 1:
        return escape(f"Picture asked about; the true answer is: {card.truth}", quote=True)
    return f"Picture {place + 1} of {len(card.pictures)}"


def _picture(path: Path) -> str:
    with Image.open(path) as picture:
        thumb = picture.convert("RGB").resize((_THUMB, _THUMB), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    thumb.save(data, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _sound(path: Path) -> str:
    return "data:audio/wav;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
