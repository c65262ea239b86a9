"""Rows of a data set as what a client would send: messages up to the last answer, items as bytes.

Border: opens the files that rows name, so it is for rows of one's own; nothing of a request comes
here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.media.series import npy_bytes
from multi_token.types import Conversation, Media, Message, Text


def question_of(conversation: Conversation) -> tuple[tuple[Message, ...], str]:
    """The messages up to a row's last answer, and that answer ("" for a row that has none)."""
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    answer = "".join(
        part.text for m in messages[last : last + 1] for part in m.parts if isinstance(part, Text)
    )
    return messages[:last], answer


def bytes_of(source: Any, fetch: Fetch, *, is_text: bool = False) -> bytes:
    """What a row gives for an item, as the bytes that can be sent of it.

    Numbers become a `.npy` file, a picture of PIL a PNG. `is_text`: a string is a text, not a path.
    Raises MediaError where `fetch` cannot read it, and for an item that bytes do not say (a part of
    a sound).
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, fetch)
    if isinstance(source, Image.Image):
        file = io.BytesIO()
        source.save(file, "PNG")
        return file.getvalue()
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, (list, tuple, np.ndarray)):
        return npy_bytes(source)
    if is_text and isinstance(source, str):
        return source.encode("utf-8", "replace")
    return fetch.read(source)


def request_messages(messages: Sequence[Message], fetch: Fetch) -> list[dict[str, Any]]:
    """Messages of a row as those of a request. Raises MediaError as `bytes_of`."""
    return [{"role": m.role, "content": _content(m, fetch)} for m in messages]


def media_part(modality: str, data: bytes) -> dict[str, Any]:
    """A content part for an item of any sense."""
    return {"type": "media", "modality": modality, "data": base64.b64encode(data).decode()}


def _content(message: Message, fetch: Fetch) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, Media) for part in message.parts):
        return "".join(part.text for part in message.parts if isinstance(part, Text))
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else media_part(part.modality, bytes_of(part.source, fetch))
        for part in message.parts
    ]


def _of_mapping(source: Mapping[str, Any], fetch: Fetch) -> bytes:
    given = {key: value for key, value in source.items() if value is not None}
    if set(given) == {"text"}:
        return str(given["text"]).encode("utf-8", "replace")
    if "bytes" in given and set(given) <= {"bytes", "path"}:  # as `datasets` keeps them
        return bytes_of(given["bytes"], fetch)
    if len(given) == 1 and next(iter(given)) in ("path", "image", "audio", "video"):
        return bytes_of(next(iter(given.values())), fetch)
    raise MediaError(
        f"expected an item that is bytes, a file, a text or numbers, got one with the keys "
        f"{', '.join(map(str, given)) or 'none'}, which no single file says; leave its row out",
        kind="undecodable",
    )
