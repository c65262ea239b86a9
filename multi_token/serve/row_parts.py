"""Rows of a data set as a client would send them: messages up to the last answer, items as bytes.

Opens the files that rows name, so it is for the run's own rows, never for a client's request.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.types import Conversation, Message, Text


def question_of(conversation: Conversation) -> tuple[tuple[Message, ...], str]:
    """Return the messages up to a row's last answer, and that answer ("" if there is none)."""
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    answer = "".join(
        part.text for m in messages[last : last + 1] for part in m.parts if isinstance(part, Text)
    )
    return messages[:last], answer


def bytes_of(source: Any, fetch: Fetch, *, is_text: bool = False) -> bytes:
    """Return the bytes of a row's item.

    Numbers become a `.npy` file, a PIL image a PNG. `is_text`: a string is a text, not a path.
    Raises MediaError where `fetch` cannot read it, and for an item that no single file holds (a
    section of a recording).
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
        return _npy(source)
    if is_text and isinstance(source, str):
        return source.encode("utf-8", "replace")
    return fetch.read(source)


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
        f"{', '.join(map(str, given)) or 'none'}, which no single file holds; leave its row out",
        kind="undecodable",
    )


def _npy(numbers: Any) -> bytes:
    try:
        array = np.asarray(numbers, dtype=np.float32)
    except (TypeError, ValueError):
        raise MediaError(
            f"expected a list of numbers, or of equally long ones, got {str(numbers)[:80]!r}",
            kind="undecodable",
        ) from None
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()
