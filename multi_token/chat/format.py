"""A tokenizer and its chat template: conversation in; ids, labels and places out, built together.

Border: the only place that turns text into ids. It knows how many tokens each item takes, but not
why; where the assistant's turns stand in a text is chat/template.py's to say.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from multi_token.chat.alignment import CharSpan, ChatMessage
from multi_token.chat.template import ChatTemplate
from multi_token.errors import ChatTemplateError
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Media,
    MediaSpan,
    Sample,
    TrainOnTurns,
)

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""For a tokenizer that has no template, where the recipe names none (docs/chat-templates.md)."""


class ChatFormat:
    """Renders a conversation once, tokenizes it once, expands each media slot at id level.

    A slot is a token that exists only in a private copy of the tokenizer, with a spelling that is
    checked not to occur in the conversation: no text can forge it, and the language model's
    vocabulary stays as it is. In the ids handed on, a media span holds an ordinary filler id.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, train_on_turns: TrainOnTurns = "all"
    ) -> None:
        """`chat_template`: Jinja text, or the path of a file with it; else the tokenizer's own.

        `train_on_turns`: which assistant turns of a conversation are learned. Raises
        ChatTemplateError for a tokenizer or a template that cannot be used.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ChatTemplateError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed to find the assistant's tokens exactly"
            )
        self.tokenizer = tokenizer
        self.train_on_turns: TrainOnTurns = train_on_turns
        self.template: str = _template_source(tokenizer, chat_template)
        fillers = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
        if not fillers:
            raise ChatTemplateError(
                "the language model's tokenizer has neither a pad nor an EOS token, so there is no "
                "id to fill media spans and padding with; give it one (`tokenizer.pad_token = ...`,"
                " then save it beside the model)"
            )
        self.filler_id: int = fillers[0]
        self._chat_template = ChatTemplate(self.template, tokenizer)
        self._slot_tokenizers: dict[str, Any] = {}  # slot spelling -> private copy of the tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slotted": {}}  # copies are made again where they are needed

    def tokenize(
        self,
        conversation: Conversation,
        num_tokens: Sequence[int],
        *,
        prompt_only: bool = False,
        train_on_turns: TrainOnTurns | None = None,
    ) -> Sample:
        """One conversation -> ids, labels and places. The Sample's `media` is left empty.

        `num_tokens`: positions that each media item takes, in reading order. `prompt_only`: end
        where the assistant begins to answer, nothing learned. `train_on_turns`: instead of the
        format's own.

        Raises ChatTemplateError.
        """
        slot = _unused_slot(conversation)
        messages = _to_chat_messages(conversation, slot)
        spans: list[CharSpan] = []
        if prompt_only:
            text, end = self._chat_template.render_prompt(messages)
            spans = [CharSpan(end, len(text))]
        else:
            text, spans = self._chat_template.render_with_spans(
                messages, last_only=(train_on_turns or self.train_on_turns) == "last"
            )
        if text.count(slot) != len(num_tokens):
            raise ChatTemplateError(
                f"the chat template kept {text.count(slot)} of {len(num_tokens)} media slots: it "
                "drops or repeats a turn that holds media"
            )
        self._chat_template.check_all_messages_rendered(messages, prompt_only=prompt_only)
        slotted, slot_id = self._slot_tokenizer(slot)
        encoded = slotted(text, add_special_tokens=False, return_offsets_mapping=True)

        input_ids: list[int] = []
        labels: list[int] = []
        places: list[MediaSpan] = []
        learned: list[list[int]] = [[] for _ in spans]
        media = iter(zip(conversation.media, num_tokens, strict=True))
        for token_id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token_id == slot_id:
                item, length = next(media)
                places.append(MediaSpan(item.modality, len(input_ids), length))
                input_ids += [self.filler_id] * length
                labels += [IGNORE_INDEX] * length
                continue
            span = _find_span(spans, start, end, text)
            if prompt_only and span is not None:
                break
            input_ids.append(token_id)
            labels.append(IGNORE_INDEX if span is None else token_id)
            if span is not None:
                learned[span].append(token_id)
        if not prompt_only:
            self._check_supervised_text(
                learned, [text[s.start : s.end].replace(slot, "") for s in spans]
            )
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            media_spans=places,
            id=conversation.id,
        )

    @functools.cached_property
    def end_of_turn_ids(self) -> list[int]:
        """The ids that close an assistant turn; some templates have another one for the last."""
        tokens = self._chat_template.end_of_turn_tokens
        return [int(self.tokenizer.convert_tokens_to_ids(token)) for token in tokens]

    def decode(self, ids: Sequence[int], *, partial: bool = False) -> str:
        """What the assistant says in ids that it has generated (or, `growing`, is generating).

        Without special tokens, and without what the template has it write before an answer (an
        empty `<think>` block, the name of a channel).
        """
        answer_prefix = self._chat_template.answer_prefix.strip()
        if answer_prefix:
            whole = self.tokenizer.decode(ids, skip_special_tokens=False).lstrip()
            if partial and answer_prefix.startswith(whole):
                return ""
            if whole.startswith(answer_prefix):
                added = self.tokenizer.added_tokens_decoder.values()
                special = [re.escape(str(token)) for token in added if token.special]
                return re.sub("|".join(special), "", whole[len(answer_prefix) :])
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _slot_tokenizer(self, slot: str) -> tuple[Any, int]:
        if slot not in self._slot_tokenizers:
            slotted = copy.deepcopy(self.tokenizer)
            slotted.add_tokens([AddedToken(slot, special=True, normalized=False)])
            self._slot_tokenizers[slot] = slotted
        slotted = self._slot_tokenizers[slot]
        return slotted, slotted.convert_tokens_to_ids(slot)

    def _check_supervised_text(self, supervised: list[list[int]], expected: list[str]) -> None:
        """The loud one: the learned ids, decoded, are the spans' text and nothing else."""
        for ids, text in zip(supervised, expected, strict=True):
            decoded = self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if self._normalize(decoded) != self._normalize(text):
                raise ChatTemplateError(
                    f"expected to learn {text[:80]!r}, but the learned tokens read "
                    f"{decoded[:80]!r}: the tokenizer cannot spell this text; write it in other "
                    "words, or leave the row out"
                )

    def _normalize(self, text: str) -> str:
        """Text as the tokenizer normalizes it, without blanks (decoders drop and add some)."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return "".join(text.replace("\u2581", " ").split())


def _template_source(tokenizer: Any, chat_template: str | None) -> str:
    """The Jinja text that is to be used: the recipe's, the tokenizer's own, or the default."""
    if chat_template is not None and "{" not in chat_template:
        path = Path(chat_template)
        if not path.is_file():
            raise ChatTemplateError(
                f"chat_template {chat_template!r} is neither Jinja text nor a file"
            )
        chat_template = path.read_text(encoding="utf-8")
    source = chat_template or tokenizer.chat_template
    if isinstance(source, dict):
        if "default" not in source:
            raise ChatTemplateError(
                f"the tokenizer has several chat templates ({', '.join(source)}) and none is the "
                "default; set `chat_template` in the recipe to the one that is meant"
            )
        source = source["default"]
    return source or _default_template(tokenizer)


def _default_template(tokenizer: Any) -> str:
    """`DEFAULT_TEMPLATE`, behind the BOS where the tokenizer itself begins a plain text with it.

    Raises ChatTemplateError if the tokenizer has no EOS, which is the default's end of turn.
    """
    if tokenizer.eos_token is None:
        raise ChatTemplateError(
            "the language model's tokenizer has no chat template, and no EOS token that the "
            "default one could end a turn with; set `chat_template` in the recipe to Jinja text "
            "or to a file with it"
        )
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE


def _unused_slot(conversation: Conversation) -> str:
    """A slot's spelling (private-use characters) that the conversation's text does not hold."""
    text = "".join(
        part.text for m in conversation.messages for part in m.parts if not isinstance(part, Media)
    )
    number = 0
    while (slot := f"\ue000{number}\ue001") in text:
        number += 1
    return slot


def _to_chat_messages(conversation: Conversation, slot: str) -> list[ChatMessage]:
    return [
        {
            "role": message.role,
            "content": "".join(
                slot if isinstance(part, Media) else part.text for part in message.parts
            ),
        }
        for message in conversation.messages
    ]


def _find_span(spans: list[CharSpan], start: int, end: int, text: str) -> int | None:
    """The learned span of a token. Raises ChatTemplateError if it lies across a border.

    Blanks do not count: tokenizers glue one to the word behind it, and some special tokens swallow
    those around them.
    """
    for i, span in enumerate(spans):
        inside = text[max(start, span.start) : min(end, span.end)]
        if inside and not (text[start : span.start] + text[span.end : end]).strip():
            return i
        if inside.strip():
            raise ChatTemplateError(
                f"the token {text[start:end]!r} lies across the border of an assistant turn, so it "
                "can be neither learned nor left out; set `chat_template` in the recipe to a "
                "template that begins and ends the assistant's text at a special token or a line "
                "break"
            )
    return None
