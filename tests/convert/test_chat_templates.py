"""convert/chat_templates.py: texts render as before, and parts as their joined text."""

from __future__ import annotations

from typing import Any

import pytest

from multi_token.convert.chat_templates import accept_content_parts, part_placeholder
from multi_token.testing import TEMPLATES, tiny_tokenizer

TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "  Look at <image> and tell\n"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "And this: <vector>?"},
]
PARTS: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "  Look at "},
            {"type": "image", "image": "cat.png"},
            {"type": "text", "text": " and tell\n"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "And this: "},
            {"type": "vector"},
            {"type": "text", "text": "?"},
        ],
    },
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_texts_and_parts_render_as_the_plain_template_renders_texts(
    name: str, prompt: bool
) -> None:
    tokenizer = tiny_tokenizer(name)

    def rendered(messages: list[dict[str, Any]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    plain = rendered(TURNS)
    tokenizer.chat_template = accept_content_parts(TEMPLATES[name])
    assert rendered(TURNS) == plain
    assert rendered(PARTS) == plain


def test_a_media_part_is_its_type_in_angle_brackets() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = accept_content_parts(TEMPLATES["chatml"])
    parts = [{"role": "user", "content": [{"type": "prompt_embeds", "data": ""}]}]
    text = tokenizer.apply_chat_template(parts, tokenize=False)
    assert part_placeholder("prompt_embeds") == "<prompt_embeds>" and "<prompt_embeds>" in text


def test_a_template_that_walks_already_is_left_as_it_is() -> None:
    once = accept_content_parts(TEMPLATES["chatml"])
    assert accept_content_parts(once) == once


def test_messages_with_other_fields_and_without_content_keep_them() -> None:
    tokenizer = tiny_tokenizer()
    plain = (
        "{% for m in messages %}{{ m['name'] }}:{{ m['content'] }};{{ m['tool_calls'] }}|"
        "{% endfor %}"
    )
    called = {"role": "assistant", "name": "bot", "content": None, "tool_calls": ["add"]}
    text = {"role": "user", "name": "ada", "content": "hi"}
    parts = {**text, "content": [{"type": "text", "text": "hi"}]}
    tokenizer.chat_template = plain
    expected = tokenizer.apply_chat_template([text, called], tokenize=False)
    assert expected.startswith("ada:hi;|bot:") and expected.endswith(";['add']|")
    tokenizer.chat_template = accept_content_parts(plain)
    assert tokenizer.apply_chat_template([parts, called], tokenize=False) == expected
