"""A tokenizer and its chat template: conversation in; ids, labels and places out, built together.

Border: the only place that knows templates and tokenizers. It knows how many tokens each item
takes, but not why.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken

from multi_token.errors import ChatTemplateError
from multi_token.types import IGNORE_INDEX, Conversation, Media, Message, Place, Sample, Text

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MEND = (
    "set `chat_template` in the recipe to a template that marks the assistant's text with "
    "{% generation %} ... {% endgeneration %}"
)


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a rendered conversation."""

    start: int
    end: int


class ChatFormat:
    """Renders a conversation once, tokenizes it once, expands each media slot at id level.

    A slot is a token that exists only in a private copy of the tokenizer, with a spelling that is
    checked not to occur in the conversation: no text can forge it, and the language model's
    vocabulary stays as it is. In the ids handed on, a media span holds an ordinary filler id.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        """`chat_template`: Jinja text, or the path of a file with it; else the tokenizer's own."""
        if not getattr(tokenizer, "is_fast", False):
            raise ChatTemplateError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed to find the assistant's tokens exactly"
            )
        self.tokenizer = tokenizer
        if chat_template is not None and "{" not in chat_template:
            path = Path(chat_template)
            if not path.is_file():
                raise ChatTemplateError(
                    f"chat_template {chat_template!r} is neither Jinja text nor a file"
                )
            chat_template = path.read_text(encoding="utf-8")
        template = chat_template or tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ChatTemplateError(
                "the language model's tokenizer has no chat template; set `chat_template` in the "
                "recipe to Jinja text or to a file with it"
            )
        self.template: str = template
        self.filler_id: int = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )
        self._slotted: dict[str, Any] = {}  # slot spelling -> private copy of the tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slotted": {}}  # copies are made again where they are needed

    def tokenize(
        self, conversation: Conversation, num_tokens: Sequence[int], *, prompt_only: bool = False
    ) -> Sample:
        """One conversation -> ids, labels and places. The Sample's `media` is left empty.

        `num_tokens`: positions that each media item takes, in reading order. `prompt_only`: end
        where the assistant begins to answer, nothing learned.

        Raises ChatTemplateError.
        """
        slot = _unused_spelling(conversation)
        messages = _messages(conversation, slot)
        text = self._render(messages, add_generation_prompt=prompt_only)
        if text.count(slot) != len(num_tokens):
            raise ChatTemplateError(
                f"the chat template kept {text.count(slot)} of {len(num_tokens)} media slots: it "
                "drops or repeats a turn that holds media"
            )
        spans = [] if prompt_only else self._learned_spans(messages, text)
        slotted, slot_id = self._tokenizer_with(slot)
        encoded = slotted(text, add_special_tokens=False, return_offsets_mapping=True)

        input_ids: list[int] = []
        labels: list[int] = []
        places: list[Place] = []
        learned: list[list[int]] = [[] for _ in spans]
        media = iter(zip(conversation.media, num_tokens, strict=True))
        for token_id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token_id == slot_id:
                item, length = next(media)
                places.append(Place(item.modality, len(input_ids), length))
                input_ids += [self.filler_id] * length
                labels += [IGNORE_INDEX] * length
                continue
            span = _span_of(spans, start, end, text)
            input_ids.append(token_id)
            labels.append(IGNORE_INDEX if span is None else token_id)
            if span is not None:
                learned[span].append(token_id)
        self._check(learned, spans, text)
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            places=places,
            id=conversation.id,
        )

    @functools.cached_property
    def end_of_turn_id(self) -> int | None:
        """The id that closes an assistant turn, or None if the template has no such token."""
        question = Message("user", (Text("a"),))
        answer = Message("assistant", (Text("b"),))
        sample = self.tokenize(Conversation((question, answer)), [])
        learned = sample.labels[sample.labels != IGNORE_INDEX]
        last = int(learned[-1])
        return last if self.tokenizer.decode([last]) in self._special_tokens() else None

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ChatTemplateError(
                f"the language model's chat template refuses this conversation: {error} "
                f"(roles: {', '.join(m['role'] for m in messages)})"
            ) from None

    def _tokenizer_with(self, slot: str) -> tuple[Any, int]:
        if slot not in self._slotted:
            slotted = copy.deepcopy(self.tokenizer)
            slotted.add_tokens([AddedToken(slot, special=True, normalized=False)])
            self._slotted[slot] = slotted
        slotted = self._slotted[slot]
        return slotted, slotted.convert_tokens_to_ids(slot)

    def _learned_spans(self, messages: list[dict[str, str]], text: str) -> list[Span]:
        """Where the assistant's turns stand in the rendered text, end-of-turn token included."""
        num_turns = sum(m["role"] == "assistant" for m in messages)
        if num_turns == 0:
            return []
        if _GENERATION_TAG.search(self.template):
            spans = self._marked_spans(messages, text)
        else:
            spans = self._prefix_spans(messages, text) or self._sentinel_spans(messages, text)
        if spans is None or len(spans) != num_turns:
            raise ChatTemplateError(
                f"found {len(spans or [])} of {num_turns} assistant turns in the rendered "
                f"conversation, so the learned part is not certain; {_MEND}"
            )
        answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
        for span, answer in zip(spans, answers, strict=True):
            body = text[span.start : span.end].strip()
            if not body.startswith(answer) or self._end_of_turn(body[len(answer) :]) is None:
                raise ChatTemplateError(
                    f"expected to learn the assistant's turn {answer[:60]!r} and its end-of-turn "
                    f"token, but the template renders {body[:80]!r}; {_MEND}"
                )
        return spans

    def _marked_spans(self, messages: list[dict[str, str]], text: str) -> list[Span] | None:
        """From the template's own generation marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],  # type: ignore[arg-type]
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        (same,), (indices,) = rendered
        return [Span(start, end) for start, end in indices] if same == text else None

    def _prefix_spans(self, messages: list[dict[str, str]], text: str) -> list[Span] | None:
        """From renderings of ever longer conversations, where each is a prefix of the whole."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            try:
                prompt = self._render(messages[:i], add_generation_prompt=True)
                through = self._render(messages[: i + 1], add_generation_prompt=False)
            except ChatTemplateError:
                return None
            if not (text.startswith(through) and through.startswith(prompt)):
                return None
            span = self._with_end_of_turn(text, len(prompt), message["content"], len(through))
            if span is None:
                return None
            spans.append(span)
        return spans

    def _sentinel_spans(self, messages: list[dict[str, str]], text: str) -> list[Span] | None:
        """From one rendering in which each assistant turn is replaced by a mark of its own."""
        marks = {i: f"\ue100{i}\ue101" for i, m in enumerate(messages) if m["role"] == "assistant"}
        if any(mark in text for mark in marks.values()):
            return None
        marked = self._render(
            [{**m, "content": marks.get(i, m["content"])} for i, m in enumerate(messages)],
            add_generation_prompt=False,
        )
        spans, built = [], ""
        rest = marked
        for i, mark in marks.items():
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            built += before
            content = messages[i]["content"]
            # templates that trim an answer do so here as well
            content = content if text.startswith(content, len(built)) else content.strip()
            start = len(built)
            built += content
            if not text.startswith(built):
                return None
            span = self._with_end_of_turn(text, start, content, len(text))
            if span is None:
                return None
            spans.append(span)
        return spans if built + rest == text else None

    def _with_end_of_turn(self, text: str, start: int, content: str, limit: int) -> Span | None:
        """The span from `start` over the answer to the end of its end-of-turn token."""
        at = text.find(content.strip(), start, limit)
        if at < 0:
            return None
        after = at + len(content.strip())
        length = self._end_of_turn(text[after:limit])
        return None if length is None else Span(start, after + length)

    def _end_of_turn(self, tail: str) -> int | None:
        """Characters of `tail` up to and with the first special token, or None if it has none."""
        ends = [
            tail.index(token) + len(token)
            for token in self._special_tokens()
            if token and token in tail
        ]
        return min(ends) if ends else None

    def _special_tokens(self) -> list[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return [*self.tokenizer.all_special_tokens, *(str(t) for t in added if t.special)]

    def _check(self, learned: list[list[int]], spans: list[Span], text: str) -> None:
        """The loud one: the learned ids, decoded, are the spans' text and nothing else."""
        for ids, span in zip(learned, spans, strict=True):
            decoded = self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            expected = text[span.start : span.end]
            if "".join(decoded.split()) != "".join(expected.split()):
                raise ChatTemplateError(
                    f"expected to learn {expected[:80]!r}, but the learned tokens read "
                    f"{decoded[:80]!r}; {_MEND}"
                )


def _unused_spelling(conversation: Conversation) -> str:
    """A slot's spelling (private-use characters) that the conversation's text does not hold."""
    text = "".join(
        part.text for m in conversation.messages for part in m.parts if not isinstance(part, Media)
    )
    number = 0
    while (slot := f"\ue000{number}\ue001") in text:
        number += 1
    return slot


def _messages(conversation: Conversation, slot: str) -> list[dict[str, str]]:
    return [
        {
            "role": message.role,
            "content": "".join(
                slot if isinstance(part, Media) else part.text for part in message.parts
            ),
        }
        for message in conversation.messages
    ]


def _span_of(spans: list[Span], start: int, end: int, text: str) -> int | None:
    """The learned span of a token. Raises ChatTemplateError if it lies across a border."""
    for i, span in enumerate(spans):
        if start < span.end and end > span.start and end > start:
            if start < span.start and text[start : span.start].strip() == "":
                # a leading blank that the tokenizer glues to the first word belongs to the answer
                return i
            if start < span.start or end > span.end:
                raise ChatTemplateError(
                    f"the token {text[start:end]!r} lies across the border of an assistant turn, "
                    f"so it can be neither learned nor left out; {_MEND}"
                )
            return i
    return None
