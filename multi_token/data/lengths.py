"""How long rows are, remembered in a folder, so that a second look at them opens no media."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from multi_token import __version__
from multi_token.data.feature_cache.keys import KeyTable, settings_fingerprint
from multi_token.data.formats import to_conversation
from multi_token.data.rows import Row
from multi_token.errors import MultiTokenError, RowError
from multi_token.media.hashing import content_bytes, digest
from multi_token.types import Conversation, Media

if TYPE_CHECKING:
    from multi_token.media.fetch import Fetch
    from multi_token.processor import MultiTokenProcessor

_FIELDS = ("num_tokens", "num_supervised", "num_media")
_BY_HEADER = "by_header"
"""A file holds it whose lengths were told by headers."""
_NOT_LENGTHS = frozenset(("chat", "modalities", "fetch", "cache", "lengths_only", "row_id"))
"""Fields of a reader that are looked at otherwise, or that lengths do not hang on."""
_APART = 30.0
"""Seconds between two savings while rows are read."""


@dataclass(frozen=True)
class Length:
    """Length of one good row: all tokens, supervised tokens, media tokens."""

    num_tokens: int
    num_supervised: int
    num_media: int


class LengthStore:
    """Lengths of good rows in a folder, which any number of processes may fill at once.

    A row is known by its content, by size and time of change of the local files that it names, and
    by how it is read (`processor_fingerprint`). What changed is read again, and so is each bad row:
    it may
    have been fixed. An address counts as its text, so that what lies there is not looked at again.
    Lengths that headers told are kept apart: only a reader that asks headers too knows them, since
    nobody has seen those rows to be good.
    """

    def __init__(self, folder: str | os.PathLike[str], processor: MultiTokenProcessor) -> None:
        """Raises MultiTokenError for a file in the folder that is damaged."""
        self.folder = Path(folder)
        self.names = tuple(processor.modalities)
        self.fetch = processor.fetch
        self.identity = processor_fingerprint(processor)
        self.lengths_only = processor.lengths_only
        self._table = KeyTable([(name, "i4") for name in _FIELDS])
        self._new: dict[str, Length] = {}
        self._file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        self._saved = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        return len(self._table)

    def refresh(self) -> None:
        """Also know what other processes have saved since."""
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found = load_file(path)
                keys, lengths = found["keys"], found["lengths"]
                if _BY_HEADER in found and not self.lengths_only:
                    continue
            except (SafetensorError, KeyError) as error:
                raise MultiTokenError(
                    f"{path} is damaged ({error}); remove it: its rows are then read once more"
                ) from error
            for key, length in zip(keys, lengths.tolist(), strict=True):
                self._table.add(key.tobytes().hex(), tuple(length))

    def key(self, row: Row, row_id: str) -> str | None:
        """Return the key of a row's length; None for a row without a stable key."""
        try:
            conversation = to_conversation(row, self.names, row_id=row_id)
        except RowError:
            return None
        turns = self._turns(conversation)
        if turns is None:
            return None
        text = json.dumps(turns, ensure_ascii=False)
        return digest(self.identity.encode(), text.encode("utf-8", "surrogatepass"))

    def _turns(self, conversation: Conversation) -> list[Any] | None:
        turns: list[Any] = []
        for message in conversation.messages:
            parts: list[Any] = []
            for part in message.parts:
                if not isinstance(part, Media):
                    parts.append(part.text)
                    continue
                mark = _source_stamp(part.source, self.fetch)
                if mark is None:
                    return None
                parts.append([part.modality, mark, part.media_text])
            turns.append([message.role, parts])
        if conversation.rejected is None:
            return turns
        others = self._turns(conversation.rejected)
        return None if others is None else [*turns, others]

    def get(self, key: str) -> Length | None:
        """The length of a row, if it is known."""
        found = self._table.get(key)
        return None if found is None else Length(*map(int, found))

    def add(self, key: str, length: Length) -> None:
        """Know a length from now on; saved from time to time, and by `save`."""
        if self._table.get(key) is not None:
            return
        self._table.add(key, astuple(length))
        self._new[key] = length
        if time.monotonic() - self._saved > _APART:
            self.save()

    def save(self) -> None:
        """Write the lengths of this process to a file of its own, atomically."""
        self._saved = time.monotonic()
        if not self._new:
            return
        keys = b"".join(map(bytes.fromhex, self._new))
        arrays = {
            "keys": np.frombuffer(keys, np.uint8).reshape(len(self._new), -1),
            "lengths": np.array([astuple(length) for length in self._new.values()], np.int32),
        }
        if self.lengths_only:
            arrays[_BY_HEADER] = np.ones(1, np.uint8)
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".unfinished")
        save_file(arrays, unfinished)
        unfinished.replace(self._file)

    def finish(self, share: int, num_shares: int, *, of: str) -> bool:
        """Save, and say that a share is done; returns whether all shares now are.

        `of`: what is shared out, in words; the last one wipes the marks out again.
        """
        self.save()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = digest(self.identity.encode(), of.encode())
        marks = [self.folder / f"{name}-{i}-of-{num_shares}.done" for i in range(num_shares)]
        marks[share].touch()
        if not all(mark.exists() for mark in marks):
            return False
        for mark in marks:
            mark.unlink(missing_ok=True)
        return True


def processor_fingerprint(processor: MultiTokenProcessor) -> str:
    """Digest of everything but the row that lengths depend on: 32 hexadecimal digits.

    Tokenizer, template, which turns are learned, settings of each modality with its projector and
    the small files of its encoder's folder, limits, and the version of this package.
    """
    tokenizer = json.loads(processor.chat.tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # of the last call, not of the tokenizer
        tokenizer.pop(passing, None)
    settings: dict[str, Any] = {
        "version": __version__,
        "tokenizer": tokenizer,
        "template": processor.chat.template,
        "train_on_turns": processor.chat.train_on_turns,
        "modalities": {name: settings_fingerprint(m) for name, m in processor.modalities.items()},
    }
    for field in fields(processor):
        if field.name not in _NOT_LENGTHS:
            settings[field.name] = getattr(processor, field.name)
    return digest(json.dumps(settings, sort_keys=True).encode())


def _source_stamp(source: Any, fetch: Fetch) -> Any:
    """Words and numbers that change when what is behind a source does; None if there are none."""
    if isinstance(source, (str, os.PathLike)):
        return [
            os.fspath(source) if isinstance(source, os.PathLike) else source,
            *_file(source, fetch),
        ]
    if isinstance(source, (bytes, bytearray, memoryview)):
        return digest(bytes(source))
    if isinstance(source, (Image.Image, np.ndarray, Tensor)):
        return digest(content_bytes(source, fetch))
    if isinstance(source, (bool, int, float)):
        return repr(source)
    if isinstance(source, Mapping):
        pairs = sorted((str(key), value) for key, value in source.items() if value is not None)
        marks: list[Any] = [[key, _source_stamp(value, fetch)] for key, value in pairs]
        return None if any(mark is None for _, mark in marks) else marks
    if isinstance(source, (list, tuple)):
        try:
            return digest(content_bytes(np.asarray(source, dtype=np.float64), fetch))
        except (TypeError, ValueError):
            each = [None if value is None else _source_stamp(value, fetch) for value in source]
            return None if None in each else each
    return None


def _file(source: Any, fetch: Fetch) -> list[Any]:
    """Path, size and time of change of the local file that a source names, if it does."""
    path = fetch.local_path(source)
    try:
        found = None if path is None else path.stat()
    except (OSError, ValueError):  # no such file, or a text too long for a name
        return []
    return [] if found is None else [str(path), found.st_size, found.st_mtime_ns]
