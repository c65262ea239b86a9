"""Token spans: which tokens of a text lie in spans of its characters.

Most spans begin and end where a token does, so that their two borders are enough. Where a token
crosses a border, the characters of all tokens are compared with the spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Encoding

from multi_token.chat.alignment import CharSpan
from multi_token.errors import ChatTemplateError

_MAX_SEARCHED_SPANS = 64
"""Spans of a text whose borders are searched: each search passes over the tokens before it."""


def token_spans(
    encoding: Encoding,
    text: str,
    spans: Sequence[CharSpan],
    slots: Sequence[int],
    *,
    prompt_only: bool = False,
) -> list[tuple[int, int]]:
    """Find the tokens of each span, from its first to its last one.

    Args:
        encoding: Tokens of the text, with the characters of each.
        text: The text.
        spans: Spans of characters, in order and disjoint.
        slots: Tokens that stand for media items, which no span cuts.
        prompt_only: Only the first token in a span counts; none after it is checked.

    Returns:
        Tokens [start, end) of each span; (0, 0) for one without a token.

    Raises:
        ChatTemplateError: A token is partly inside of a span.
    """
    if not prompt_only and len(spans) <= _MAX_SEARCHED_SPANS:
        found = _by_borders(encoding, spans)
        if found is not None:
            return found
    return _by_offsets(encoding, text, spans, slots, prompt_only=prompt_only) if spans else []


def _by_borders(encoding: Encoding, spans: Sequence[CharSpan]) -> list[tuple[int, int]] | None:
    """Return the tokens of each span, or None if a border is not between two tokens."""
    # To fetch the characters of all tokens takes as long as to render the text.
    token_at, chars_of = encoding.char_to_token, encoding.token_to_chars
    found: list[tuple[int, int]] = []
    for span in spans:
        # the first token at a character: there may be several (bytes of an emoji), or none
        first, last = token_at(span.start), token_at(span.end - 1)
        if first is None or last is None:
            return None
        begin, end, after = chars_of(first), chars_of(last), chars_of(last + 1)
        if begin is None or begin[0] != span.start or end is None or end[1] != span.end:
            return None
        if after is not None and after[0] < span.end:
            return None
        found.append((first, last + 1))
    return found


def _by_offsets(
    encoding: Encoding,
    text: str,
    spans: Sequence[CharSpan],
    slots: Sequence[int],
    *,
    prompt_only: bool,
) -> list[tuple[int, int]]:
    offsets = encoding.offsets
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, ends = flat[::2], flat[1::2]
    # two searches find the span of any token
    begins = np.array([span.start for span in spans])
    stops = np.array([span.end for span in spans])
    # of the spans that end after a token's start, the first; it holds the token, or cuts it
    at = np.minimum(np.searchsorted(stops, starts, side="right"), len(spans) - 1)
    overlaps = (begins[at] < ends) & (starts < stops[at]) & (starts < ends)
    overlaps[list(slots)] = False
    within = overlaps & (begins[at] <= starts) & (ends <= stops[at])
    owner = np.where(within, at, -1)
    for i in np.flatnonzero(overlaps & ~within).tolist():
        # tokens at a border are few, and each overlaps with few spans
        if prompt_only and (owner[:i] >= 0).any():
            break
        first, end = int(at[i]), int(ends[i])
        last = int(np.searchsorted(begins, end))
        found = _find_span(spans[first:last], int(starts[i]), end, text)
        owner[i] = -1 if found is None else first + found
    # A token without characters (a blank that the tokenizer puts in) counts if it is between two
    # tokens of a span: the model has to write it as well.
    owned = np.flatnonzero(owner >= 0)
    firsts = np.searchsorted(owner[owned], np.arange(len(spans)))
    lasts = np.searchsorted(owner[owned], np.arange(len(spans)), side="right")
    return [
        (int(owned[a]), int(owned[b - 1]) + 1) if a < b else (0, 0)
        for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]


def _find_span(spans: Sequence[CharSpan], start: int, end: int, text: str) -> int | None:
    """Return the index of the supervised span that holds a token, or None.

    Raises ChatTemplateError for a token that is partly inside of a span.
    """
    # Blanks do not count: tokenizers join a blank to the word after it, and some special tokens
    # (`lstrip`, `rstrip`) include the blanks around them.
    for i, span in enumerate(spans):
        inside = text[max(start, span.start) : min(end, span.end)]
        if inside and not (text[start : span.start] + text[span.end : end]).strip():
            return i
        if inside.strip():
            raise ChatTemplateError(
                f"the token {text[start:end]!r} is partly inside of an assistant turn, so it can "
                "be neither supervised nor masked; set `chat_template` in the recipe to a "
                "template that begins and ends the assistant's text at a special token or a line "
                "break"
            )
    return None
