"""Lengths of rows, stored in a folder, so that a second scan opens no media."""

from __future__ import annotations

import json
import os
import time
import uuid
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from multi_token import __version__
from multi_token.checkpoint.atomic import save_arrays
from multi_token.data.feature_cache.keys import KeyTable, settings_fingerprint
from multi_token.data.formats import to_conversation
from multi_token.data.rows import Row
from multi_token.errors import MediaError, MultiTokenError, RowError
from multi_token.media.hashing import NoStamp, digest, source_stamp
from multi_token.types import Conversation, Length, Media, Part

if TYPE_CHECKING:
    from multi_token.processor import MultiTokenProcessor

_BY_HEADER = "by_header"
"""Key in a file whose lengths are header lengths."""
_NOT_LENGTHS = frozenset(
    ("chat", "modalities", "fetch", "cache", "lengths_only", "row_id", "_seen", "once", "hub")
)
"""Fields of a processor that are digested separately, or that lengths do not depend on."""
_MAX_NAME = 1024
"""Characters of a source whose stamp is kept; a longer one holds data."""
_MAX_STAMPS = 1 << 16
"""Stamps of files that a process keeps."""
_SAVE_INTERVAL_S = 30.0
"""Time between two saves during a scan: the work that a kill may lose."""


_LENGTH = np.dtype([(name, "i4") for name in Length._fields])


class Lengths(Sequence[Length]):
    """Lengths of rows in one array: a tuple for each of a million rows would take 150 MB."""

    def __init__(self, lengths: Iterable[Length] = ()) -> None:
        self._numbers = array("i")
        for length in lengths:
            self.append(length)

    def append(self, length: Length) -> None:
        """Add the length of a row."""
        self._numbers.extend(length)

    def __len__(self) -> int:
        return len(self._numbers) // len(Length._fields)

    @overload
    def __getitem__(self, index: int) -> Length: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Length]: ...
    def __getitem__(self, index: int | slice) -> Length | Sequence[Length]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(len(self))[index] * len(Length._fields)
        return Length(*self._numbers[start : start + len(Length._fields)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @property
    def table(self) -> NDArray[np.int64]:
        """All numbers, int64 [rows, 5], in the order of `Length`."""
        return np.array(self._numbers, np.int64).reshape(-1, len(Length._fields))

    def column(self, name: str) -> array[int]:
        """Return one number of each row, by its name in `Length`."""
        return self._numbers[Length._fields.index(name) :: len(Length._fields)]

    @classmethod
    def of_table(cls, table: NDArray[np.int64]) -> Lengths:
        """Return the lengths of such a table."""
        found = cls()
        found._numbers.frombytes(np.ascontiguousarray(table, np.int32).tobytes())
        return found


class LengthStore:
    """Lengths of good rows in a folder that any number of processes may fill at once.

    The key of a row is a digest of its content, size and time of change of the local files that it
    names, and the processor (`processor_fingerprint`). A row that changed is read again, and so is
    each bad row, since it may have been fixed. A URL counts as its text: a changed file there is
    not noticed. Header lengths have files of their own, which only a processor with `lengths_only`
    reads: no process has decoded those rows.
    """

    def __init__(self, folder: str | os.PathLike[str], processor: MultiTokenProcessor) -> None:
        """Raises MultiTokenError for a damaged file in the folder."""
        self.folder = Path(folder)
        self.modalities = processor.modalities
        self.fetch = processor.fetch
        self.identity = processor_fingerprint(processor)
        self.lengths_only = processor.lengths_only
        self._table = KeyTable(_LENGTH)
        self._new_keys, self._new_lengths = bytearray(), array("i")
        self._stamps: dict[str, list[Any]] = {}
        self._file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        self._saved = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        return len(self._table)

    def refresh(self) -> None:
        """Read the lengths that other processes have saved since."""
        new_keys: list[NDArray[np.uint8]] = []
        new_lengths: list[NDArray[np.int32]] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found = load_file(path)
                keys, lengths = found["keys"], found["lengths"]
                # no process has decoded those rows, and a run that decodes must find bad ones
                if _BY_HEADER in found and not self.lengths_only:
                    continue
                # of a version that counted less; its rows are read again
                if lengths.shape[1:] != (len(Length._fields),):
                    continue
            except (SafetensorError, KeyError) as error:
                raise MultiTokenError(
                    f"{path} is damaged ({error}); remove it, and its rows are read again"
                ) from error
            new_keys.append(keys)
            new_lengths.append(lengths)
        if new_keys:
            values = np.concatenate(new_lengths, dtype=np.int32).view(_LENGTH).reshape(-1)
            # at once: each merge sorts the table
            self._table.add_arrays(np.concatenate(new_keys), values)

    def key(self, row: Row, row_id: str) -> str | None:
        """Return the key of a row's length; None for a row without a stable key."""
        try:
            return self.key_of(to_conversation(row, self.modalities, row_id=row_id))
        except RowError:
            # a bad row has no length, and may be fixed before the next start
            return None

    def key_of(self, conversation: Conversation) -> str | None:
        """Return the key of a conversation; None for one without a stable key."""
        try:
            turns = self._turns(conversation)
        except NoStamp:
            return None
        text = json.dumps(turns, ensure_ascii=False)
        # JSON texts may hold halves of UTF-16 pairs, which utf-8 refuses by default
        return digest(self.identity.encode(), text.encode("utf-8", "surrogatepass"))

    def first_item_of(self, conversation: Conversation) -> str:
        """Digest of modality and source of the first item of a row with a key; "" for no item."""
        for item in conversation.media[:1]:
            stamp = json.dumps(self._source_stamp(item.source)).encode()
            return digest(item.modality.encode(), stamp)
        return ""

    def _turns(self, conversation: Conversation) -> list[Any]:
        turns: list[Any] = [
            [message.role, [self._part(part) for part in message.parts]]
            for message in conversation.messages
        ]
        other = conversation.rejected
        return turns if other is None else [*turns, self._turns(other)]

    def _part(self, part: Part) -> Any:
        if not isinstance(part, Media):
            return part.text
        return [part.modality, self._source_stamp(part.source), part.media_text]

    def _source_stamp(self, source: Any) -> Any:
        try:
            return self._known_stamp(source)
        except MediaError as error:  # of an address of another machine; reading the row names it
            raise NoStamp from error

    def _known_stamp(self, source: Any) -> Any:
        if not isinstance(source, str) or len(source) > _MAX_NAME:
            return source_stamp(source, self.fetch)
        # many rows may share an image, and a pass over them looks at its file once
        if source not in self._stamps:
            if len(self._stamps) >= _MAX_STAMPS:
                self._stamps.clear()
            self._stamps[source] = source_stamp(source, self.fetch)
        return self._stamps[source]

    def get(self, key: str) -> Length | None:
        """Return the length of a row, or None."""
        found = self._table.get(key)
        return None if found is None else Length(*map(int, found))

    def add(self, key: str, length: Length) -> None:
        """Add a length. It is saved within 30 seconds of further calls, or by `save`."""
        # rows of equal content share a key, and are stored once
        num_before = len(self._table)
        self._table.add(key, length)
        if len(self._table) == num_before:
            return
        self._new_keys += bytes.fromhex(key)
        self._new_lengths.extend(length)
        if time.monotonic() - self._saved > _SAVE_INTERVAL_S:
            self.save()

    def save(self) -> None:
        """Write the lengths of this process to a file of its own, atomically."""
        self._saved = time.monotonic()
        if not self._new_keys:
            return
        # all lengths of this process, in a file of its own: no two writers, so no lock
        lengths = np.array(self._new_lengths, np.int32).reshape(-1, len(Length._fields))
        keys = np.frombuffer(bytes(self._new_keys), np.uint8).reshape(len(lengths), -1)
        arrays = {"keys": keys, "lengths": lengths}
        if self.lengths_only:
            arrays[_BY_HEADER] = np.ones(1, np.uint8)
        save_arrays(arrays, self._file)

    def finish(self, share: int, num_shares: int, *, of: str) -> bool:
        """Save, mark a share as done, and return True if all shares are.

        `of`: name of the rows that are shared. The last share removes the marks.
        """
        self.save()
        # processes of different machines have no connection here, only the folder
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

    It covers tokenizer, template, supervised turns, limits, settings of each modality with its
    projector and the small files of its encoder's folder, and the version of this package.
    """
    tokenizer = json.loads(processor.chat.tokenizer.backend_tokenizer.to_str())
    for passing in ("padding", "truncation"):  # set by the last call
        tokenizer.pop(passing, None)
    settings: dict[str, Any] = {
        # another version may count tokens in another way
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
