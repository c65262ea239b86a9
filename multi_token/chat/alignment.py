"""Markers in place of a conversation's texts: they find the texts again in a template's rendering.

A marker is a short run of private-use characters that no text of the conversation contains. Only
`chat/template.py` uses markers; this file neither renders nor knows which text is supervised.
"""

from __future__ import annotations

import itertools
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
    """A marker in a rendering: characters [start, end) replace a message's text or reasoning."""

    message: int
    is_reasoning: bool
    start: int
    end: int


def unused_marker_id(messages: Sequence[ChatMessage]) -> str:
    """Return an id whose markers occur in none of the texts."""
    text = "".join(message["content"] for message in messages)
    return next(str(number) for number in itertools.count() if f"\ue100{number}." not in text)


def marker_text(marker_id: str, message: int, *, is_reasoning: bool = False) -> str:
    """Return the characters of a message's marker; `marker_id` is an `unused_marker_id`."""
    return f"\ue100{marker_id}.{message}{'r' if is_reasoning else ''}\ue101"


def find_markers(text: str, marker_id: str) -> list[Marker]:
    """Return all markers of a rendering, in order."""
    return [
        Marker(int(found[1]), bool(found[2]), found.start(), found.end())
        for found in re.finditer(f"\ue100{marker_id}\\.(\\d+)(r?)\ue101", text)
    ]


def replace_with_markers(
    messages: Sequence[ChatMessage], marker_id: str, roles: Sequence[str] | None = None
) -> list[ChatMessage]:
    """Return the messages with markers for texts; `roles` leaves messages of other roles alone."""
    out = []
    for i, message in enumerate(messages):
        content = message["content"]
        if roles is None or message["role"] in roles:
            # From the back: a replacement would move the positions after it.
            for is_reasoning, span in reversed(_message_texts(content).items()):
                marker = marker_text(marker_id, i, is_reasoning=is_reasoning)
                content = content[: span.start] + marker + content[span.end :]
        out.append({**message, "content": content})
    return out


def match_markers(
    rendering: str, text: str, messages: Sequence[ChatMessage], marker_id: str
) -> dict[int, list[CharSpan]] | None:
    """Return the span in `text` of every marker of `rendering`, by message.

    None if `rendering` with the texts put back is not `text`, character by character.
    """
    spans: dict[int, list[CharSpan]] = {}
    rebuilt, at = "", 0
    for marker in find_markers(rendering, marker_id):
        rebuilt += rendering[at : marker.start]
        content = messages[marker.message]["content"]
        source = _message_texts(content)[marker.is_reasoning]
        spans.setdefault(marker.message, []).append(
            CharSpan(len(rebuilt), len(rebuilt) + source.end - source.start)
        )
        rebuilt += content[source.start : source.end]
        at = marker.end
    return spans if rebuilt + rendering[at:] == text else None


def text_before(rendering: str, markers: Sequence[Marker], message: int) -> str:
    """Return the characters from the previous marker (or the start) to the message's first one."""
    at = next(k for k, marker in enumerate(markers) if marker.message == message)
    return rendering[markers[at - 1].end if at else 0 : markers[at].start]


def text_after(rendering: str, markers: Sequence[Marker], message: int) -> str:
    """Return the characters from the message's last marker to the next one (or the end).

    Empty for a message without a marker.
    """
    at = max((k for k, marker in enumerate(markers) if marker.message == message), default=None)
    if at is None:
        return ""
    return rendering[markers[at].end : markers[at + 1].start if at + 1 < len(markers) else None]


def _message_texts(content: str) -> dict[bool, CharSpan]:
    """Return the spans to replace, by `is_reasoning`; blanks around a text stay in place."""
    stripped = _stripped(content, 0, len(content))
    # Templates split a text at its one `</think>` and move the two parts, so each needs a marker.
    if content.count(_CLOSE) != 1:
        return {False: stripped}
    close = content.index(_CLOSE)
    opened = len(_OPEN) if content.startswith(_OPEN, stripped.start) else 0
    reasoning = _stripped(content, stripped.start + opened, close)
    answer = _stripped(content, close + len(_CLOSE), len(content))
    # An empty `<think>` block gets no marker: a template may treat it unlike a filled one.
    return {True: reasoning, False: answer} if reasoning.end > reasoning.start else {False: answer}


def _stripped(content: str, start: int, end: int) -> CharSpan:
    start += len(content[start:end]) - len(content[start:end].lstrip())
    return CharSpan(start, start + len(content[start:end].rstrip()))
