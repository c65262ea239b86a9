"""Markers in place of a conversation's texts: they find the texts again in a template's rendering.

A marker is a short run of private-use characters that no text of the conversation contains. Only
`chat/template.py` uses markers; this file neither renders nor knows which text is supervised.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ChatMessage = dict[str, str]
"""`role` and `content`, as templates take them; a media item is a slot inside the content."""

_OPEN, _CLOSE = "<think>", "</think>"


class CharSpan(NamedTuple):
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


class MarkedText:
    """A rendering with markers in place of texts; locates the text between two of them.

    `text`: the rendering. `markers`: all markers, in order.
    """

    def __init__(self, text: str, marker_id: str) -> None:
        """Find the markers of an `unused_marker_id`."""
        self.text = text
        self.markers = [
            Marker(int(found[1]), bool(found[2]), found.start(), found.end())
            for found in re.finditer(f"\ue100{marker_id}\\.(\\d+)(r?)\ue101", text)
        ]
        # by message, so that a conversation of many turns is not searched for each of them
        self._last = {marker.message: i for i, marker in enumerate(self.markers)}
        self._first = {m.message: i for i, m in reversed([*enumerate(self.markers)])}

    def text_before(self, message: int) -> str:
        """Return the characters from the previous marker (or the start) to the message's first."""
        at = self._first[message]
        return self.text[self.markers[at - 1].end if at else 0 : self.markers[at].start]

    def text_after(self, message: int) -> str:
        """Return the characters from the message's last marker to the next one (or the end).

        Empty for a message without a marker.
        """
        if message not in self._last:
            return ""
        at = self._last[message]
        is_last = at + 1 == len(self.markers)
        return self.text[self.markers[at].end : None if is_last else self.markers[at + 1].start]


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
    rendering: MarkedText, text: str, messages: Sequence[ChatMessage]
) -> dict[int, list[CharSpan]] | None:
    """Return the span in `text` of every marker of `rendering`, by message.

    None if `rendering` with the texts put back is not `text`, character by character.
    """
    spans: dict[int, list[CharSpan]] = {}
    pieces: list[str] = []
    length = at = 0
    for marker in rendering.markers:
        content = messages[marker.message]["content"]
        source = _message_texts(content)[marker.is_reasoning]
        pieces += [rendering.text[at : marker.start], content[source.start : source.end]]
        start = length + marker.start - at
        length = start + source.end - source.start
        spans.setdefault(marker.message, []).append(CharSpan(start, length))
        at = marker.end
    return spans if "".join([*pieces, rendering.text[at:]]) == text else None


def _message_texts(content: str) -> dict[bool, CharSpan]:
    """Return the spans to replace, by `is_reasoning`; blanks around a text stay in place."""
    stripped = _stripped(content, 0, len(content))
    # Templates split a text at its one `</think>` and move the two parts, so each needs a marker.
    if _CLOSE not in content or content.count(_CLOSE) != 1:
        return {False: stripped}
    close = content.index(_CLOSE)
    opened = len(_OPEN) if content.startswith(_OPEN, stripped.start) else 0
    reasoning = _stripped(content, stripped.start + opened, close)
    answer = _stripped(content, close + len(_CLOSE), len(content))
    # An empty `<think>` block gets no marker: a template may treat it unlike a filled one.
    return {True: reasoning, False: answer} if reasoning.end > reasoning.start else {False: answer}


def _stripped(content: str, start: int, end: int) -> CharSpan:
    if start < end and not content[start].isspace() and not content[end - 1].isspace():
        return CharSpan(start, end)
    start += len(content[start:end]) - len(content[start:end].lstrip())
    return CharSpan(start, start + len(content[start:end].rstrip()))
