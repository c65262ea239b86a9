"""Messages of a request -> a Conversation: which sense a content part is for, and its bytes.

Border: decodes base64 and numbers, fetches nothing and opens no media. Text becomes `Text` whatever
it spells; only a content part makes a `Media`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from multi_token.data.formats import to_conversation
from multi_token.errors import RowError
from multi_token.media.sniff import FILE_KINDS
from multi_token.modalities.base import Modality, OpenAIKind
from multi_token.registry import did_you_mean
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.protocol import (
    CONTENT_PART_MODELS,
    AudioUrlPart,
    ChatMessage,
    FilePart,
    ImageUrlPart,
    InputAudioPart,
    MediaPart,
    TextPart,
    UrlField,
    VideoUrlPart,
    unknown_field_error,
    validate,
)
from multi_token.types import Conversation, Media, Message, Part, Role, Text

_KIND_OF_SUFFIX: Mapping[str, OpenAIKind] = {
    # the last one wins: `.webm` is listed for audio too, and usually holds a video
    suffix: kind
    for kind in ("image", "audio", "video")
    for suffix in FILE_KINDS[kind].suffixes
}
_WEB_SCHEME = re.compile(r"https?://", re.IGNORECASE)
MAX_PARTS = 1024
MAX_CHARACTERS = 1_000_000
"""Of all texts of a request, where its server has no lower limit."""


@dataclass(frozen=True)
class MessageParser:
    """Reads messages for a run with these senses."""

    modalities: Mapping[str, Modality]
    """The run's modalities by name; their `openai_kinds` decide which part reaches which."""
    allow_urls: bool = False
    """Whether any host is allowed to be fetched from."""
    max_media: int = 64
    max_messages: int = 1000
    max_characters: int = MAX_CHARACTERS

    @property
    def type_names(self) -> dict[str, str]:
        """Name of each modality -> its registered type."""
        return {name: modality.type for name, modality in self.modalities.items()}

    def parse_messages(self, messages: Sequence[ChatMessage], *, id: str = "") -> Conversation:
        """The conversation that is to be answered. Raises ServeError (400)."""
        read = tuple(self._parse_message(m, f"messages.{i}") for i, m in enumerate(messages))
        return self._check_counts(Conversation(read, id=id))

    def parse_row(self, fields: Any, *, id: str = "") -> Conversation:
        """A row as the original's `/generate` takes it; its items are `data:` addresses or base64.

        `{"messages": [{"role": "user", "content": "What is <image>?"}], "images": [...]}`. Raises
        ServeError (400).
        """
        if not isinstance(fields, dict):
            raise ServeError(
                'the body should be a JSON object: {"messages": [...], "images": [...]}'
            )
        try:
            read = to_conversation(
                {k: v for k, v in fields.items() if k != "id"},
                list(self.modalities),
                row_id="request",
            )
        except RowError as error:
            raise ServeError(str(error).removeprefix("row request: "), param="messages") from None
        messages = tuple(
            Message(
                m.role,
                tuple(self._parse_legacy_item(p) if isinstance(p, Media) else p for p in m.parts),
            )
            for m in read.messages
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
        for what, number, limit in counts:
            if number > limit:
                raise ServeError(
                    f"the request has {number} {what}, and the limit is {limit}",
                    param="messages",
                    code="invalid_value",
                )
        if messages[-1].role != "user":
            raise ServeError(
                f"the last message is of the {messages[-1].role}; it should be the user's, which "
                "is answered",
                param="messages",
                code="invalid_value",
            )
        for index, message in enumerate(messages):
            if message.role != "user" and any(isinstance(p, Media) for p in message.parts):
                raise ServeError(
                    f"messages.{index} is of the {message.role} and holds media, which only a "
                    "user's message may",
                    param=f"messages.{index}.content",
                    code="invalid_value",
                )
        return conversation

    def _parse_message(self, message: ChatMessage, where: str) -> Message:
        role: Role = "system" if message.role == "developer" else message.role
        content = message.content
        if content is None:
            if role != "assistant":
                raise ServeError(f"{where}.content is missing", param=f"{where}.content")
            content = ""
        if isinstance(content, str):
            return Message(role, (Text(_check_unicode(content, f"{where}.content")),))
        if not content:
            raise ServeError(f"{where}.content has no parts", param=f"{where}.content")
        parts = (self._parse_part(p, f"{where}.content.{i}") for i, p in enumerate(content))
        return Message(role, tuple(parts))

    def _parse_part(self, fields: dict[str, Any], where: str) -> Part:
        kind = fields.get("type")
        if not isinstance(kind, str):
            raise ServeError(
                f"{where}.type is missing; {self._modality_names()}", param=f"{where}.type"
            )
        name = kind.removesuffix("_url")
        if kind not in CONTENT_PART_MODELS and not (kind != name and name in self.type_names):
            raise ServeError(
                f"unknown content part {kind[:40]!r}; {self._modality_names()}",
                param=f"{where}.type",
                code="unknown_part",
            )
        if name != kind and name in self.type_names:  # the name of an instance says which one it is
            return self._build_media(name, self._media_of_url(fields, kind, where))
        part = validate(CONTENT_PART_MODELS[kind], fields, where=where)
        if isinstance(part, TextPart):
            return Text(_check_unicode(part.text, f"{where}.text"))
        if isinstance(part, ImageUrlPart):
            return self._media_of_kind(
                "image", _address_field(part.image_url), f"{where}.image_url"
            )
        if isinstance(part, AudioUrlPart):
            return self._media_of_kind(
                "audio", _address_field(part.audio_url), f"{where}.audio_url"
            )
        if isinstance(part, VideoUrlPart):
            return self._media_of_kind(
                "video", _address_field(part.video_url), f"{where}.video_url"
            )
        if isinstance(part, InputAudioPart):
            at = f"{where}.input_audio"
            return self._media_of_kind("audio", part.input_audio.data, at, encoded=True)
        if isinstance(part, FilePart):
            address = part.file.file_data
            kind = _file_kind(address, part.file.filename)
            return self._media_of_kind(kind, address, f"{where}.file", encoded=True)
        assert isinstance(part, MediaPart)
        return self._parse_media(part, where)

    def _modality_names(self) -> str:
        own = [
            f"{name}_url" for name in self.type_names if f"{name}_url" not in CONTENT_PART_MODELS
        ]
        return f"there are {', '.join([*CONTENT_PART_MODELS, *own])}"

    def _media_of_url(self, fields: dict[str, Any], kind: str, where: str) -> Any:
        extra = [key for key in fields if key not in ("type", kind)]
        if extra:
            raise unknown_field_error(extra[0], ("type", kind), where=f"{where}.{extra[0]}")
        value = fields.get(kind)
        address = (
            value if isinstance(value, str) else validate(UrlField, value, where=f"{where}.{kind}")
        )
        return self._resolve_source(_address_field(address), f"{where}.{kind}")

    def _media_of_kind(
        self, kind: str, address: str, where: str, *, encoded: bool = False
    ) -> Media:
        return self._build_media(
            self._modality_for(kind, where), self._resolve_source(address, where, encoded)
        )

    def _modality_for(self, kind: str, where: str) -> str:
        """The one sense that reads such a thing. Raises ServeError if there is none, or several."""
        fitting = [name for name, m in self.modalities.items() if kind in m.openai_kinds]
        if len(fitting) == 1:
            return fitting[0]
        names = (
            ", ".join(f"{n} ({self.type_names[n]})" for n in fitting or self.type_names) or "none"
        )
        example = (fitting or [*self.type_names, "NAME"])[0]
        found = "several senses" if fitting else "no sense"
        raise ServeError(
            f"this model has {found} for a part of kind {kind}"
            f"{': ' if fitting else '; its senses are '}{names}. Name one: "
            f'{{"type": "media", "modality": "{example}", "data": "<base64>"}}',
            param=where,
            code="ambiguous_part" if fitting else "no_such_sense",
        )

    def _parse_media(self, part: MediaPart, where: str) -> Media:
        if part.modality not in self.type_names:
            near = did_you_mean(part.modality, self.type_names)
            raise ServeError(
                f"unknown modality {part.modality[:40]!r}{near}; this model has "
                f"{', '.join(self.type_names) or 'none'}",
                param=f"{where}.modality",
                code="no_such_sense",
            )
        if (part.data is None) == (part.url is None):
            raise ServeError("a media part has either data or url", param=where)
        if part.url is not None:
            return self._build_media(part.modality, self._resolve_source(part.url, f"{where}.url"))
        at = f"{where}.data"
        if isinstance(part.data, list):
            return self._build_media(part.modality, _check_numbers(part.data, at))
        assert part.data is not None
        if part.format == "text":
            return self._build_media(part.modality, _check_unicode(part.data, at).encode())
        return self._build_media(part.modality, self._resolve_source(part.data, at, encoded=True))

    def _parse_legacy_item(self, item: Media) -> Media:
        where = f"{item.modality}s"
        source = item.source
        if isinstance(source, str):
            return self._build_media(
                item.modality, self._resolve_source(source, where, encoded=True)
            )
        if isinstance(source, list):
            return self._build_media(item.modality, _check_numbers(source, where))
        raise ServeError(
            f"expected each of {where} to be a data: address, base64 or a list of numbers",
            param=where,
            code="invalid_value",
        )

    def _build_media(self, name: str, source: bytes | str | list[Any]) -> Media:
        return Media(name, source)

    def _resolve_source(self, address: str, where: str, encoded: bool = False) -> bytes | str:
        """The bytes of an address, or the address if it is of the web and such are allowed.

        `encoded`: plain base64 is taken as well. Raises ServeError for everything else, paths
        among them.
        """
        if address[:5].lower() == "data:":
            header, comma, body = address.partition(",")
            if not comma or not header.lower().endswith(";base64"):
                raise _address_error(where)
            return _decode_base64(body, where)
        if _WEB_SCHEME.match(address):
            if not self.allow_urls:
                raise ServeError(
                    f"{where}: this server reads nothing from the web; send a data: address",
                    param=where,
                    code="urls_not_allowed",
                )
            return address
        if not encoded or "://" in address[:16]:
            raise _address_error(where)
        return _decode_base64(address, where)


def _address_error(where: str) -> ServeError:
    return ServeError(
        f"{where}: expected data:<type>;base64,<letters>; files of the server are never read",
        param=where,
        code="invalid_address",
    )


def _address_field(value: UrlField | str) -> str:
    return value if isinstance(value, str) else value.url


def _decode_base64(letters: str, where: str) -> bytes:
    try:
        data = base64.b64decode("".join(letters.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ServeError(
            f"{where} is not base64; check that nothing was cut off",
            param=where,
            code="invalid_base64",
        ) from None
    if not data:
        raise ServeError(f"{where} is empty", param=where, code="empty_media")
    return data


def _check_numbers(numbers: list[Any], where: str) -> list[Any]:
    """Return a list of numbers, or of equally long lists of them. Raises ServeError (400).

    It stays a list, as rows have it: every modality that reads numbers takes lists.
    """
    try:
        array = np.asarray(numbers)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iuf" or not 1 <= array.ndim <= 2 or not array.size:
        raise ServeError(
            f"{where}: expected a list of numbers, or of equally long lists of numbers",
            param=where,
            code="invalid_value",
        )
    return numbers


def _file_kind(address: str, filename: str | None) -> str:
    """What a file is: by the type of its address, else by its name; a document by default."""
    if address[:5].lower() == "data:":
        kind = address[5:64].partition("/")[0].lower()
        if kind in get_args(OpenAIKind):
            return kind
    return _KIND_OF_SUFFIX.get(Path(filename or "").suffix.lower(), "document")


def _check_unicode(text: str, where: str) -> str:
    """Text that is Unicode: half of a surrogate pair cannot be tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ServeError(f"{where} holds half of a surrogate pair", param=where) from None
    return text
