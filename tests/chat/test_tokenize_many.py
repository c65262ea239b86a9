"""format.py: rows that are tokenized together, and the work that a long conversation takes."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.errors import ChatTemplateError
from multi_token.testing import TEMPLATES, tiny_tokenizer
from multi_token.types import Conversation, Media, Message, Sample, Text


def conversation(num_turns: int, *, word: str = "cat") -> Conversation:
    messages: list[Message] = []
    for turn in range(num_turns):
        image = (Media("image", "x"),) if turn == 0 else ()
        messages.append(Message("user", (*image, Text(f"Question {turn} of the user?"))))
        messages.append(Message("assistant", (Text(f"answer {turn} is a {word}."),)))
    return Conversation(tuple(messages), id="row")


def contents(sample: Sample | ChatTemplateError) -> Any:
    if isinstance(sample, ChatTemplateError):
        return str(sample)
    return sample.input_ids.tolist(), sample.labels.tolist(), sample.media_spans, sample.id


def alone(chat: ChatFormat, conversation: Conversation, turns: Any) -> Sample | ChatTemplateError:
    try:
        return chat.tokenize(conversation, [3], train_on_turns=turns)
    except ChatTemplateError as error:
        return error


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_that_are_tokenized_together_have_the_ids_that_each_has_alone(template: str) -> None:
    # the third cannot be rendered, the fourth contains the usual slot, the last has blanks
    twice = Message("system", (Text("a"),))
    slot = Message("user", (Media("image", "x"), Text("\ue0000\ue001")))
    end = Message("assistant", (Text("  dog \n"),))
    rows = [
        conversation(1),
        conversation(4, word="<|im_end|>"),
        Conversation((end, twice, end, slot, twice)),
        Conversation((slot, end)),
        conversation(2),
        Conversation((Message("user", (Text("\n"), Media("image", "x"), Text(" "))), end)),
    ]
    turns: list[Any] = [None, "last", None, "all", "last", None]
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES[template])
    expected = [contents(alone(chat, row, turn)) for row, turn in zip(rows, turns, strict=True)]
    fresh = ChatFormat(tiny_tokenizer(), TEMPLATES[template])
    found = fresh.tokenize_many(rows, [[3]] * len(rows), turns)
    assert [contents(sample) for sample in found] == expected
    assert isinstance(found[0], Sample) and found[0].input_ids.dtype == torch.int64


def calls_of(function: Any) -> Counter[str]:
    """Count the calls that a function makes, by name."""
    found: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}"] += 1
        elif event == "c_call":
            found[argument.__name__] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("template", ["chatml", "marked", "llama3"])
def test_the_work_on_a_conversation_grows_as_its_turns_do(template: str) -> None:
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES[template])
    calls = {}
    for num_turns in (40, 160):
        chat.tokenize(conversation(num_turns, word="dog"), [3])  # its layout is rendered once
        calls[num_turns] = calls_of(lambda n=num_turns: chat.tokenize(conversation(n), [3])).total()
    assert calls[160] < 4.5 * calls[40]


def test_the_template_renders_a_row_once() -> None:
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES["chatml"])
    chat.tokenize(conversation(3), [3])
    rows = [conversation(3, word=word) for word in ("dog", "horse")]
    calls = calls_of(lambda: chat.tokenize_many(rows, [[3], [3]], [None, None]))
    assert calls["jinja2.environment.render"] == len(rows)
    assert calls["encode_batch"] == calls["decode_batch"] == 1
