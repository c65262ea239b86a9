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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Encoding
from typing_extensions import Self

from multi_token.chat.alignment import CharSpan, ChatMessage
from multi_token.chat.named import named_template, template_names, with_variables
from multi_token.chat.template import ChatTemplate
from multi_token.chat.token_spans import token_spans
from multi_token.errors import ChatTemplateError
from multi_token.types import (
    IGNORE_INDEX,
    Conversation,
    Media,
    MediaSpan,
    Sample,
    TrainOnTurns,
)

if TYPE_CHECKING:
    from multi_token.recipe.model import ModelSpec

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""Template for a tokenizer without one, if the recipe names none (docs/chat-templates.md)."""


_MAX_VARIANTS = 16
"""Formats with other template variables that are kept."""


class ChatFormat:
    """Tokenizer and chat template of a language model.

    No text can forge a media span: the slot token exists only in a private copy of the tokenizer,
    with a spelling that the conversation does not contain. The language model's vocabulary stays
    unchanged; in the ids of a sample, a media span holds an ordinary filler id.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        train_on_turns: TrainOnTurns = "all",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Check tokenizer and template.

        Args:
            tokenizer: A fast tokenizer of transformers, with a pad or an EOS token.
            chat_template: Jinja text, the path of a file with it, or a name of
                `chat/named.py`; else the tokenizer's own.
            train_on_turns: Assistant turns of a conversation that are supervised.
            template_kwargs: Values of the template's variables, such as `enable_thinking`.

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
        self.source: str = _template_source(tokenizer, chat_template)
        self.template_kwargs = dict(template_kwargs or {})
        self.template: str = with_variables(self.source, self.template_kwargs)
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
        self._variants: dict[str, ChatFormat] = {}

    @classmethod
    def from_spec(cls, tokenizer: Any, spec: ModelSpec) -> Self:
        """Return the format of the `model` section of a recipe. Raises ChatTemplateError."""
        return cls(tokenizer, spec.chat_template, spec.train_on_turns, spec.chat_template_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A data worker makes its own copies; a pickled tokenizer is megabytes.
        return {**self.__dict__, "_slot_tokenizers": {}, "_variants": {}}

    def with_kwargs(self, template_kwargs: Mapping[str, Any] | None) -> ChatFormat:
        """Return the format with other values of the template's variables.

        Args:
            template_kwargs: Values over those of this format, such as `{"enable_thinking": False}`.

        Raises:
            ChatTemplateError: For a variable that the template does not have.
        """
        merged = {**self.template_kwargs, **(template_kwargs or {})}
        if merged == self.template_kwargs:
            return self
        key = repr(sorted(merged.items()))
        if key not in self._variants:
            found = ChatFormat(self.tokenizer, self.source, self.train_on_turns, merged)
            found._slot_tokenizers = self._slot_tokenizers  # a copy of the tokenizer is megabytes
            # each request may bring other values
            if len(self._variants) >= _MAX_VARIANTS:
                self._variants.clear()
            self._variants[key] = found
        return self._variants[key]

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
        (sample,) = self.tokenize_many(
            [conversation], [num_tokens], [train_on_turns], prompt_only=prompt_only
        )
        if isinstance(sample, ChatTemplateError):
            raise sample
        return sample

    def tokenize_many(
        self,
        conversations: Sequence[Conversation],
        num_tokens: Sequence[Sequence[int]],
        train_on_turns: Sequence[TrainOnTurns | None],
        *,
        prompt_only: bool = False,
    ) -> list[Sample | ChatTemplateError]:
        """Tokenize conversations together: the samples of `tokenize`, or errors in their place.

        One call of the tokenizer takes all texts. It reads them in threads, unless
        TOKENIZERS_PARALLELISM is false: the command line sets that, since data workers read there.
        """
        encoded = self._encode_many(conversations, num_tokens, train_on_turns, prompt_only)
        return [
            row if isinstance(row, ChatTemplateError) else self._sample(conversation, numbers, row)
            for conversation, numbers, row in zip(conversations, num_tokens, encoded, strict=True)
        ]

    def count_many(
        self,
        conversations: Sequence[Conversation],
        num_tokens: Sequence[Sequence[int]],
        train_on_turns: Sequence[TrainOnTurns | None],
    ) -> list[tuple[int, int] | ChatTemplateError]:
        """Count tokens and supervised tokens of the samples of `tokenize_many`, making none."""
        encoded = self._encode_many(conversations, num_tokens, train_on_turns, prompt_only=False)
        return [
            row
            if isinstance(row, ChatTemplateError)
            else (len(row.ids) + sum(numbers) - len(row.slots), row.num_supervised)
            for numbers, row in zip(num_tokens, encoded, strict=True)
        ]

    def _encode_many(
        self,
        conversations: Sequence[Conversation],
        num_tokens: Sequence[Sequence[int]],
        train_on_turns: Sequence[TrainOnTurns | None],
        prompt_only: bool,
    ) -> list[_Encoded | ChatTemplateError]:
        """Render, tokenize and check conversations; errors in the place of bad ones."""
        found: list[_Rendered | ChatTemplateError] = []
        for conversation, numbers, turns in zip(
            conversations, num_tokens, train_on_turns, strict=True
        ):
            try:
                last_only = (turns or self.train_on_turns) == "last"
                found.append(self._render(conversation, len(numbers), prompt_only, last_only))
            except ChatTemplateError as error:
                found.append(error)
        encoded: list[_Encoded | ChatTemplateError] = [
            one if isinstance(one, ChatTemplateError) else _NOT_ENCODED for one in found
        ]
        # one slot for nearly all rows: others contain its characters in their text
        for slot in dict.fromkeys(one.slot for one in found if isinstance(one, _Rendered)):
            chosen = [
                (i, one)
                for i, one in enumerate(found)
                if isinstance(one, _Rendered) and one.slot == slot
            ]
            slotted, slot_id = self._slot_tokenizer(slot)
            # The template has written BOS itself, where the model wants one.
            encodings = slotted.encode_batch(
                [one.text for _, one in chosen], add_special_tokens=False
            )
            for (i, one), encoding in zip(chosen, encodings, strict=True):
                try:
                    encoded[i] = _Encoded.of(one, encoding, slot_id, prompt_only=prompt_only)
                except ChatTemplateError as error:
                    encoded[i] = error
        if not prompt_only:
            self._check_supervised_texts(found, encoded)
        return encoded

    def _render(
        self, conversation: Conversation, num_items: int, prompt_only: bool, last_only: bool
    ) -> _Rendered:
        """Return the text with slots for media, and its supervised spans (or the prompt's end)."""
        slot = _unused_slot(conversation)
        messages = _to_chat_messages(conversation, slot)
        if prompt_only:
            text, end = self._chat_template.render_prompt(messages)
            spans = [CharSpan(end, len(text))]
        else:
            text, spans = self._chat_template.render_with_spans(messages, last_only=last_only)
        # After a dropped slot, every item would be written at the span of the next one.
        if text.count(slot) != num_items:
            raise ChatTemplateError(
                f"the chat template kept {text.count(slot)} of {num_items} media slots: it "
                "drops or repeats a turn that holds media"
            )
        self._chat_template.check_all_messages_rendered(messages, prompt_only=prompt_only)
        return _Rendered(slot, num_items, text, spans)

    def _sample(
        self, conversation: Conversation, num_tokens: Sequence[int], encoded: _Encoded
    ) -> Sample:
        """Return the sample of a row: each slot replaced by the filler ids of its item."""
        ids = np.array(encoded.ids, np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        for start, end in encoded.spans:
            labels[start:end] = ids[start:end]
        media_spans: list[MediaSpan] = []
        if encoded.slots:
            ids[encoded.slots], labels[encoded.slots] = self.filler_id, IGNORE_INDEX
            counts = np.ones(len(ids), np.int64)
            counts[encoded.slots] = num_tokens
            starts = (np.cumsum(counts) - counts)[encoded.slots]
            media_spans = [
                MediaSpan(item.modality, int(start), int(length))
                for item, start, length in zip(conversation.media, starts, num_tokens, strict=True)
            ]
            ids, labels = np.repeat(ids, counts), np.repeat(labels, counts)
        return Sample(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            media_spans=media_spans,
            id=conversation.id,
        )

    def render(self, conversation: Conversation, *, prompt_only: bool = False) -> str:
        """Render the text of `tokenize`, with `<name>` for each item. Raises ChatTemplateError."""
        rendered = self._render(conversation, len(conversation.media), prompt_only, False)
        end = rendered.spans[0].start if prompt_only else len(rendered.text)
        first, *rest = rendered.text[:end].split(rendered.slot)
        items = zip(conversation.media, rest, strict=True)
        return first + "".join(f"<{item.modality}>{text}" for item, text in items)

    def tokenize_rendered(self, conversation: Conversation, num_tokens: Sequence[int]) -> Sample:
        """Tokenize the parts as they are, without the template; special tokens count as such."""
        slot = _unused_slot(conversation)
        text = "".join(m["content"] for m in _to_chat_messages(conversation, slot))
        slotted, slot_id = self._slot_tokenizer(slot)
        has_bos = text.startswith(self.tokenizer.bos_token or "\0")
        ids = slotted.encode(text, add_special_tokens=not has_bos).ids
        slots = [i for i, one in enumerate(ids) if one == slot_id]
        return self._sample(conversation, num_tokens, _Encoded(ids, slots, []))

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

    def build_slot_tokenizer(self) -> None:
        """Copy the tokenizer now, so that data workers which are forked later share the copy."""
        self._slot_tokenizer(_unused_slot(Conversation(())))

    def _slot_tokenizer(self, slot: str) -> tuple[Any, int]:
        if slot not in self._slot_tokenizers:
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer.add_tokens([AddedToken(slot, special=True, normalized=False)])
            # The backend without transformers' call around it, which copies ids and offsets twice.
            slotted = tokenizer.backend_tokenizer
            slotted.no_padding()
            slotted.no_truncation()
            # It adds no tokens here, but a byte-level one with `trim_offsets` takes blanks out of
            # offsets: a token of blanks would have no characters, and indented code lose labels.
            slotted.post_processor = None
            self._slot_tokenizers[slot] = slotted
        slotted = self._slot_tokenizers[slot]
        return slotted, int(slotted.token_to_id(slot))

    def _check_supervised_texts(
        self,
        rendered: Sequence[_Rendered | ChatTemplateError],
        encoded: list[_Encoded | ChatTemplateError],
    ) -> None:
        """Put an error in place of a row with a span whose ids do not decode to its text."""
        # A wrong loss mask trains without any error, so every row pays for one decode.
        chosen = [
            (i, ids, one.text[span.start : span.end].replace(one.slot, ""))
            for i, (one, row) in enumerate(zip(rendered, encoded, strict=True))
            if isinstance(one, _Rendered) and isinstance(row, _Encoded)
            for span, ids in zip(one.spans, row.supervised_ids(), strict=True)
        ]
        decoder = self.tokenizer.backend_tokenizer  # has no slots, and leaves them out
        decoded = decoder.decode_batch([ids for _, ids, _ in chosen], skip_special_tokens=False)
        for (i, _, expected), text in zip(chosen, decoded, strict=True):
            if text == expected or self._normalize(text) == self._normalize(expected):
                continue
            if isinstance(encoded[i], _Encoded):
                encoded[i] = ChatTemplateError(
                    f"expected to train on {expected[:80]!r}, but the supervised tokens decode to "
                    f"{text[:80]!r}: the tokenizer cannot spell this text; write it in other "
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
        is_file = path.is_file() and chat_template not in template_names()
        chat_template = path.read_text("utf-8") if is_file else named_template(chat_template)
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
            "of the default template; set `chat_template` in the recipe to Jinja text, a file with "
            "it, or a name (docs/chat-templates.md)"
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


@dataclass(frozen=True)
class _Rendered:
    """A rendered conversation: its slot, its text with slots, its supervised spans in the text."""

    slot: str
    num_slots: int
    text: str
    spans: list[CharSpan]


@dataclass(frozen=True)
class _Encoded:
    """Ids of a rendered text, positions of its slots, and tokens [start, end) of each span."""

    ids: list[int]
    slots: list[int]
    spans: list[tuple[int, int]]

    @classmethod
    def of(
        cls, rendered: _Rendered, encoding: Encoding, slot_id: int, *, prompt_only: bool
    ) -> _Encoded:
        """Find slots and spans among the tokens; a prompt ends before its first token in a span.

        Raises ChatTemplateError for a token that is partly inside of a span.
        """
        ids, slots = encoding.ids, list[int]()
        for _ in range(rendered.num_slots):
            slots.append(ids.index(slot_id, slots[-1] + 1 if slots else 0))
        spans = token_spans(encoding, rendered.text, rendered.spans, slots, prompt_only=prompt_only)
        if not prompt_only:
            return cls(ids, slots, spans)
        # at the letter after the prompt, see `render_prompt`; without one, all is prompt
        ends = [start for start, end in spans if end > start]
        return cls(ids[: ends[0] if ends else None], slots, [])

    @property
    def num_supervised(self) -> int:
        """Number of tokens in spans, without slots."""
        num_slots = sum(start <= slot < end for start, end in self.spans for slot in self.slots)
        return sum(end - start for start, end in self.spans) - num_slots

    def supervised_ids(self) -> list[list[int]]:
        """Return the ids of each span, slots included; the language model has no such id."""
        return [self.ids[start:end] for start, end in self.spans]


_NOT_ENCODED = _Encoded([], [], [])
