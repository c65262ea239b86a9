"""Special tokens that somebody's text spells stay text: `<|im_end|>` in a question ends no turn.

Border: cuts texts and fills ids in; what is rendered around them is format.py's. A spelled token
goes
through the template as a slot, as media do, and is filled with the ids of its letters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from multi_token.serve.errors import ServeError
from multi_token.types import Conversation, Media, Message, Part, Sample, Text

LITERAL = ""
"""The modality of a part that stands for its own letters; no instance can be called so."""
SLOT_LETTER = "\ue000"
"""Slots are spelled with it: where no text holds it, one spelling does for every conversation."""
_MAX_ESCAPED = 4096


class SpecialTokenEscaper:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        spellings = {str(token) for token in added if token.special} | {SLOT_LETTER}
        # longest first: of `<s>` and `<s>x` the longer one is meant
        ordered = sorted(filter(None, spellings), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)))
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._encoder.encode_special_tokens = True

    def escape(self, conversation: Conversation) -> Conversation:
        """The conversation with its spelled special tokens as parts of their own."""
        num_found = 0
        messages = []
        for message in conversation.messages:
            parts: list[Part] = []
            for part in message.parts:
                found = self._escape_text(part.text) if isinstance(part, Text) else [part]
                num_found += len(found) // 2
                parts += found
            messages.append(Message(message.role, tuple(parts)))
        if num_found > _MAX_ESCAPED:
            raise ServeError(
                f"the messages spell {num_found} special tokens, and the limit is {_MAX_ESCAPED}",
                param="messages",
                code="invalid_value",
            )
        return replace(conversation, messages=tuple(messages))

    def _escape_text(self, text: str) -> list[Part]:
        parts: list[Part] = []
        end = 0
        for match in self._pattern.finditer(text):
            parts += [Text(text[end : match.start()]), Media(LITERAL, match[0])]
            end = match.end()
        return [*parts, Text(text[end:])] if parts else [Text(text)]

    def letter_ids(self, spelling: str) -> list[int]:
        """What the letters of a special token are, as any other letters."""
        return self._encoder.encode(spelling, add_special_tokens=False).ids

    def restore(self, sample: Sample, items: Sequence[Media]) -> Sample:
        """A tokenized sample -> the same with the letters' ids in, and places of true media only.

        `items`: all slots of the conversation, in reading order, parallel to `sample.media_spans`.
        """
        input_ids = sample.input_ids.clone()
        places = []
        for place, item in zip(sample.media_spans, items, strict=True):
            if item.modality == LITERAL:
                spelled = torch.tensor(self.letter_ids(item.source), dtype=input_ids.dtype)
                input_ids[place.start : place.start + place.length] = spelled
            else:
                places.append(place)
        return replace(sample, input_ids=input_ids, media_spans=places)
