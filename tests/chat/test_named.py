"""named.py: templates by name, and values of a template's variables, such as `enable_thinking`."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from multi_token.chat.format import ChatFormat
from multi_token.chat.named import named_template, template_names, with_variables
from multi_token.errors import ChatTemplateError
from multi_token.testing import tiny_tokenizer
from multi_token.types import IGNORE_INDEX, Conversation, Message, Text

THINKING = (
    "{% set off = 'no thoughts\n' if enable_thinking is defined and not enable_thinking else '' %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ off if m['role'] == 'assistant' else '' }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ off }}{% endif %}"
)
TALK = Conversation((Message("user", (Text("What?"),)), Message("assistant", (Text("A cat."),))))
OFF = {"enable_thinking": False}


def prompt(chat: ChatFormat) -> str:
    question = Conversation(TALK.messages[:1])
    return chat.tokenizer.decode(chat.tokenize(question, [], prompt_only=True).input_ids)


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_named_template_renders_as_the_published_one(name: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer = tiny_tokenizer(name)
    messages = [
        {"role": role, "content": f" text {n} "} for n, role in enumerate(["user", "assistant"] * 2)
    ]
    texts = [
        tokenizer.apply_chat_template(
            messages[:num], chat_template=source, tokenize=False, add_generation_prompt=num == 3
        )
        for source in (named_template(name), (folder / f"{name}.jinja").read_text("utf-8"))
        for num in (3, 4)
    ]
    assert texts[:2] == texts[2:]


def test_a_recipe_names_a_template_and_an_unknown_name_gets_the_nearest() -> None:
    chat = ChatFormat(tiny_tokenizer(), "vicuna")
    assert prompt(chat).endswith("USER: What? ASSISTANT:")
    assert {"chatml", "llama2", "mistral_v3", "vicuna"} <= {*template_names()}
    with pytest.raises(ChatTemplateError, match="nor a known name: did you mean 'vicuna'"):
        ChatFormat(tiny_tokenizer(), "vicunia")


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}\n", "{# a #}\n\n"])
def test_values_of_variables_change_no_blank_of_a_template(start: str) -> None:
    tokenizer, source = tiny_tokenizer(), start + THINKING
    given: dict[str, Any] = {"chat_template": source, "tokenize": False}
    for add in (False, True):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], add_generation_prompt=add, **given, **OFF
        )
        given_in_text = given | {"chat_template": with_variables(source, OFF)}
        assert expected == tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], add_generation_prompt=add, **given_in_text
        )


@pytest.mark.parametrize(
    "value", ["a 'b' \\ {% x %} {{ y }} \n ü \U0001f600", [1, {"k": None}], 0.5]
)
def test_any_json_value_reaches_the_template_unchanged(value: Any) -> None:
    source = with_variables("{{ value | tojson }}{{ messages[0]['content'] }}", {"value": value})
    rendered = tiny_tokenizer().apply_chat_template(
        [{"role": "user", "content": ""}], chat_template=source, tokenize=False
    )
    assert json.loads(rendered) == value


def test_thinking_turned_off_is_in_the_prompt_of_training_and_of_asking() -> None:
    chat = ChatFormat(tiny_tokenizer(), THINKING)
    off = chat.with_kwargs(OFF)
    assert prompt(chat).endswith("assistant\n")
    assert prompt(off).endswith("assistant\nno thoughts\n")
    assert off is chat.with_kwargs(dict(OFF)) and chat.with_kwargs(None) is chat
    assert pickle.loads(pickle.dumps(off)).template == off.template  # noqa: S301


def test_the_published_template_with_thinking_off_supervises_the_answer_alone() -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    source = (folder / "qwen3.jinja").read_text(encoding="utf-8")
    think = "<think>\n\n</think>\n\n"
    for kwargs, before, supervised in (
        ({}, "assistant\n", f"{think}A cat.<|im_end|>"),
        (OFF, f"assistant\n{think}", "A cat.<|im_end|>"),
    ):
        chat = ChatFormat(tiny_tokenizer(), source, template_kwargs=kwargs)
        sample = chat.tokenize(TALK, [])
        is_supervised = sample.labels != IGNORE_INDEX
        assert chat.tokenizer.decode(sample.input_ids[is_supervised]) == supervised
        asked = chat.tokenize(Conversation(TALK.messages[:1]), [], prompt_only=True).input_ids
        assert chat.tokenizer.decode(asked).endswith(before)
        # the ids of asking are those of training
        assert torch.equal(asked, sample.input_ids[: len(asked)])
        assert is_supervised.nonzero()[0] == len(asked)


def test_an_unknown_variable_is_a_sentence_with_the_nearest() -> None:
    with pytest.raises(ChatTemplateError, match="no variable 'enable_thinkin': did you mean"):
        ChatFormat(tiny_tokenizer(), THINKING, template_kwargs={"enable_thinkin": False})
    with pytest.raises(ChatTemplateError, match="'messages'"):
        ChatFormat(tiny_tokenizer(), THINKING, template_kwargs={"messages": []})


def test_the_documents_list_every_name() -> None:
    page = Path(__file__).parents[2] / "docs" / "chat-templates.md"
    (line,) = (li for li in page.read_text("utf-8").splitlines() if "or a name: " in li)
    assert re.findall(r"`(\w+)`", line.partition("or a name: ")[2].partition(". ")[0]) == (
        template_names()
    )


def test_an_exported_run_keeps_the_values_for_programs_that_set_none(
    recipe_fields: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    from multi_token.convert.export import export
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.recipe.recipe import Recipe

    fields = recipe_fields(tmp_path)
    fields["model"] |= {"chat_template": THINKING, "chat_template_kwargs": OFF}
    run = MultiTokenForConditionalGeneration.from_spec(Recipe.model_validate(fields).model)
    run.save_pretrained(tmp_path / "run")
    again = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / "run")
    expected = prompt(again.require_processor().chat)
    assert expected.endswith("no thoughts\n")
    for to in ("merged", "language-model"):
        export(tmp_path / "run", tmp_path / to, to=to)
        loaded = MultiTokenForConditionalGeneration.from_pretrained(tmp_path / to)
        chat = loaded.require_processor().chat
        assert prompt(chat) == expected
        # a request may still turn thoughts on
        assert "no thoughts" not in prompt(chat.with_kwargs({"enable_thinking": True}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / to / "language_model")
        question = [{"role": "user", "content": "What?"}]
        assert expected == tokenizer.apply_chat_template(
            question, tokenize=False, add_generation_prompt=True
        )
