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
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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


_NO_IDS = torch.empty(0, dtype=torch.long)


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
        found: list[_Rendered | ChatTemplateError] = []
        for conversation, numbers, turns in zip(
            conversations, num_tokens, train_on_turns, strict=True
        ):
            try:
                last_only = (turns or self.train_on_turns) == "last"
                found.append(self._render(conversation, len(numbers), prompt_only, last_only))
            except ChatTemplateError as error:
                found.append(error)
        samples: list[Sample | ChatTemplateError] = [
            one if isinstance(one, ChatTemplateError) else Sample(_NO_IDS, _NO_IDS) for one in found
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
                ids, offsets = encoding.ids, encoding.offsets
                try:
                    tokens = _Tokens.of(one, ids, offsets, slot_id, prompt_only=prompt_only)
                except ChatTemplateError as error:
                    samples[i] = error
                else:
                    samples[i] = self._sample(conversations[i], num_tokens[i], tokens, slot_id)
                    one.supervised = [] if prompt_only else tokens.by_span(len(one.spans))
        self._check_supervised_texts(found, samples)
        return samples

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
        return _Rendered(slot, text, spans)

    def _sample(
        self, conversation: Conversation, num_tokens: Sequence[int], tokens: _Tokens, slot_id: int
    ) -> Sample:
        """Return the sample of a row: each slot replaced by the filler ids of its item."""
        ids, is_slot = tokens.ids, tokens.ids == slot_id
        counts = np.ones(len(ids), np.int64)
        counts[is_slot] = num_tokens
        starts = np.cumsum(counts) - counts
        media_spans = [
            MediaSpan(item.modality, int(start), int(length))
            for item, start, length in zip(
                conversation.media, starts[is_slot], num_tokens, strict=True
            )
        ]
        labels = np.where(tokens.span >= 0, ids, IGNORE_INDEX)
        return Sample(
            input_ids=torch.from_numpy(np.repeat(np.where(is_slot, self.filler_id, ids), counts)),
            labels=torch.from_numpy(np.repeat(labels, counts)),
            media_spans=media_spans,
            id=conversation.id,
        )

    def render(self, conversation: Conversation, *, prompt_only: bool = False) -> str:
        """Render the text that `tokenize` reads, with `<name>` in place of each media item.

        Raises ChatTemplateError as `tokenize` does.
        """
        rendered = self._render(conversation, len(conversation.media), prompt_only, False)
        end = rendered.spans[0].start if prompt_only else len(rendered.text)
        texts = rendered.text[:end].split(rendered.slot)
        names = [f"<{item.modality}>" for item in conversation.media]
        return "".join(chain.from_iterable(zip(texts, [*names, ""], strict=True)))

    def tokenize_rendered(self, conversation: Conversation, num_tokens: Sequence[int]) -> Sample:
        """Tokenize the parts of a conversation as they are, without the template.

        Special tokens in the texts count as such. BOS is added where the tokenizer adds one, unless
        the text begins with it.
        """
        slot = _unused_slot(conversation)
        text = "".join(m["content"] for m in _to_chat_messages(conversation, slot))
        slotted, slot_id = self._slot_tokenizer(slot)
        has_bos = text.startswith(self.tokenizer.bos_token or "\0")
        ids = np.array(slotted.encode(text, add_special_tokens=not has_bos).ids, np.int64)
        return self._sample(conversation, num_tokens, _Tokens(ids, np.full(len(ids), -1)), slot_id)

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
            self._slot_tokenizers[slot] = slotted
        slotted = self._slot_tokenizers[slot]
        return slotted, int(slotted.token_to_id(slot))

    def _check_supervised_texts(
        self,
        rendered: Sequence[_Rendered | ChatTemplateError],
        samples: list[Sample | ChatTemplateError],
    ) -> None:
        """Put an error in place of a sample with a span whose ids do not decode to its text."""
        # A wrong loss mask trains without any error, so every row pays for one decode.
        chosen = [
            (i, ids, one.text[span.start : span.end].replace(one.slot, ""))
            for i, one in enumerate(rendered)
            if isinstance(one, _Rendered)
            for span, ids in zip(one.spans, one.supervised, strict=False)
        ]
        decoder = self.tokenizer.backend_tokenizer
        decoded = decoder.decode_batch([ids for _, ids, _ in chosen], skip_special_tokens=False)
        for (i, _, expected), text in zip(chosen, decoded, strict=True):
            if text == expected or self._normalize(text) == self._normalize(expected):
                continue
            if isinstance(samples[i], Sample):
                samples[i] = ChatTemplateError(
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


@dataclass
class _Rendered:
    """A rendered conversation: its slot, its text with slots, its supervised spans in characters.

    `supervised`: ids of each span, once they are known.
    """

    slot: str
    text: str
    spans: list[CharSpan]
    supervised: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Tokens:
    """Ids of a rendered text, and for each the index of its supervised span, or -1."""

    ids: NDArray[np.int64]
    span: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        rendered: _Rendered,
        ids: list[int],
        offsets: list[tuple[int, int]],
        slot_id: int,
        *,
        prompt_only: bool,
    ) -> _Tokens:
        """Find the span of each token; a prompt ends before its first token in a span.

        Raises ChatTemplateError for a token that is partly inside of a span.
        """
        text, spans = rendered.text, rendered.spans
        ids_array = np.array(ids, np.int64)
        flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
        starts, ends = flat[::2], flat[1::2]
        if not spans:
            return cls(ids_array, np.full(len(ids), -1))
        # spans are in order and disjoint: two searches find the span of any token
        begins = np.array([span.start for span in spans])
        stops = np.array([span.end for span in spans])
        # of the spans that end after a token's start, the first; it holds the token, or cuts it
        at = np.minimum(np.searchsorted(stops, starts, side="right"), len(spans) - 1)
        overlaps = (
            (begins[at] < ends) & (starts < stops[at]) & (starts < ends) & (ids_array != slot_id)
        )
        within = overlaps & (begins[at] <= starts) & (ends <= stops[at])
        owner = np.where(within, at, -1)
        num = len(ids)
        for i in np.flatnonzero(overlaps & ~within).tolist():
            # tokens at a border are few, and each overlaps with few spans
            if prompt_only and (owner[:i] >= 0).any():
                break
            first, end = int(at[i]), int(ends[i])
            last = int(np.searchsorted(begins, end))
            found = _find_span(spans[first:last], int(starts[i]), end, text)
            owner[i] = -1 if found is None else first + found
        if prompt_only and (owner >= 0).any():
            num = int(np.argmax(owner >= 0))  # the letter after the prompt, see `render_prompt`
        return cls(ids_array[:num], owner[:num])

    def by_span(self, num_spans: int) -> list[list[int]]:
        """Return the supervised ids of each span."""
        order = np.argsort(self.span, kind="stable")
        borders = np.searchsorted(self.span[order], np.arange(num_spans))
        return [part.tolist() for part in np.split(self.ids[order], borders)[1:]]


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
