"""Marks stand for the texts of a conversation, so that these are found again in its rendering.

Border: spells, finds and replaces marks; it does not know what renders, nor what is learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

ChatMessage = dict[str, str]
"""`role` and `content`, as templates take them; a media item is a slot inside the content."""

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class CharSpan:
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class Marker:
    """A mark in a rendering: it stands for the text of a message, or for the reasoning in it."""

    message: int
    is_reasoning: bool
    start: int
    end: int


def unused_marker_id(messages: Sequence[ChatMessage]) -> str:
    """What makes marks (private-use characters) different from every text."""
    text = "".join(message["content"] for message in messages)
    number = 0
    while f"\ue100{number}." in text:
        number += 1
    return str(number)


def marker_text(salt: str, message: int, *, is_reasoning: bool = False) -> str:
    """How the mark of a message is written."""
    return f"\ue100{salt}.{message}{'r' if is_reasoning else ''}\ue101"


def find_markers(text: str, salt: str) -> list[Marker]:
    """All marks of a rendering, in order."""
    return [
        Marker(int(found[1]), bool(found[2]), found.start(), found.end())
        for found in re.finditer(f"\ue100{salt}\\.(\\d+)(r?)\ue101", text)
    ]


def replace_with_markers(
    messages: Sequence[ChatMessage], salt: str, roles: Sequence[str] | None = None
) -> list[ChatMessage]:
    """The messages (of these roles) with marks instead of their texts."""
    out = []
    for i, message in enumerate(messages):
        content = message["content"]
        if roles is None or message["role"] in roles:
            # from the back, so that earlier positions stay right
            for is_reasoning, piece in reversed(_message_texts(content).items()):
                mark = marker_text(salt, i, is_reasoning=is_reasoning)
                content = content[: piece.start] + mark + content[piece.end :]
        out.append({**message, "content": content})
    return out


def match_markers(
    rendering: str, text: str, messages: Sequence[ChatMessage], salt: str
) -> dict[int, list[CharSpan]] | None:
    """Where the marked messages' texts stand in `text`, if it is `rendering` with them put back."""
    places: dict[int, list[CharSpan]] = {}
    built, at = "", 0
    for mark in find_markers(rendering, salt):
        built += rendering[at : mark.start]
        content = messages[mark.message]["content"]
        piece = _message_texts(content)[mark.is_reasoning]
        places.setdefault(mark.message, []).append(
            CharSpan(len(built), len(built) + piece.end - piece.start)
        )
        built += content[piece.start : piece.end]
        at = mark.end
    return places if built + rendering[at:] == text else None


def text_before(rendering: str, marks: Sequence[Marker], message: int) -> str:
    """What stands between the first mark of a message and the mark before it, or the start."""
    at = next(k for k, mark in enumerate(marks) if mark.message == message)
    return rendering[marks[at - 1].end if at else 0 : marks[at].start]


def text_after(rendering: str, marks: Sequence[Marker], message: int) -> str:
    """What stands between the last mark of a message and the next mark, or the end.

    Empty for a message without a mark.
    """
    at = max((k for k, mark in enumerate(marks) if mark.message == message), default=len(marks))
    if at == len(marks):
        return ""
    return rendering[marks[at].end : marks[at + 1].start if at + 1 < len(marks) else None]


def common_prefix_length(one: Sequence[str], other: Sequence[str]) -> int:
    """How many first items (characters of strings) two sequences share."""
    num = 0
    while num < min(len(one), len(other)) and one[num] == other[num]:
        num += 1
    return num


def has_reasoning(content: str) -> bool:
    """Whether a mark of its own stands for the reasoning in this text."""
    return True in _message_texts(content)


def _message_texts(content: str) -> dict[bool, CharSpan]:
    """What marks stand for, by whether it is reasoning; the blanks around it stay where they are.

    A text with one `</think>` has two pieces, because templates take it apart there. An empty
    `<think>` block stays as it is: a template may treat it in another way than a full one.
    """
    whole = _stripped(content, 0, len(content))
    if content.count(_CLOSE) != 1:
        return {False: whole}
    close = content.index(_CLOSE)
    opened = len(_OPEN) if content.startswith(_OPEN, whole.start) else 0
    reasoning = _stripped(content, whole.start + opened, close)
    answer = _stripped(content, close + len(_CLOSE), len(content))
    return {True: reasoning, False: answer} if reasoning.end > reasoning.start else {False: answer}


def _stripped(content: str, start: int, end: int) -> CharSpan:
    start += len(content[start:end]) - len(content[start:end].lstrip())
    return CharSpan(start, start + len(content[start:end].rstrip()))
