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

_FOOTER = (
    "Images: OpenMoji (openmoji.org), CC BY-SA 4.0.\n"
    "The same numbers and examples are in report.json beside this file."
)
_SHEET_COLUMNS = 5
_THUMB = 160
"""Shown at 112 to 180 pixels; most screens have two for each."""

_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2.5 8.5l3.5 4 7.5-9"/></svg>'
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 3l10 10M13 3L3 13"/></svg>'


@dataclass(frozen=True)
class Example:
    """One question with the model's answer."""

    question: str
    """With one `<image>` for each image."""
    answer: str
    truth: str
    right: bool
    images: tuple[str, ...] = ()
    """Paths relative to a folder that is given when the example is shown."""
    audio: tuple[str, ...] = ()
    """Paths of .wav files, as of the images; each gets a player."""
    group: str = "Renderings it was not trained on"
    """Heading under which the example is shown."""


def write_report(
    folder: Path,
    report: Mapping[str, Any],
    examples: Sequence[Example],
    losses: Sequence[tuple[int, float]],
) -> None:
    """Write `report.json` and `report.html` to `folder`.

    `report`: the numbers that `run` returns; its `recipe` and `machine` become tables.
    """
    shown = {**report, "losses": list(losses), "examples": [asdict(e) for e in examples]}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group, []).append(example)
    # Of the report's keys, tables show scalars; the lists are drawn as curve and cards.
    numbers = {k: v for k, v in report.items() if isinstance(v, (bool, int, float, str))}
    html = page(
        "demo",
        title="A language model learned to see",
        claim="A language model of text alone was given a frozen image encoder and a small "
        "projector between them. Only the projector was trained, in <strong>"
        f"{_duration(report['train_seconds'])}</strong>. It now names "
        f"<strong>{_percent(report['held_out_accuracy'])}</strong> of new renderings of "
        f"{report['num_names']} things, turned, scaled and placed as it has never seen them.",
        body=[
            tile_list(_tiles(report)),
            '<h2>Training</h2>\n<div class="charts"><figure><figcaption><b>Loss</b>Cross entropy '
            f"of supervised tokens, step by step, from {losses[0][1]:.3g} to {losses[-1][1]:.3g} "
            f"(log scale)</figcaption>{chart(losses, label='loss', log=True)}</figure></div>",
            *(
                f"<h2>{escape(group)}</h2>\n<p>{sum(e.right for e in members)} of these "
                f"{len(members)} answers are right.</p>\n{sheet_of(members, folder)}"
                for group, members in groups.items()
            ),
            columns(
                [
                    _table("All numbers", numbers),
                    _table("Recipe", report["recipe"]),
                    _table("Machine", report["machine"]),
                ]
            ),
        ],
        footer=_FOOTER,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    chance = _percent(1 / report["num_names"])
    shares = {
        "held_out_accuracy": ("Held out", "of new renderings named exactly"),
        "shuffled_accuracy": ("Shuffled", f"the same with wrong images; chance is {chance}"),
        "closed_form_accuracy": ("Before training", "closed-form start: the name is in the answer"),
        "two_image_accuracy": ("Two images", "Which of these is a fruit? Answered by name"),
    }
    text_ability = "identical" if report["text_logits_identical"] else "changed"
    minutes, seconds = divmod(round(report["train_seconds"]), 60)
    clock = f"{minutes}:{seconds:02d} min" if minutes else _duration(report["train_seconds"])
    return [
        *(
            Tile(label, _percent(report[key]), note, part=float(report[key]))
            for key, (label, note) in shares.items()
        ),
        Tile("Text ability", text_ability, "the logits of a text prompt, to the bit"),
        Tile("Training", clock, f"the demo took {_duration(report['total_seconds'])} in all"),
    ]


def _question_text(question: str) -> str:
    """Return the question without its image slot; slots inside a sentence are numbered."""
    # The card shows the images above the question, so a slot at its start is left out.
    text = question.removeprefix("<image>").strip()
    if text.count("<image>") == 1:
        return text.replace("<image>", "this")
    for ordinal in ("the first", "the second", "the third"):
        text = text.replace("<image>", ordinal, 1)
    return text


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


def draw_sheet(examples: Sequence[Example], path: Path, *, folder: Path) -> None:
    """Draw the examples as one PNG of five columns, for a README.

    `folder`: what the images of the examples are relative to.
    """
    width, height, gap = 232, 324, 16
    num_rows = -(-len(examples) // _SHEET_COLUMNS)
    size = (gap + _SHEET_COLUMNS * (width + gap), gap + num_rows * (height + gap) + 20)
    canvas = Image.new("RGB", size, "#f6f5f2")
    for i, example in enumerate(examples):
        row, column = divmod(i, _SHEET_COLUMNS)
        corner = (gap + column * (width + gap), gap + row * (height + gap))
        canvas.paste(_draw_card(example, folder, (width, height)), corner)
    credit = "Images: OpenMoji, CC BY-SA 4.0"
    ImageDraw.Draw(canvas).text((gap, size[1] - 26), credit, "#5a626c", ImageFont.load_default(13))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, optimize=True)


def _draw_card(example: Example, folder: Path, size: tuple[int, int]) -> Image.Image:
    width, height = size
    card = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(card)
    side = width // len(example.images)
    for i, image in enumerate(example.images):
        with Image.open(folder / image) as opened:
            thumb = opened.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        card.paste(thumb, (i * side, (width - side) // 2))
    color, ground = ("#14713f", "#e3f3e9") if example.right else ("#b3261e", "#fbe7e5")
    verdict = "right" if example.right else f"truth: {example.truth}"
    draw.text(
        (12, width + 8), *_fit_text(draw, _question_text(example.question), "#5a626c", 14, width)
    )
    draw.text((12, width + 28), *_fit_text(draw, example.answer.strip(), "#1b1f24", 22, width))
    draw.rectangle((0, height - 30, width, height), ground)
    # Drawn, not written: Pillow's default font may lack both signs.
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
        # Letter by letter: widths of letters differ, so no length in letters is known to fit.
        while draw.textlength(f"{text}...", font) > width - 24:
            text = text[:-1]
        text = f"{text.rstrip()}..."
    return text, color, font


def sheet_of(examples: Iterable[Example], folder: Path) -> str:
    """Return the examples as HTML cards, with images and audio of `folder` inside the page."""
    return '<ul class="sheet">\n' + "\n".join(_card(e, folder) for e in examples) + "\n</ul>"


def _card(example: Example, folder: Path) -> str:
    images = "".join(
        f'<img src="{_jpeg(folder / path)}" alt="{_alt(example, i)}" loading="lazy">'
        for i, path in enumerate(example.images)
    )
    if images:
        images = f'<div class="images">{images}</div>'
    players = "".join(
        '<audio controls preload="none" src="data:audio/wav;base64,'
        f'{base64.b64encode((folder / path).read_bytes()).decode("ascii")}"></audio>'
        for path in example.audio
    )
    # In words as well: colors alone say nothing to some readers and to screen readers.
    verdict = "Right"
    if not example.right:
        verdict = f'<span class="hidden">Wrong.</span> Truth: {escape(example.truth)}'
    classes = ["card", "right" if example.right else "wrong"]
    if len(example.images) > 1:
        classes.append("pair")
    question = escape(_question_text(example.question))
    return (
        f'<li class="{" ".join(classes)}">{images}'
        f'<div class="words"><p class="question">{question}</p>{players}'
        f'<p class="answer">{escape(example.answer.strip() or "(no answer)")}</p></div>'
        f'<p class="verdict">{_TICK if example.right else _CROSS}<span>{verdict}</span></p></li>'
    )


def _alt(example: Example, index: int) -> str:
    if len(example.images) == 1:
        return escape(f"Image asked about; the true answer is: {example.truth}", quote=True)
    return f"Image {index + 1} of {len(example.images)}"


def _jpeg(path: Path) -> str:
    with Image.open(path) as image:
        thumb = image.convert("RGB").resize((_THUMB, _THUMB), Image.Resampling.LANCZOS)
    # JPEG: a page holds hundreds of images, and PNGs of noise are several times larger.
    data = io.BytesIO()
    thumb.save(data, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
