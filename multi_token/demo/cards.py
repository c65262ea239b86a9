"""Questions and answers as cards of a page: what was shown and said, the answer, whether right.

Border: files and texts in, HTML out; the style is page/'s.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

_THUMB = 160
"""Shown at 112 to 180 pixels; most screens have two for each."""

_TICK = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M2.5 8.5l3.5 4 7.5-9"/></svg>'
_CROSS = '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 3l10 10M13 3L3 13"/></svg>'


@dataclass(frozen=True)
class Card:
    """One question that was asked, and how it went."""

    question: str
    answer: str
    truth: str
    right: bool
    pictures: tuple[Path, ...] = ()
    sounds: tuple[Path, ...] = ()
    """.wav files, with a player each."""


def sheet_of(cards: Iterable[Card]) -> str:
    """All of them, with pictures and sounds inside the page."""
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
