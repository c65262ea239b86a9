"""format.py: exactly the assistant's turns are supervised, and no text can forge a slot."""

from __future__ import annotations

import pickle
from itertools import product
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from multi_token.chat.format import DEFAULT_TEMPLATE, ChatFormat
from multi_token.errors import ChatTemplateError
from multi_token.testing import TEMPLATES, tiny_tokenizer
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Part, Text

END = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}


def end_of_turn(template: str) -> str:
    return END.get(template, "<|im_end|>")


def conversation(num_turns: int, *, system: bool = False, media_at: int = 0) -> Conversation:
    messages = [Message("system", (Text("Be brief."),))] if system else []
    for turn in range(num_turns):
        parts: tuple[Part, ...] = (Text(f"Question {turn} of the user?"),)
        if turn == media_at:
            parts = (
                Text("Look at "),
                Media("image", "x"),
                Text(" and "),
                Media("image", "y"),
                *parts,
            )
        messages += [
            Message("user", parts),
            Message("assistant", (Text(f"answer {turn} is a cat."),)),
        ]
    return Conversation(tuple(messages), id="row")


def supervised_runs(labels: torch.Tensor) -> list[list[int]]:
    runs: list[list[int]] = []
    previous = False
    for label in labels.tolist():
        if label != IGNORE_INDEX:
            if not previous:
                runs.append([])
            runs[-1].append(label)
        previous = label != IGNORE_INDEX
    return runs


CASES = [
    (template, num_turns, system, media_at)
    for template, num_turns, system, media_at in product(
        TEMPLATES, (1, 2, 5), (False, True), ("first", "last")
    )
    if not (template == "gemma" and system)
]


@pytest.mark.parametrize(("template", "num_turns", "system", "media_at"), CASES)
def test_supervised_tokens_are_exactly_the_assistants_turns_and_their_end(
    template: str, num_turns: int, system: bool, media_at: str
) -> None:
    chat = ChatFormat(tiny_tokenizer(template))
    at = 0 if media_at == "first" else num_turns - 1
    sample = chat.tokenize(conversation(num_turns, system=system, media_at=at), [3, 2])
    texts = [chat.tokenizer.decode(run).strip() for run in supervised_runs(sample.labels)]
    assert texts == [f"answer {i} is a cat.{end_of_turn(template)}" for i in range(num_turns)]


@pytest.mark.parametrize(("template", "num_turns", "system", "media_at"), CASES)
def test_the_prompt_equals_the_training_text_before_the_last_answer(
    template: str, num_turns: int, system: bool, media_at: str
) -> None:
    chat = ChatFormat(tiny_tokenizer(template))
    at = 0 if media_at == "first" else num_turns - 1
    whole = conversation(num_turns, system=system, media_at=at)
    trained = chat.tokenize(whole, [3, 2])
    asked = chat.tokenize(Conversation(whole.messages[:-1]), [3, 2], prompt_only=True)
    assert torch.equal(trained.input_ids[: len(asked.input_ids)], asked.input_ids)
    first_supervised = len(trained.labels) - len(supervised_runs(trained.labels)[-1])
    if template in ("chatml", "smollm2", "marked", "gemma"):
        first_supervised -= 1  # a line break follows the last end of turn
    assert first_supervised == len(asked.input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_of_a_text_conversation_are_the_tokenizers_own(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    messages = [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "a dog"},
    ]
    ours = ChatFormat(tokenizer).tokenize(
        Conversation(tuple(Message(m["role"], (Text(m["content"]),)) for m in messages)),
        [],  # type: ignore[arg-type]
    )
    assert ours.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert (ours.input_ids == tokenizer.bos_token_id).sum() <= 1


@pytest.mark.parametrize("end", ["\n", "  ", " \n\n"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_blanks_at_the_end_of_a_question_are_not_supervised(template: str, end: str) -> None:
    chat = ChatFormat(tiny_tokenizer(), TEMPLATES[template])
    question = Message("user", (Text("What is this?\n"), Media("image", "x"), Text(end)))
    again = Message("user", (Media("image", "x"), Text("And now?" + end)))
    answer = Message("assistant", (Text("A cat."),))
    sample = chat.tokenize(Conversation((question, answer, again, answer)), [3, 3])
    texts = [chat.tokenizer.decode(run) for run in supervised_runs(sample.labels)]
    assert [text.strip() for text in texts] == ["A cat." + end_of_turn(template)] * 2


def test_media_spans_cover_their_filler_ids_in_reading_order() -> None:
    chat = ChatFormat(tiny_tokenizer())
    parts: tuple[Part, ...] = (
        Media("image", 0),
        Text(" or "),
        Media("vector", 1),
        Media("image", 2),
    )
    messages = (Message("user", parts), Message("assistant", (Text("yes"),)))
    sample = chat.tokenize(Conversation(messages, id="row 7"), [4, 1, 2])
    assert sample.id == "row 7"
    assert [(p.modality, p.length) for p in sample.media_spans] == [
        ("image", 4),
        ("vector", 1),
        ("image", 2),
    ]
    for media_span in sample.media_spans:
        span = slice(media_span.start, media_span.start + media_span.length)
        assert (sample.input_ids[span] == chat.filler_id).all()
        assert (sample.labels[span] == IGNORE_INDEX).all()
    assert sample.media_spans[2].start == sample.media_spans[1].start + 1


def test_no_id_is_outside_the_language_models_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    sample = ChatFormat(tokenizer).tokenize(conversation(2), [3, 2])
    assert int(sample.input_ids.max()) < size
    assert len(tokenizer) == size


def test_text_that_spells_a_slot_stays_text() -> None:
    chat = ChatFormat(tiny_tokenizer())
    forged = "\ue0000\ue001 and <image>"
    messages = (
        Message("user", (Text(forged), Media("image", "x"))),
        Message("assistant", (Text("yes"),)),
    )
    sample = chat.tokenize(Conversation(messages), [2])
    assert len(sample.media_spans) == 1
    place = sample.media_spans[0]
    assert forged in chat.tokenizer.decode(sample.input_ids[: place.start])


def test_a_template_that_refuses_a_role_is_reported_with_its_own_words() -> None:
    chat = ChatFormat(tiny_tokenizer("gemma"))
    with pytest.raises(ChatTemplateError, match="System role not supported.*system, user"):
        chat.tokenize(conversation(1, system=True), [1, 1])


def test_a_template_that_drops_media_is_refused() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "<|im_start|>assistant\n{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ChatTemplateError, match="kept 0 of 2 media slots"):
        ChatFormat(tiny_tokenizer(), template).tokenize(conversation(1), [1, 1])


def test_a_template_that_changes_the_answer_is_refused() -> None:
    template = TEMPLATES["chatml"].replace("m['content'] }}", "m['content'] | upper }}")
    with pytest.raises(ChatTemplateError, match="chat_template"):
        ChatFormat(tiny_tokenizer(), template).tokenize(conversation(1), [1, 1])


def test_a_template_without_end_of_turn_is_refused() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match="0 of 1 assistant turns"):
        ChatFormat(tiny_tokenizer(), template).tokenize(conversation(1), [1, 1])


def test_without_a_template_and_an_eos_token_the_tokenizer_is_refused_with_what_to_set() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.eos_token = None
    with pytest.raises(
        ChatTemplateError, match="no EOS token .* set `chat_template` in the recipe"
    ):
        ChatFormat(tokenizer)


def test_without_a_template_the_documented_default_is_used() -> None:
    tokenizer = tiny_tokenizer("llama3")  # its EOS is <|eot_id|>
    tokenizer.chat_template = None
    chat = ChatFormat(tokenizer)
    talk = conversation(1, system=True)
    assert chat.template == DEFAULT_TEMPLATE
    decoded = chat.tokenizer.decode(chat.tokenize(talk, [1, 1]).input_ids)
    assert decoded == (
        "System: Be brief.\nUser: Look at <pad> and <pad>Question 0 of the user?\n"
        "Assistant: answer 0 is a cat.<|eot_id|>"
    )


def test_the_default_template_begins_as_the_tokenizer_begins_a_plain_text() -> None:
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    sample = ChatFormat(tokenizer).tokenize(conversation(1), [1, 1])
    assert sample.input_ids[0] == tokenizer.bos_token_id
    assert (sample.input_ids == tokenizer.bos_token_id).sum() == 1


def test_the_filler_is_the_pad_token_or_else_the_eos_token() -> None:
    tokenizer = tiny_tokenizer()
    assert ChatFormat(tokenizer).filler_id == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert ChatFormat(tokenizer).filler_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match="neither a pad nor an EOS token"):
        ChatFormat(tokenizer)


def test_one_of_several_templates_has_to_be_the_default() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "tool_use": "{{ 1 }}"}
    assert ChatFormat(tokenizer).template == TEMPLATES["chatml"]
    tokenizer.chat_template = {"tool_use": "{{ 1 }}"}
    with pytest.raises(ChatTemplateError, match=r"several chat templates \(tool_use\)"):
        ChatFormat(tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_with_train_on_turns_last_only_the_last_answer_is_supervised(template: str) -> None:
    talk = conversation(3)
    every = ChatFormat(tiny_tokenizer(template)).tokenize(talk, [3, 2])
    last = ChatFormat(tiny_tokenizer(template), train_on_turns="last").tokenize(talk, [3, 2])
    assert torch.equal(every.input_ids, last.input_ids)
    assert supervised_runs(last.labels) == supervised_runs(every.labels)[-1:]


def test_a_template_can_come_from_a_file(tmp_path: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES["llama3"])
    assert ChatFormat(tiny_tokenizer(), str(path)).template == TEMPLATES["llama3"]


def test_a_chat_format_can_be_pickled_for_a_data_worker() -> None:
    chat = ChatFormat(tiny_tokenizer())
    before = chat.tokenize(conversation(2), [3, 2])
    after = pickle.loads(pickle.dumps(chat)).tokenize(conversation(2), [3, 2])  # noqa: S301
    assert torch.equal(before.input_ids, after.input_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_end_of_turn_is_found_for_stopping(template: str) -> None:
    chat = ChatFormat(tiny_tokenizer(template))
    assert chat.tokenizer.decode(chat.end_of_turn_ids) == end_of_turn(template)


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "said", "said_while_it_grows"),
    [
        ("a red square<|im_end|>\n", "a red square\n", "a red square\n"),
        ("<think>\n\n</think>\n\nred<|im_end|>", "\n\nred", "\n\nred"),
        ("\n<think>\n\n</think> <think>", " <think>", " <think>"),
        ("<think>\n\n</thi", "<think>\n\n</thi", ""),
        ("<think>\n\nred", "<think>\n\nred", "<think>\n\nred"),
        ("<think>\n\n</think>", "", ""),
        ("", "", ""),
    ],
)
def test_text_that_the_template_writes_before_an_answer_is_removed(
    written: str, said: str, said_while_it_grows: str
) -> None:
    chat = ChatFormat(tiny_tokenizer(), THINKING)
    ids = chat.tokenizer(written, add_special_tokens=False).input_ids
    assert chat.decode(ids) == said
    assert chat.decode(ids, partial=True) == said_while_it_grows


def test_special_tokens_are_removed_from_an_answer() -> None:
    chat = ChatFormat(tiny_tokenizer())
    ids = chat.tokenizer("yes<|im_end|>", add_special_tokens=False).input_ids
    assert chat.decode(ids) == chat.decode(ids, partial=True) == "yes"
