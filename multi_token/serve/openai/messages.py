"""Messages of a request -> Conversation: content parts become Text or Media.

The part type decides the modality, base64 and numbers are decoded, and nothing is fetched here.
Special tokens in a client's text stay text: `<|im_end|>` in a question ends no turn. The escaper
sends each of them through the chat template as a placeholder, like media, and fills in the ids of
its letters.
"""

from __future__ import annotations

import base64
import binascii
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from multi_token.data.content_parts import modalities_of_kind, openai_item
from multi_token.data.formats import to_conversation
from multi_token.errors import RowError
from multi_token.modalities.base import Modality, OpenAIKind
from multi_token.registry import did_you_mean
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.protocol import (
    CONTENT_PART_MODELS,
    ChatMessage,
    MediaPart,
    TextPart,
    UrlField,
    invalid_field,
    unknown_field_error,
    validate,
)
from multi_token.types import Conversation, Media, Message, Part, Role, Sample, Text

_WEB_SCHEME = re.compile(r"https?://", re.IGNORECASE)
_SOURCE_KEYS = frozenset({"path", "bytes", "array", "text", "url"})
"""Keys of an item that are its source, which `options` of a part must not replace."""
MAX_PARTS = 1024
"""Content parts of a request."""
MAX_CHARACTERS = 1_000_000
"""Characters of a request's texts, if the model's context does not set a lower limit."""
LITERAL = ""
"""Modality of the placeholder of an escaped special token; no instance can have this name."""
SLOT_LETTER = "\ue000"
"""Letter of the chat template's placeholders. It is escaped too: without it in any text, the same
placeholders fit every conversation."""
_MAX_ESCAPED = 4096
"""Special tokens in a request's texts."""


@dataclass(frozen=True)
class MessageParser:
    """Parses the messages of requests to a run."""

    modalities: Mapping[str, Modality]
    """The run's modalities by name; a part goes to the one that has its kind in `openai_kinds`."""
    allow_urls: bool = False
    """True if http(s) URLs are accepted; the pool checks their hosts."""
    max_media: int = 64
    max_messages: int = 1000
    max_characters: int = MAX_CHARACTERS

    @property
    def type_names(self) -> dict[str, str]:
        """Name of each modality -> its registered type."""
        return {name: modality.type for name, modality in self.modalities.items()}

    def parse_messages(self, messages: Sequence[ChatMessage], *, id: str = "") -> Conversation:
        """Parse the messages of a chat request. Raises ServeError (400)."""
        parsed = tuple(self._parse_message(m, f"messages.{i}") for i, m in enumerate(messages))
        return self._check_counts(Conversation(parsed, id=id))

    def parse_row(self, fields: Any, *, id: str = "") -> Conversation:
        """Parse the body of `/generate`: a row of sshh12/multi_token. Raises ServeError (400).

        `{"messages": [{"role": "user", "content": "What is <image>?"}], "images": [...]}` with
        items as `data:` URLs, base64 or lists of numbers.
        """
        if not isinstance(fields, dict):
            raise ServeError(
                'the body should be a JSON object: {"messages": [...], "images": [...]}'
            )
        # An `id` would name the row in error messages, and a client could write anything there.
        fields = {key: value for key, value in fields.items() if key != "id"}
        try:
            row = to_conversation(fields, self.modalities, row_id="request")
        except RowError as error:
            raise invalid_field(error.sentence, "messages", code=None) from None
        messages = tuple(
            Message(m.role, tuple(map(self._parse_legacy_part, m.parts))) for m in row.messages
        )
        return self._check_counts(Conversation(messages, id=id))

    def _check_counts(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        num_characters = sum(
            len(part.text) for m in messages for part in m.parts if isinstance(part, Text)
        )
        counts = (
            ("messages", len(messages), self.max_messages),
            ("media items", len(conversation.media), self.max_media),
            ("content parts", sum(len(m.parts) for m in messages), MAX_PARTS),
            ("characters of text", num_characters, self.max_characters),
        )
        for things, number, limit in counts:
            if number > limit:
                raise invalid_field(
                    f"the request has {number} {things}, and the limit is {limit}", "messages"
                )
        # The generation prompt followed a user message in every training row; after another role a
        # template may raise.
        if messages[-1].role != "user":
            raise invalid_field(
                f"the last message has the role {messages[-1].role}; it must have the role user",
                "messages",
            )
        for index, message in enumerate(messages):
            if message.role != "user" and any(isinstance(p, Media) for p in message.parts):
                raise invalid_field(
                    f"messages.{index} has the role {message.role} and contains media; only user "
                    "messages may contain media",
                    f"messages.{index}.content",
                )
        return conversation

    def _parse_message(self, message: ChatMessage, where: str) -> Message:
        role: Role = "system" if message.role == "developer" else message.role
        # Texts are valid Unicode here: `parse_json` refuses anything else.
        content, at = message.content, f"{where}.content"
        if content is None:
            if role != "assistant":
                raise invalid_field(f"{at} is missing", at, code=None)
            content = ""
        if isinstance(content, str):
            return Message(role, (Text(content),))
        if not content:
            raise invalid_field(f"{at} has no parts", at, code=None)
        return Message(role, tuple(self._parse_part(p, f"{at}.{i}") for i, p in enumerate(content)))

    def _parse_part(self, fields: dict[str, Any], where: str) -> Part:
        type = fields.get("type")
        if not isinstance(type, str):
            raise invalid_field(
                f"{where}.type is missing; {self._part_types()}", f"{where}.type", code=None
            )
        # `<name>_url` names the modality. It comes first: a run may call an instance `image`.
        name = type.removesuffix("_url")
        if name != type and name in self.modalities:
            return Media(name, self._source_of_url(fields, type, where))
        if type not in CONTENT_PART_MODELS:
            raise invalid_field(
                f"unknown content part {type[:40]!r}; {self._part_types()}",
                f"{where}.type",
                code="unknown_part",
            )
        part = validate(CONTENT_PART_MODELS[type], fields, where=where)
        if isinstance(part, TextPart):
            return Text(part.text)
        if isinstance(part, MediaPart):
            return self._parse_media(part, where)
        item = openai_item(fields)
        assert item is not None  # `validate` refuses a part without an address
        at = f"{where}.{type}"
        modality = self._modality_for(item.kind, at)
        return Media(modality, self._resolve_source(item.address, at, item.may_be_base64))

    def _part_types(self) -> str:
        own = [
            f"{name}_url" for name in self.modalities if f"{name}_url" not in CONTENT_PART_MODELS
        ]
        return f"known types: {', '.join([*CONTENT_PART_MODELS, *own])}"

    def _source_of_url(self, fields: dict[str, Any], kind: str, where: str) -> Any:
        extra = [key for key in fields if key not in ("type", kind)]
        if extra:
            raise unknown_field_error(extra[0], ("type", kind), where=f"{where}.{extra[0]}")
        value, at = fields.get(kind), f"{where}.{kind}"
        url = value if isinstance(value, str) else validate(UrlField, value, where=at).url
        return self._resolve_source(url, at)

    def _modality_for(self, kind: OpenAIKind, where: str) -> str:
        """Name of the only modality that takes this kind. Raises ServeError for none or several."""
        fitting = modalities_of_kind(kind, self.modalities)
        if len(fitting) == 1:
            return fitting[0]
        types = self.type_names
        names = ", ".join(f"{name} ({types[name]})" for name in fitting or types) or "none"
        example = (fitting or [*types, "NAME"])[0]
        found = f"several modalities for {kind}: " if fitting else f"no modality for {kind}, only: "
        raise invalid_field(
            f"this model has {found}{names}. Name one: "
            f'{{"type": "media", "modality": "{example}", "data": "<base64>"}}',
            where,
            code="ambiguous_part" if fitting else "unknown_modality",
        )

    def _parse_media(self, part: MediaPart, where: str) -> Media:
        if part.modality not in self.modalities:
            near = did_you_mean(part.modality, self.modalities)
            raise invalid_field(
                f"unknown modality {part.modality[:40]!r}{near}; this model has "
                f"{', '.join(self.modalities) or 'none'}",
                f"{where}.modality",
                code="unknown_modality",
            )
        if (part.data is None) == (part.url is None):
            raise invalid_field("a media part needs either data or url", where, code=None)
        if part.url is not None:
            source = self._resolve_source(part.url, f"{where}.url")
        elif part.format == "text" and isinstance(part.data, str):
            source = part.data.encode()
        else:
            source = self._source_of_data(part.data, f"{where}.data")
        if not part.options:
            return Media(part.modality, source)
        own = _SOURCE_KEYS & part.options.keys()
        if own:
            raise invalid_field(
                f"{where}.options names the source in {sorted(own)[0]!r}; send it as data or url",
                f"{where}.options",
            )
        # Whole numbers arrive as floats: a page is counted.
        options = {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in part.options.items()
        }
        key = (
            "path" if isinstance(source, str) else "bytes" if isinstance(source, bytes) else "array"
        )
        return Media(part.modality, {key: source, **options})

    def _parse_legacy_part(self, part: Part) -> Part:
        if isinstance(part, Text):
            return part
        where = f"{part.modality}s"
        if not isinstance(part.source, (str, list)):
            raise invalid_field(
                f"each item of {where} must be a data: URL, base64 or a list of numbers", where
            )
        return Media(part.modality, self._source_of_data(part.source, where))

    def _source_of_data(self, data: Any, where: str) -> Any:
        if isinstance(data, list):
            return _check_numbers(data, where)
        return self._resolve_source(data, where, may_be_base64=True)

    def _resolve_source(self, address: str, where: str, may_be_base64: bool = False) -> bytes | str:
        """Decode a `data:` URL or base64 to bytes; return an http(s) URL if URLs are allowed.

        Raises ServeError for everything else, such as paths.
        """
        if address[:5].lower() == "data:":
            header, comma, body = address.partition(",")
            if comma and header.lower().endswith(";base64"):
                return _decode_base64(body, where)
        elif _WEB_SCHEME.match(address):
            if not self.allow_urls:
                raise invalid_field(
                    f"{where}: this server fetches no URLs; send a data: URL",
                    where,
                    code="urls_not_allowed",
                )
            return address
        elif may_be_base64 and "://" not in address[:16]:
            return _decode_base64(address, where)
        raise invalid_field(
            f"{where}: expected data:<type>;base64,<data>; the server never reads its own files",
            where,
            code="invalid_address",
        )


def _decode_base64(letters: str, where: str) -> bytes:
    # `base64` of the shell and MIME wrap lines; `validate=True` alone would refuse the line breaks.
    try:
        data = base64.b64decode("".join(letters.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid_field(
            f"{where} is not valid base64; it may be cut off", where, code="invalid_base64"
        ) from None
    if not data:
        raise invalid_field(f"{where} is empty", where, code="empty_media")
    return data


def _check_numbers(numbers: list[Any], where: str) -> list[Any]:
    """Return a list of numbers, or of equally long lists of them. Raises ServeError (400)."""
    # It stays a list, as rows have it: every modality that reads numbers takes lists.
    try:
        array = np.asarray(numbers)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf" or not 1 <= array.ndim <= 2 or not array.size:
        raise invalid_field(
            f"{where}: expected a list of numbers, or of equally long lists of numbers", where
        )
    return numbers


class SpecialTokenEscaper:
    """Keeps the special tokens of one tokenizer from being recognized in a client's text."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.values()
        spellings = {str(token) for token in added if token.special} | {SLOT_LETTER}
        # Longest first, since a pattern takes the first alternative: `<s>` would hide `<s>x`.
        ordered = sorted(filter(None, spellings), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)))
        # A copy with `encode_special_tokens`, which splits `<|im_end|>` into ordinary tokens.
        self._encoder = copy.deepcopy(tokenizer.backend_tokenizer)
        self._encoder.encode_special_tokens = True

    def escape(self, conversation: Conversation) -> Conversation:
        """Replace special tokens in texts by placeholders. Raises ServeError for too many."""
        num_found = 0
        messages = []
        for message in conversation.messages:
            parts: list[Part] = []
            for part in message.parts:
                found = self._escape_text(part.text) if isinstance(part, Text) else [part]
                # Each special token cuts the text once: n placeholders between n + 1 texts.
                num_found += len(found) // 2
                parts += found
            messages.append(Message(message.role, tuple(parts)))
        if num_found > _MAX_ESCAPED:
            raise invalid_field(
                f"the messages contain {num_found} special tokens, and the limit is {_MAX_ESCAPED}",
                "messages",
            )
        return replace(conversation, messages=tuple(messages))

    def is_plain(self, text: str) -> bool:
        """Return True if no special token is in the text."""
        return self._pattern.search(text) is None

    def _escape_text(self, text: str) -> list[Part]:
        parts: list[Part] = []
        end = 0
        for match in self._pattern.finditer(text):
            parts += [Text(text[end : match.start()]), Media(LITERAL, match[0])]
            end = match.end()
        return [*parts, Text(text[end:])] if parts else [Text(text)]

    def letter_ids(self, spelling: str) -> list[int]:
        """Ids of a special token's letters, encoded as ordinary text."""
        return self._encoder.encode(spelling, add_special_tokens=False).ids

    def restore(self, sample: Sample, items: Sequence[Media]) -> Sample:
        """Fill the letters' ids into a tokenized sample and keep the spans of media only.

        `items`: media and placeholders of the escaped conversation, parallel to
        `sample.media_spans`.
        """
        input_ids = sample.input_ids.clone()
        media_spans = []
        for span, item in zip(sample.media_spans, items, strict=True):
            if item.modality == LITERAL:
                # It fits: the placeholder was tokenized as `len(letter_ids)` filler ids.
                letter_ids = torch.tensor(self.letter_ids(item.source), dtype=input_ids.dtype)
                input_ids[span.start : span.start + span.length] = letter_ids
            else:
                media_spans.append(span)
        return replace(sample, input_ids=input_ids, media_spans=media_spans)
