"""Ids, as they come one by one -> text, as far as it is certain.

Border: one answer's ids and stop strings; who sends the text on, and how, is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

from multi_token.chat.format import ChatFormat

_REPLACEMENT = "\ufffd"
"""What a tokenizer makes of bytes that are no whole character yet."""
_NUM_CONTEXT_IDS = 4
"""Ids that are decoded again with each new one: decoders drop or add a blank at the beginning."""


class IncrementalDetokenizer:
    """The text of one answer while it grows.

    What it hands out never changes: no half character, nothing behind a stop string, and nothing
    that may still become one. All pieces together are `ChatFormat.decode` of all ids, up to the
    stop string.
    """

    def __init__(self, chat: ChatFormat, stop: Sequence[str] = ()) -> None:
        """`stop`: strings at which the answer ends; they are no part of it."""
        self.is_stopped = False
        """A stop string was met: what comes now is not listened to."""
        self._chat = chat
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._start: int | None = None  # from where ids are decoded; None: no text yet
        self._end = 0  # of the ids whose text is known
        self._pending_text = ""

    def add(self, token_id: int) -> str:
        """One more id -> the text that is certain now and was not before, often none."""
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        return self._until_stop(self._new_text(is_last=False), is_last=False)

    def flush(self) -> str:
        """No more ids come -> what was held back."""
        if self.is_stopped:
            return ""
        return self._until_stop(self._new_text(is_last=True), is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        """The text of the ids that no text was handed out of yet, if its characters are whole.

        Only the last ids are decoded, so that a long answer does not become slow (the method of
        vLLM's `detokenize_incrementally`).
        """
        if self._start is None:  # what the template has an answer begin with is not text
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
        """Text behind what is held back -> what may be handed out."""
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
    """How many characters at the end of a text are a beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
