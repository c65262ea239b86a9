"""Chat templates of LLaVA: the one it learned with, and those of transformers' processors."""

from __future__ import annotations

from typing import Any

# LLaVA-1.5 learned with Vicuna's format (conversation.py of haotian-liu/LLaVA, `vicuna_v1`).
VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}"
    '{% else %}{{ "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}"
    "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


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
