"""Example prompts of the chat page: rows of the run's own data that can still be read.

Only files of this machine are opened, and only formats whose rows can be read by their number, so a
large data set costs a few rows. A row that cannot be read is left out.
"""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import MIB, Fetch
from multi_token.media.sniff import sniff_kind
from multi_token.modalities.base import Modality
from multi_token.recipe.recipe import Recipe, load_recipe
from multi_token.types import Conversation, Media, Message, Text

LOG = logging.getLogger("multi_token.serve")

MAX_EXAMPLES = 6
"""Examples that the page shows."""
_MAX_ROWS_SCANNED = 32
_MAX_ITEM_BYTES = 4 * MIB
_MAX_ITEMS_BYTES = 32 * MIB
_MAX_JSON_BYTES = 64 * MIB
"""Largest .json file that is opened: it has to be parsed completely for six rows."""
_SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")
"""Files by which a folder is known as a data set that `datasets` saved."""


@dataclass(frozen=True)
class Examples:
    """Example rows as the page's JSON, and the bytes of their media items."""

    rows: Sequence[dict[str, Any]] = ()
    items: Sequence[bytes] = field(default=(), repr=False)

    @functools.cached_property
    def system(self) -> str | None:
        """The system message, if all examples have the same one."""
        systems = {row["system"] for row in self.rows}
        return systems.pop() if len(systems) == 1 else None


def read_examples(folder: Path | None, modalities: Mapping[str, Modality]) -> Examples:
    """Return up to six readable rows of the run in `folder`, held-out rows first."""
    if folder is None or not (folder / "recipe.yaml").is_file():
        return Examples()
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except MultiTokenError as error:
        LOG.warning("no examples on the page: %s", error)
        return Examples()
    rows: list[dict[str, Any]] = []
    items: list[bytes] = []
    seen: set[str] = set()
    for conversation, fetch, is_held_out in _example_candidates(recipe, modalities):
        messages, answer = question_of(conversation)
        try:
            row, own = _build_example(messages, answer, modalities, fetch, first=len(items))
        except (MultiTokenError, OSError):
            continue
        # Data sets repeat questions; six cards that look alike would show one example.
        if row is None or (look := _appearance(row)) in seen:
            continue
        if sum(map(len, (*items, *own))) > _MAX_ITEMS_BYTES:
            continue
        seen.add(look)
        rows.append({**row, "held_out": is_held_out})
        items += own
        if len(rows) == MAX_EXAMPLES:
            break
    return Examples(rows, items)


def _example_candidates(
    recipe: Recipe, modalities: Mapping[str, Modality]
) -> Iterator[tuple[Conversation, Fetch, bool]]:
    """Yield rows of all sources in turn (conversation, fetch, whether held out)."""
    sources = [
        (_conversations_of(source.rows, source.split, modalities), is_held_out)
        for is_held_out, named in ((True, recipe.data.eval), (False, recipe.data.train))
        for source in named
    ]
    while sources:
        for source in list(sources):
            rows, is_held_out = source
            row = next(rows, None)
            if row is None:
                sources.remove(source)
            else:
                yield *row, is_held_out


def _conversations_of(
    source: str, split: str, modalities: Mapping[str, Modality]
) -> Iterator[tuple[Conversation, Fetch]]:
    """Yield up to 32 conversations of a source, spread evenly over it."""
    if not _is_indexable(Path(source).expanduser()):
        return
    try:
        rows = load_rows(source, split=split)
        fetch = Fetch(root=media_root(source), max_bytes=_MAX_ITEM_BYTES, allow_urls=False)
    except (MultiTokenError, OSError, ValueError) as error:
        LOG.warning("no examples of %s: %s", source, error)
        return
    num = min(_MAX_ROWS_SCANNED, len(rows))
    for i in range(num):
        try:
            index = i * len(rows) // num
            yield to_conversation(rows[index], list(modalities), row_id=str(index)), fetch
        except MultiTokenError:
            continue


def _is_indexable(path: Path) -> bool:
    """Return True for local data whose rows can be read by number (no hub name, no tar shards)."""
    if path.is_dir():
        return any((path / name).is_file() for name in _SAVED_DATASET_FILES)
    if path.suffix.lower() == ".json":
        return path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES
    return path.is_file() and path.suffix.lower() in (".jsonl", ".parquet")


def _build_example(
    messages: Sequence[Message],
    answer: str,
    modalities: Mapping[str, Modality],
    fetch: Fetch,
    *,
    first: int,
) -> tuple[dict[str, Any] | None, list[bytes]]:
    """Build an example and its items, numbered from `first`; None unless it has one user turn."""
    systems = [m for m in messages if m.role == "system"]
    users = [m for m in messages if m.role == "user"]
    if len(users) != 1 or len(systems) > 1 or len(messages) != len(systems) + 1:
        return None, []
    parts: list[dict[str, Any]] = []
    items: list[bytes] = []
    for part in users[0].parts:
        if isinstance(part, Text):
            parts.append({"text": part.text})
            continue
        assert isinstance(part, Media)
        is_text = modalities[part.modality].named_file(part.source) is None
        data = bytes_of(part.source, fetch, is_text=is_text)
        number = first + len(items)
        parts.append({"modality": part.modality, "item": number, "shown": _browser_kind(data)})
        items.append(data)
    system = _text_of(systems[0]) if systems else None
    return {"system": system, "parts": parts, "answer": answer[:200]}, items


def _text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def _appearance(row: Mapping[str, Any]) -> str:
    """Text of an example's card, by which duplicates are found."""
    words = "".join(part.get("text", "<>") for part in row["parts"])
    return f"{words} -> {row['answer']}"


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
