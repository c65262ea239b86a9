"""chat/template.py: odd templates are located exactly, or refused with a remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.chat.template import ChatTemplate
from multi_token.errors import ChatTemplateError
from multi_token.testing import TEMPLATES, tiny_tokenizer
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Role, Text
from tests.chat.test_tokenize_many import calls_of

CHATML = TEMPLATES["chatml"]
HEADER = "<|im_start|>assistant\n"


def talk(*turns: tuple[Role, str]) -> Conversation:
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns), id="row")


TWO = talk(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))


def supervised(chat: ChatFormat, conversation: Conversation) -> str:
    """Return the supervised text of all turns."""
    labels = chat.tokenize(conversation, [1] * len(conversation.media)).labels
    return chat.tokenizer.decode(labels[labels != IGNORE_INDEX])


def asked(chat: ChatFormat, conversation: Conversation) -> str:
    last = Conversation(conversation.messages[:-1])
    return chat.tokenizer.decode(chat.tokenize(last, [], prompt_only=True).input_ids)


def refuse_mismatch(chat: ChatFormat, conversation: Conversation) -> None:
    """Assert that the prompt equals the training text up to the last supervised turn."""
    trained = chat.tokenize(conversation, [])
    last = Conversation(conversation.messages[:-1])
    ids = chat.tokenize(last, [], prompt_only=True).input_ids
    assert torch.equal(trained.input_ids[: len(ids)], ids)
    assert trained.labels[len(ids)] != IGNORE_INDEX
    assert trained.labels[len(ids) - 1] == IGNORE_INDEX


def with_tags(opening: str, closing: str) -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'user' %}"
        f"{opening}{{{{ m['content'] }}}}<|im_end|>{{% else %}}{{% generation %}}"
        f"{{{{ m['content'] }}}}{closing}{{% endif %}}{{% endfor %}}"
    )


def test_tags_that_leave_out_the_end_of_turn_are_refused() -> None:
    chat = ChatFormat(tiny_tokenizer(), with_tags("", "{% endgeneration %}<|im_end|>"))
    with pytest.raises(ChatTemplateError, match="do not hold all of '1<.im_end.>'"):
        chat.tokenize(TWO, [])


def test_tags_that_hold_a_question_are_refused() -> None:
    template = (
        "{% generation %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>{% endfor %}{% endgeneration %}"
    )
    with pytest.raises(ChatTemplateError, match=r"hold more than .* turns: 'One\?'"):
        ChatFormat(tiny_tokenizer(), template).tokenize(TWO, [])


def test_tags_are_followed_to_the_letter() -> None:
    chat = ChatFormat(tiny_tokenizer(), with_tags("", "<|im_end|>\n{% endgeneration %}"))
    assert supervised(chat, TWO) == "1<|im_end|>\n2<|im_end|>\n"
    assert chat.tokenizer.decode(chat.end_of_turn_ids) == "<|im_end|>"


def test_two_turns_inside_one_tag_get_a_span_each() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>user\n{{ m['content'] }}"
        "<|im_end|>{% else %}{% generation %}<|im_start|>assistant\n{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}{% endif %}{% endfor %}"
    )
    row = talk(("user", "Two?"), ("assistant", "1"), ("assistant", "2"))
    tokenizer = tiny_tokenizer()
    every = ChatFormat(tokenizer, template)
    assert supervised(every, row) == f"{HEADER}1<|im_end|>{HEADER}2<|im_end|>"
    last = ChatFormat(tokenizer, template, train_on_turns="last")
    assert supervised(last, row) == f"{HEADER}2<|im_end|>"


def test_a_header_is_not_supervised_where_the_template_has_no_generation_prompt() -> None:
    template = CHATML[: CHATML.index("{% if add_generation_prompt %}")]
    chat = ChatFormat(tiny_tokenizer(), template)
    assert supervised(chat, TWO) == "1<|im_end|>2<|im_end|>"
    assert asked(chat, TWO).endswith(f"Two?<|im_end|>\n{HEADER}")
    refuse_mismatch(chat, TWO)


def test_a_prompt_that_ends_in_a_blank_equals_the_training_text() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ '<|im_end|>' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = ChatFormat(tiny_tokenizer(), template)
    row = talk(("user", "What?"), ("assistant", "a cat"))
    assert supervised(chat, row) == " a cat<|im_end|>"
    assert asked(chat, row) == "user: What?\nassistant:"
    refuse_mismatch(chat, row)


def test_line_breaks_before_an_answer_equal_those_of_training() -> None:
    """This tokenizer makes one token of both at the end of a text, and two before a word."""
    tokenizer = tiny_tokenizer("llama3")
    tokenizer.add_tokens(["\n\n"])
    refuse_mismatch(ChatFormat(tokenizer), TWO)
    refuse_mismatch(ChatFormat(tiny_tokenizer("llama3")), TWO)


def test_a_question_is_never_supervised_where_an_answer_has_no_end() -> None:
    """Only the last answer is closed here; the next end of turn follows the question."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}"
        "{{ '<|im_end|>' if loop.last else '' }}{% endfor %}"
    )
    chat = ChatFormat(tiny_tokenizer(), template)
    assert supervised(chat, Conversation(TWO.messages[:2])) == " 1\n<|im_end|>"
    with pytest.raises(ChatTemplateError, match="0 of 2 assistant turns with an end"):
        chat.tokenize(TWO, [])


SYSTEM_IN_THE_LAST_QUESTION = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>' + (system if loop.last else '') + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


def test_a_system_message_that_only_an_open_question_shows_is_refused_on_both_sides() -> None:
    """Published templates do so; training would never see what the prompt shows."""
    chat = ChatFormat(tiny_tokenizer(), SYSTEM_IN_THE_LAST_QUESTION)
    row = talk(("system", "Be brief."), ("user", "One?"), ("assistant", "1"))
    with pytest.raises(ChatTemplateError, match=r"drops message 1 of 3 \(role system\)"):
        chat.tokenize(row, [])
    with pytest.raises(ChatTemplateError, match=r"drops message 1 of 2 \(role system\)"):
        chat.tokenize(Conversation(row.messages[:-1]), [], prompt_only=True)
    refuse_mismatch(chat, TWO)


@pytest.mark.parametrize(
    "content",
    [
        "m['content'] | upper",
        "m['content'] + m['content']",
        "m['content'][:1]",
        "'' if m['role'] == 'assistant' else m['content']",
    ],
)
def test_answers_that_are_changed_repeated_cut_or_dropped_are_refused(content: str) -> None:
    template = CHATML.replace("m['content']", content)
    row = talk(("user", "What?"), ("assistant", "a cat"))
    with pytest.raises(ChatTemplateError, match="set `chat_template` in the recipe"):
        ChatFormat(tiny_tokenizer(), template).tokenize(row, [])


def test_a_template_may_look_into_a_system_message() -> None:
    """Some templates turn reasoning on and off by a word in the conversation."""
    template = (
        "{% set off = '/no_think' in messages[0]['content'] %}{% for m in messages %}"
        "<|im_start|>{{ m['role'] }}\n{{ '<s></s>\n' if off and m['role'] == 'assistant' }}"
        "{{ m['content'] | replace('/no_think', '') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '<s></s>\n' if off }}{% endif %}"
    )
    chat = ChatFormat(tiny_tokenizer(), template)
    row = Conversation((Message("system", (Text("Be brief. /no_think"),)), *TWO.messages))
    assert supervised(chat, row) == "1<|im_end|>2<|im_end|>"
    assert asked(chat, row).endswith(f"{HEADER}<s></s>\n")
    refuse_mismatch(chat, row)


@pytest.mark.parametrize(
    "answer",
    ["\ue1000.1\ue101", "\ue1000.1r\ue101 \ue1001.0\ue101", "One?", "<|im_end|>", "</think>", ""],
)
def test_texts_that_look_like_markers_or_markup_are_supervised_unchanged(answer: str) -> None:
    chat = ChatFormat(tiny_tokenizer())
    row = talk(("user", answer), ("assistant", answer), ("user", "One?"), ("assistant", answer))
    assert supervised(chat, row) == f"{answer}<|im_end|>" * 2


@pytest.mark.parametrize("answer", ["  def f():\n      return 1\n\n", "a\n\n\nb", " \t x"])
def test_blanks_of_an_answer_are_supervised_where_the_template_keeps_them(answer: str) -> None:
    row = talk(("user", "What?"), ("assistant", answer))
    assert supervised(ChatFormat(tiny_tokenizer()), row) == f"{answer}<|im_end|>"


def test_a_conversation_may_begin_with_the_assistant() -> None:
    row = talk(("assistant", "Hello."), ("user", "What?"), ("assistant", "a cat"))
    assert supervised(ChatFormat(tiny_tokenizer()), row) == "Hello.<|im_end|>a cat<|im_end|>"


def test_media_inside_an_answer_are_not_supervised_but_the_words_around_are() -> None:
    answer = Message("assistant", (Text("This one: "), Media("image", 0), Text(" it is.")))
    row = Conversation((Message("user", (Text("Which?"),)), answer))
    assert supervised(ChatFormat(tiny_tokenizer()), row) == "This one:  it is.<|im_end|>"


def test_text_that_a_tokenizer_normalizes_is_supervised() -> None:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    row = talk(("user", "Where?"), ("assistant", "cafe\u0301"))
    assert supervised(ChatFormat(tokenizer), row) == "caf\u00e9<|im_end|>"


def test_text_that_a_tokenizer_cannot_spell_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "yes"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    core.add_special_tokens(words[:3])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    chat = ChatFormat(tokenizer, CHATML)
    assert chat.tokenize(talk(("user", "yes"), ("assistant", "yes")), []).labels.max() == 5
    with pytest.raises(
        ChatTemplateError, match="expected to train on 'no<.im_end.>'.*cannot spell"
    ):
        chat.tokenize(talk(("user", "yes"), ("assistant", "no")), [])


def test_a_template_is_rendered_once_for_a_known_sequence_of_roles() -> None:
    ChatTemplate(CHATML, tiny_tokenizer()).render([])  # what a process asks transformers once
    chat = ChatFormat(tiny_tokenizer())
    counts = []
    for prompt_only in (False, True):
        row = Conversation(TWO.messages[:-1]) if prompt_only else TWO
        for _ in range(2):
            calls = calls_of(lambda r=row, p=prompt_only: chat.tokenize(r, [], prompt_only=p))
            counts.append(calls["jinja2.environment.render"])
    # a probe for the contents, two for the ends, one layout and its two borders come first
    assert counts == [1 + 1 + 2 + 1 + 2, 1, 1, 1]


def test_many_sequences_of_roles_do_not_fill_the_memory() -> None:
    shape = ChatTemplate(CHATML, tiny_tokenizer())
    for length in range(600):
        roles = [("user", "assistant")[int(bit)] for bit in f"{length:b}"]
        shape.render_prompt([{"role": role, "content": "a"} for role in roles])
    assert len(pickle.dumps(shape)) < 300_000  # 560,000 if all were kept


def test_the_recipe_sets_which_turns_are_supervised(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.processor import build_processor
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path)
    texts = {}
    for train_on_turns in ("all", "last"):
        fields["model"]["train_on_turns"] = train_on_turns
        recipe = Recipe.model_validate(fields)
        model = MultiTokenForConditionalGeneration.from_spec(recipe.model)
        assert model.processor is not None
        texts[train_on_turns] = supervised(model.processor.chat, TWO)
        assert supervised(build_processor(recipe).chat, TWO) == texts[train_on_turns]
        assert model.config.model["train_on_turns"] == train_on_turns
    assert texts == {"all": "1<|im_end|>2<|im_end|>", "last": "2<|im_end|>"}


def test_with_train_on_turns_last_a_row_with_an_empty_last_answer_is_refused(
    recipe_fields: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from multi_token.errors import RowError
    from multi_token.processor import build_processor
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path)
    row = talk(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", ""))
    assert build_processor(Recipe.model_validate(fields))(row).labels.max() > 0
    fields["model"]["train_on_turns"] = "last"
    with pytest.raises(RowError, match="nothing to train on"):
        build_processor(Recipe.model_validate(fields))(row)


@pytest.mark.parametrize("source", [*TEMPLATES.values(), None])
def test_a_text_is_that_of_apply_chat_template_without_its_copies(source: str | None) -> None:
    odd = (
        "{{ bos_token }}{{ [tools is none, tools is defined, documents, unk_token] }}"
        "{% for m in messages %}{{ m | tojson }}{{ m.reasoning_content is defined }}{% endfor %}"
        "{{ add_generation_prompt }}"
    )
    tokenizer = tiny_tokenizer()
    template = ChatTemplate(source or odd, tokenizer)
    messages = [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": " c "}]
    for prompt in (False, True):
        options: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": False}
        expected = tokenizer.apply_chat_template(messages, chat_template=source or odd, **options)
        assert template.render(messages, add_generation_prompt=prompt) == expected
    calls = calls_of(lambda: template.render(messages))
    assert not any(name.endswith("_plain_template_data") for name in calls)
