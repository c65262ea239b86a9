"""A chat template that walks over content parts, around one that expects plain texts."""

from __future__ import annotations

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


def part_placeholder(name: str) -> str:
    """Text that the template writes for a media part of this type."""
    return f"<{name}>"


def accept_content_parts(template: str) -> str:
    """The same rendering for plain texts, and for parts what their joined text would give."""
    return template if template.startswith(_HEAD) else _HEAD + template
