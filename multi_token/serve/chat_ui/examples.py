"""Example prompts of the chat page: rows of the run's own data.

Only local files are opened, in formats whose rows can be read by number, so a large data set costs
a few rows. A row that cannot be read is left out.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from multi_token.data.files.hub import is_saved_folder
from multi_token.data.formats import to_conversation
from multi_token.data.row_source import open_rows
from multi_token.errors import MultiTokenError
from multi_token.media.errors import undecodable
from multi_token.media.fetch import MIB, Fetch
from multi_token.media.npy import npy_bytes
from multi_token.media.sniff import sniff_kind
from multi_token.modalities.base import Modality
from multi_token.recipe.data import DataSource
from multi_token.recipe.recipe import load_recipe
from multi_token.types import Conversation, Media, Message, Text

LOG = logging.getLogger("multi_token.serve")

_MAX_EXAMPLES = 6
_MAX_ROWS_SCANNED = 32
_MAX_ITEM_BYTES = 4 * MIB
_MAX_ITEMS_BYTES = 32 * MIB
_ITEM_KEYS = {"text", "path", "image", "audio", "video"}
_MAX_JSON_BYTES = 64 * MIB
"""Largest .json file that is opened: it has to be parsed completely for six rows."""


@dataclass(frozen=True)
class Examples:
    """Example rows as the page's JSON, and the bytes of their media items."""

    rows: Sequence[dict[str, Any]] = ()
    items: Sequence[bytes] = field(default=(), repr=False)


def read_examples(folder: Path | None, modalities: Mapping[str, Modality]) -> Examples:
    """Return up to six readable rows of the run in `folder`, held-out rows first."""
    if folder is None or not (folder / "recipe.yaml").is_file():
        return Examples()
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except MultiTokenError as error:
        LOG.warning("no examples on the page: %s", error)
        return Examples()
    sources = [
        _conversations_of(source, modalities, is_held_out, recipe.train.seed)
        for is_held_out, named in ((True, recipe.data.eval), (False, recipe.data.train))
        for source in named
    ]
    rows: list[dict[str, Any]] = []
    items: list[bytes] = []
    seen: set[str] = set()
    # Sources in turn: one row of each, so that the page shows every data set of the run.
    for found in filter(None, chain.from_iterable(zip_longest(*sources))):
        conversation, fetch, is_held_out = found
        try:
            example = _build_example(conversation, modalities, fetch, first=len(items))
        except (MultiTokenError, OSError):
            continue
        if example is None:
            continue
        row, own = example
        # Data sets repeat questions; six cards that look alike would show one example.
        look = "".join(part.get("text", "<>") for part in row["parts"]) + f" -> {row['answer']}"
        if look in seen or sum(map(len, (*items, *own))) > _MAX_ITEMS_BYTES:
            continue
        seen.add(look)
        rows.append({**row, "held_out": is_held_out})
        items += own
        if len(rows) == _MAX_EXAMPLES:
            break
    return Examples(rows, items)


def _conversations_of(
    source: DataSource, modalities: Mapping[str, Modality], is_held_out: bool, seed: int
) -> Iterator[tuple[Conversation, Fetch, bool]]:
    """Yield up to 32 conversations of a source, spread evenly over it."""
    if not _is_indexable(Path(source.rows).expanduser()):
        return
    try:
        opened = open_rows(source, modalities, seed=seed)
    except (MultiTokenError, OSError, ValueError) as error:
        LOG.warning("no examples of %s: %s", source.rows, error)
        return
    rows = opened.rows
    # No URLs: a row of the data set must not make the server send requests.
    fetch = replace(opened.fetch, max_bytes=_MAX_ITEM_BYTES, allow_urls=False)
    num = min(_MAX_ROWS_SCANNED, len(rows))
    for i in range(num):
        try:
            index = i * len(rows) // num
            row = to_conversation(rows[index], modalities, row_id=str(index))
        except MultiTokenError:
            continue
        yield row, fetch, is_held_out


def _is_indexable(path: Path) -> bool:
    """Return True for local data whose rows can be read by number (no hub name, no tar shards)."""
    if path.is_dir():
        return is_saved_folder(path)
    if path.suffix.lower() == ".json":
        return path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES
    return path.is_file() and path.suffix.lower() in (".jsonl", ".parquet")


def _build_example(
    conversation: Conversation, modalities: Mapping[str, Modality], fetch: Fetch, *, first: int
) -> tuple[dict[str, Any], list[bytes]] | None:
    """Build an example and its items, numbered from `first`; None unless it has one user turn."""
    messages, answer = question_of(conversation)
    if [m.role for m in messages] not in (["user"], ["system", "user"]):
        return None
    *systems, user = messages
    parts: list[dict[str, Any]] = []
    items: list[bytes] = []
    for part in user.parts:
        if isinstance(part, Text):
            parts.append({"text": part.text})
            continue
        assert isinstance(part, Media)
        is_text = modalities[part.modality].named_file(part.source) is None
        data = bytes_of(part.source, fetch, is_text=is_text)
        number = first + len(items)
        parts.append({"modality": part.modality, "item": number, "shown": _browser_kind(data)})
        items.append(data)
    system = _text_of(systems) if systems else None
    # The card shows a line or two of the answer.
    return {"system": system, "parts": parts, "answer": answer[:200]}, items


def _text_of(messages: Sequence[Message]) -> str:
    return "".join(part.text for m in messages for part in m.parts if isinstance(part, Text))


def _browser_kind(data: bytes) -> str:
    """Element the browser shows an item with: image, audio, video, or `file`."""
    try:
        kind = sniff_kind(data)
    except MultiTokenError:
        return "file"
    return "file" if kind == "text" else kind


def question_of(conversation: Conversation) -> tuple[tuple[Message, ...], str]:
    """Return the messages up to a row's last answer, and that answer ("" if there is none)."""
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=len(messages))
    return messages[:last], _text_of(messages[last : last + 1])


def bytes_of(source: Any, fetch: Fetch, *, is_text: bool = False) -> bytes:
    """Return the bytes of a row's item.

    Numbers become a `.npy` file, a PIL image a PNG. `is_text`: a string is a text, not a path.
    Raises MediaError where `fetch` cannot read it, and for an item that no single file holds (a
    section of a recording).
    """
    if isinstance(source, Mapping):
        given = {key: value for key, value in source.items() if value is not None}
        # `datasets` keeps an item as its bytes and the path from which they came.
        if "bytes" in given and set(given) <= {"bytes", "path"}:
            return bytes_of(given["bytes"], fetch)
        if len(given) != 1 or not given.keys() <= _ITEM_KEYS:
            raise undecodable(
                f"expected an item that is bytes, a file, a text or numbers, got one with the keys "
                f"{', '.join(map(str, given)) or 'none'}, which no single file holds; leave its "
                "row out"
            )
        ((key, inner),) = given.items()
        return str(inner).encode("utf-8", "replace") if key == "text" else bytes_of(inner, fetch)
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
