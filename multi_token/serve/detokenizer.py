"""Detokenizer: token ids, one by one -> text as soon as it is certain.

Text is held back while it may still change: an incomplete UTF-8 character, or the start of a stop
string.
"""

from __future__ import annotations

from collections.abc import Sequence

from multi_token.chat.format import ChatFormat

_REPLACEMENT = "\ufffd"
"""Decoded form of bytes that are not a complete character yet."""
_NUM_CONTEXT_IDS = 4
"""Ids decoded again with each new one: decoders drop or add a space at the start of a text."""


class IncrementalDetokenizer:
    """Incremental text of one choice.

    Invariant: emitted text never changes. It contains no incomplete character, nothing after a stop
    string, and nothing that may still become one. All deltas together are `ChatFormat.decode` of
    all ids, up to the stop string.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        """`stop`: strings that end the text, and are not part of it."""
        self.is_stopped = False
        """A stop string has been found: further ids are ignored."""
        self._chat = chat
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start: int | None = None  # first id to decode; None: no text yet
        self._end = 0  # number of ids whose text has been emitted or held back
        self._pending_text = ""

    def add(self, token_id: int) -> str:
        """Add one id; return the text that has become certain, often none."""
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        return self._until_stop(self._new_text(is_last=False), is_last=False)

    def flush(self) -> str:
        """Return the text held back, after the last id."""
        if self.is_stopped:
            return ""
        return self._until_stop(self._new_text(is_last=True), is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        """Return the text of the new ids, if its last character is complete."""
        # Only the last ids are decoded, so the cost per token does not grow with the text (as in
        # vLLM's `detokenize_incrementally`). The first text goes through `ChatFormat`, which drops
        # the chat template's answer prefix.
        if self._start is None:
            text = self._chat.decode(self._ids, partial=not is_last)
        else:
            decode = self._chat.tokenizer.decode
            before = decode(self._ids[self._start : self._end], skip_special_tokens=True)
            text = decode(self._ids[self._start :], skip_special_tokens=True)[len(before) :]
        if not text or (text.endswith(_REPLACEMENT) and not is_last):
            return ""
        self._start = max(0, min(self._end, len(self._ids) - _NUM_CONTEXT_IDS))
        self._end = len(self._ids)
        return text

    def _until_stop(self, text: str, *, is_last: bool) -> str:
        """Append to the text held back; return the part that can be emitted."""
        if not self._stop:
            return text
        text = self._pending_text + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        num_held = 0 if is_last else max(_num_chars_of_stop(text, stop) for stop in self._stop)
        self._pending_text = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _num_chars_of_stop(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
