"""token_spans.py: borders of spans give the tokens that a look at every token gives."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing

from multi_token.chat.alignment import CharSpan
from multi_token.chat.format import ChatFormat
from multi_token.chat.token_spans import token_spans
from multi_token.errors import ChatTemplateError
from multi_token.testing import TEMPLATES, tiny_tokenizer
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Text
from tests.chat.test_tokenize_many import calls_of, conversation
from tests.templates import trials

KINDS = ("bytes", "nfc", "llama", "gemma", "unigram")
# words, blanks, characters of several bytes and several characters of one letter, special tokens
PIECES = [
    *("It is a cat. ", "answer", " user:", "zebra", "1/2"),
    *(" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000", "\u2581"),
    *("é", "e\u0301", "\ufb01", "½", "日本", "🦓", "👩‍👩‍👧", "\u0958", "\ue0000\ue001"),
    *("<|im_end|>", "<|im_start|>", "[INST]"),
]


@cache
def tokenizer(kind: str) -> Tokenizer:
    """A tokenizer with special tokens, of which one takes the blanks after it."""
    core = Tokenizer.from_str(trials._core(kind))
    core.add_special_tokens([AddedToken(t, normalized=False) for t in PIECES[-3:-1]])
    core.add_special_tokens([AddedToken("[INST]", normalized=False, lstrip=True, rstrip=True)])
    return core


def owner(text: str, spans: list[CharSpan], start: int, end: int) -> int | None:
    """Return the span of one token, by the characters inside and outside of it."""
    for number, span in enumerate(spans):
        inside = text[max(start, span.start) : min(end, span.end)]
        outside = text[start : min(end, span.start)] + text[max(start, span.end) : end]
        if inside and not outside.strip():
            return number
        if inside.strip():
            raise ChatTemplateError("partly inside")
    return None


def by_every_token(encoding: Any, text: str, spans: list[CharSpan]) -> list[tuple[int, int]] | None:
    """The oracle: the first and the last token of each span; None for a token that is cut."""
    try:
        owners = [owner(text, spans, start, end) for start, end in encoding.offsets]
    except ChatTemplateError:
        return None
    found = [[i for i, one in enumerate(owners) if one == number] for number in range(len(spans))]
    return [(some[0], some[-1] + 1) if some else (0, 0) for some in found]


def draw_spans(draw: random.Random, encoding: Any, text: str) -> list[CharSpan]:
    """Disjoint spans; most borders are those of tokens."""
    borders = sorted({at for pair in encoding.offsets for at in pair} | {len(text)})
    places = borders if draw.random() < 0.7 else range(len(text) + 1)
    chosen = sorted(draw.sample(list(places), min(2 * draw.randint(1, 4), len(places) // 2 * 2)))
    pairs = zip(chosen[::2], chosen[1::2], strict=True)
    return [CharSpan(start, end) for start, end in pairs]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_spans_are_those_that_every_token_alone_tells(kind: str) -> None:
    draw = random.Random(kind)
    outcomes = {"borders": 0, "cut": 0}
    for _ in range(1500):
        text = "".join(draw.choices(PIECES, k=draw.randint(1, 12)))
        encoding = tokenizer(kind).encode(text, add_special_tokens=False)
        spans = draw_spans(draw, encoding, text)
        expected = by_every_token(encoding, text, spans)
        # spans at the end, of no character, leave the borders and need every token
        many = [*spans, *[CharSpan(len(text), len(text))] * 65]
        for given in (spans, many):
            try:
                found = token_spans(encoding, text, given, [])
            except ChatTemplateError:
                assert expected is None, (text, spans)
                outcomes["cut"] += 1
                continue
            assert expected is not None, (text, spans)
            for (start, end), (first, last) in zip(found, expected, strict=False):
                assert (start, end) == (first, last) or (start == end and first == last), text
            outcomes["borders"] += 1
    assert min(outcomes.values()) > 200


def test_a_row_is_searched_at_its_borders_alone_and_counted_without_a_sample() -> None:
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES["chatml"])
    rows = [conversation(3), conversation(3, word="dog")]
    chat.tokenize_many(rows, [[3], [3]], [None, None])
    calls = calls_of(lambda: chat.tokenize_many(rows, [[3], [3]], [None, None]))
    assert calls["char_to_token"] == 2 * 6 and calls["fromiter"] == 0
    calls = calls_of(lambda: chat.count_many(rows, [[3], [3]], [None, None]))
    assert calls["char_to_token"] == 2 * 6 and calls["from_numpy"] == calls["array"] == 0


def test_counts_are_those_of_the_samples() -> None:
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES["chatml"])
    refused = Conversation((Message("user", (Text("a"),)), Message("assistant", (Text("\n\nb"),))))
    shown = Message("assistant", (Text("Look: "), Media("image", "x"), Text("!")))
    rows = [conversation(2), conversation(70), refused, conversation(1, word="\ue0000\ue001")]
    rows.append(Conversation((*refused.messages[:1], shown)))
    numbers, turns = [[3], [0], [], [5], [4]], [None, "all", None, "last", None]
    samples = chat.tokenize_many(rows, numbers, turns)  # type: ignore[arg-type]
    counts = chat.count_many(rows, numbers, turns)  # type: ignore[arg-type]
    for sample, count in zip(samples, counts, strict=True):
        if isinstance(sample, ChatTemplateError):
            assert str(count) == str(sample)
        else:
            supervised = int((sample.labels != IGNORE_INDEX).sum())
            assert count == (len(sample.input_ids), supervised)


def test_blanks_of_an_answer_are_supervised_where_the_tokenizer_trims_its_offsets() -> None:
    """Llama 3, GPT-2 and others take blanks out of the offsets of their tokens."""
    code = Conversation(
        (Message("user", (Text("a"),)), Message("assistant", (Text("if x:\n    yes  no"),)))
    )
    plain, trimmed, robertas = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    trimmed.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    bos = ("<s>", robertas.bos_token_id)
    robertas.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [bos])
    expected = ChatFormat(plain, TEMPLATES["chatml"]).tokenize(code, [])
    for other in (trimmed, robertas):
        found = ChatFormat(other, TEMPLATES["chatml"]).tokenize(code, [])
        assert found.input_ids.equal(expected.input_ids) and found.labels.equal(expected.labels)
    texts = plain.decode(expected.labels[expected.labels != IGNORE_INDEX])
    assert texts == "if x:\n    yes  no<|im_end|>"


def test_a_prompt_that_no_answer_may_follow_is_kept_whole() -> None:
    # the template has no place for an answer, so that its prompt ends with its text
    chat = ChatFormat(tiny_tokenizer(), "{{ messages[0]['content'] }}<|im_end|>")
    prompt = chat.tokenize(Conversation((Message("user", (Text("Hi"),)),)), [], prompt_only=True)
    assert chat.tokenizer.decode(prompt.input_ids) == "Hi<|im_end|>"
