"""Chat format: a conversation becomes ids, labels and media spans, built together.

The only file that turns text into ids. Steps of `ChatFormat.tokenize`:

    1. each media item becomes a slot, one character sequence that no text contains
    2. `chat/template.py` renders the text and finds the assistant's spans, in characters
    3. a private copy of the tokenizer, with the slot as a token, gives ids and character offsets
    4. each slot id is replaced by as many filler ids as the item has media embeddings
    5. ids inside an assistant's span become labels; decoded, they must be the span's text
"""

from __future__ import annotations

import copy
import functools
import itertools
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
"""Template for a tokenizer without one, if the recipe names none (docs/chat-templates.md)."""


class ChatFormat:
    """Tokenizer and chat template of a language model.

    No text can forge a media span: the slot token exists only in a private copy of the tokenizer,
    with a spelling that the conversation does not contain. The language model's vocabulary stays
    unchanged; in the ids of a sample, a media span holds an ordinary filler id.
    """

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, train_on_turns: TrainOnTurns = "all"
    ) -> None:
        """Check tokenizer and template.

        Args:
            tokenizer: A fast tokenizer of transformers, with a pad or an EOS token.
            chat_template: Jinja text, or the path of a file with it; else the tokenizer's own.
            train_on_turns: Assistant turns of a conversation that are supervised.

        Raises:
            ChatTemplateError: For a tokenizer or a template that cannot be used.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ChatTemplateError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer "
                "(tokenizer.json) is needed to find the assistant's tokens exactly"
            )
        self.tokenizer = tokenizer
        self.train_on_turns: TrainOnTurns = train_on_turns
        self.template: str = _template_source(tokenizer, chat_template)
        # Layers that look ids up (Gemma3n) get the filler too, so the id without content is first.
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
        # A data worker makes its own copies; a pickled tokenizer is megabytes.
        return {**self.__dict__, "_slot_tokenizers": {}}

    def tokenize(
        self,
        conversation: Conversation,
        num_tokens: Sequence[int],
        *,
        prompt_only: bool = False,
        train_on_turns: TrainOnTurns | None = None,
    ) -> Sample:
        """Tokenize one conversation.

        Args:
            conversation: Messages with their media items.
            num_tokens: Positions of each media item, in reading order.
            prompt_only: End where the assistant's answer begins, with nothing supervised.
            train_on_turns: Replaces the format's own.

        Returns:
            A sample with ids and labels int64 [time] and media spans; its `media` is empty.

        Raises:
            ChatTemplateError: If the template cannot render the conversation, or the assistant's
                tokens cannot be located exactly.
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
        # After a dropped slot, every item would be written at the span of the next one.
        if text.count(slot) != len(num_tokens):
            raise ChatTemplateError(
                f"the chat template kept {text.count(slot)} of {len(num_tokens)} media slots: it "
                "drops or repeats a turn that holds media"
            )
        self._chat_template.check_all_messages_rendered(messages, prompt_only=prompt_only)
        slotted, slot_id = self._slot_tokenizer(slot)
        # The template has written BOS itself, where the model wants one.
        encoded = slotted(text, add_special_tokens=False, return_offsets_mapping=True)

        input_ids: list[int] = []
        labels: list[int] = []
        media_spans: list[MediaSpan] = []
        supervised: list[list[int]] = [[] for _ in spans]
        media = iter(zip(conversation.media, num_tokens, strict=True))
        for token_id, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token_id == slot_id:
                item, length = next(media)
                media_spans.append(MediaSpan(item.modality, len(input_ids), length))
                input_ids += [self.filler_id] * length
                labels += [IGNORE_INDEX] * length
                continue
            span = _find_span(spans, start, end, text)
            if prompt_only and span is not None:
                break  # the letter after the prompt, see `render_prompt`
            input_ids.append(token_id)
            labels.append(IGNORE_INDEX if span is None else token_id)
            if span is not None:
                supervised[span].append(token_id)
        if not prompt_only:
            self._check_supervised_text(
                supervised, [text[s.start : s.end].replace(slot, "") for s in spans]
            )
        return Sample(
            input_ids=torch.tensor(input_ids, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            media_spans=media_spans,
            id=conversation.id,
        )

    @functools.cached_property
    def end_of_turn_ids(self) -> list[int]:
        """Ids that close an assistant turn; some templates close the last one by another id."""
        tokens = self._chat_template.end_of_turn_tokens
        return [int(self.tokenizer.convert_tokens_to_ids(token)) for token in tokens]

    def decode(self, ids: Sequence[int], *, partial: bool = False) -> str:
        """Decode generated ids to the text of the answer.

        Args:
            ids: Ids that the model generated after a prompt.
            partial: The ids are a prefix of an answer that is still generated.

        Returns:
            The text without special tokens, and without text that the template has the model write
            before an answer (an empty `<think>` block, the name of a channel).
        """
        answer_prefix = self._chat_template.answer_prefix.strip()
        if answer_prefix:
            # The prefix may hold special tokens, so it is removed before those are.
            text = self.tokenizer.decode(ids, skip_special_tokens=False).lstrip()
            if partial and answer_prefix.startswith(text):
                return ""
            if text.startswith(answer_prefix):
                added = self.tokenizer.added_tokens_decoder.values()
                special = [re.escape(str(token)) for token in added if token.special]
                return re.sub("|".join(special), "", text[len(answer_prefix) :])
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _slot_tokenizer(self, slot: str) -> tuple[Any, int]:
        if slot not in self._slot_tokenizers:
            slotted = copy.deepcopy(self.tokenizer)
            slotted.add_tokens([AddedToken(slot, special=True, normalized=False)])
            self._slot_tokenizers[slot] = slotted
        slotted = self._slot_tokenizers[slot]
        return slotted, slotted.convert_tokens_to_ids(slot)

    def _check_supervised_text(self, supervised: list[list[int]], expected: list[str]) -> None:
        """Raise ChatTemplateError unless each span's ids decode to the span's text."""
        # A wrong loss mask trains without any error, so every row pays for one decode.
        for ids, text in zip(supervised, expected, strict=True):
            decoded = self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            if self._normalize(decoded) != self._normalize(text):
                raise ChatTemplateError(
                    f"expected to train on {text[:80]!r}, but the supervised tokens decode to "
                    f"{decoded[:80]!r}: the tokenizer cannot spell this text; write it in other "
                    "words, or remove the row"
                )

    def _normalize(self, text: str) -> str:
        """Return text as the tokenizer normalizes it, without blanks."""
        # Decoders add and drop blanks around words; U+2581 is SentencePiece's blank.
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        if normalizer is not None:
            text = normalizer.normalize_str(text)
        return "".join(text.replace("\u2581", " ").split())


def _template_source(tokenizer: Any, chat_template: str | None) -> str:
    """Return the Jinja text: the recipe's, the tokenizer's own, or the default."""
    # Jinja text without a brace would render one text for every conversation.
    if chat_template is not None and "{" not in chat_template:
        path = Path(chat_template)
        if not path.is_file():
            raise ChatTemplateError(
                f"chat_template {chat_template!r} is neither Jinja text nor a file"
            )
        chat_template = path.read_text(encoding="utf-8")
    source = chat_template or tokenizer.chat_template
    # Command-R's tokenizer has a template for each of its tasks, by name.
    if isinstance(source, dict):
        if "default" not in source:
            raise ChatTemplateError(
                f"the tokenizer has several chat templates ({', '.join(source)}) and none is the "
                "default; set `chat_template` in the recipe to the text of one of them"
            )
        source = source["default"]
    return source or _default_template(tokenizer)


def _default_template(tokenizer: Any) -> str:
    """Return `DEFAULT_TEMPLATE`, after BOS if the tokenizer begins a plain text with BOS.

    Raises ChatTemplateError if the tokenizer has no EOS, which is the default's end of turn.
    """
    if tokenizer.eos_token is None:
        raise ChatTemplateError(
            "the language model's tokenizer has no chat template, and no EOS token to end a turn "
            "of the default template; set `chat_template` in the recipe to Jinja text or to a file "
            "with it"
        )
    # By its effect: most tokenizers that add BOS have no attribute that tells.
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + DEFAULT_TEMPLATE


def _unused_slot(conversation: Conversation) -> str:
    """Return a slot of private-use characters that the conversation's text does not contain."""
    text = "".join(
        part.text for m in conversation.messages for part in m.parts if not isinstance(part, Media)
    )
    slots = (f"\ue000{number}\ue001" for number in itertools.count())
    return next(slot for slot in slots if slot not in text)


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
    """Return the index of the supervised span that holds a token, or None.

    Raises ChatTemplateError for a token that is partly inside of a span.
    """
    # Blanks do not count: tokenizers join a blank to the word after it, and some special tokens
    # (`lstrip`, `rstrip`) include the blanks around them.
    for i, span in enumerate(spans):
        inside = text[max(start, span.start) : min(end, span.end)]
        if inside and not (text[start : span.start] + text[span.end : end]).strip():
            return i
        if inside.strip():
            raise ChatTemplateError(
                f"the token {text[start:end]!r} is partly inside of an assistant turn, so it can "
                "be neither supervised nor masked; set `chat_template` in the recipe to a "
                "template that begins and ends the assistant's text at a special token or a line "
                "break"
            )
    return None
