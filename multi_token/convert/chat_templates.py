"""Chat templates of other formats: LLaVA's own, and one that renders content parts."""

from __future__ import annotations

from typing import Any

from multi_token.chat.named import named_template

# LLaVA-1.5 was trained on this format (conversation.py of haotian-liu/LLaVA, `vicuna_v1`)
VICUNA = named_template("vicuna")

# An engine decides by this loop over `message['content']` whether messages reach the template in
# parts (vLLM's "openai" format); without it vLLM would join the parts with line breaks of its own.
# `+`, because lists cannot be changed in place in the sandbox that templates run in.
_HEAD = """{#- Media parts become <TYPE>; text parts are joined as they are. -#}
{%- set walked = namespace(messages=[], text='') -%}
{%- for message in messages -%}
{%- if message['content'] is string or message['content'] is none \
or message['content'] is undefined -%}
{%- set walked.messages = walked.messages + [message] -%}
{%- else -%}
{%- set walked.text = '' -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{%- set walked.text = walked.text + part['text'] -%}
{%- else -%}
{%- set walked.text = walked.text + '<' + part['type'] + '>' -%}
{%- endif -%}
{%- endfor -%}
{%- set walked.messages = walked.messages + [dict(message, content=walked.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = walked.messages -%}
{{- '' }}"""


def prepend_bos(template: str, tokenizer: Any) -> str:
    """The template with a BOS in front, where LLaVA's processor has the tokenizer put it there.

    Here a template writes all special tokens itself.
    """
    from multi_token.chat.template import ChatTemplate

    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    rendered = ChatTemplate(template, tokenizer).render([{"role": "user", "content": "a"}])
    if begins and not rendered.startswith(tokenizer.bos_token):
        return "{{ bos_token }}" + template
    return template


def part_placeholder(name: str) -> str:
    """Text that the template writes for a media part of this type."""
    return f"<{name}>"


def accept_content_parts(template: str) -> str:
    """The same rendering for plain texts, and for parts what their joined text would give."""
    return template if template.startswith(_HEAD) else _HEAD + template
