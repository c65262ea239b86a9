"""Features by key in safetensors files of bounded size, for many readers and writers at once.

FOLDER/features-<id>.safetensors    a shard: tensors by key; memory-mapped when it is read
FOLDER/features-<id>.json           its part of the index, written after it: size and keys
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multi_token.data.feature_cache.keys import KeyTable
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import MIB

_BREAKS = ".breaks"
_PARTIAL = ".partial"
_STALE_SECONDS = 3600
"""No shard takes that long to write: an older unfinished file was left by a writer that died."""
_MAX_OPEN = 256
"""Shards that one process keeps mapped."""

StoredFeatures = tuple[Tensor, Tensor | None]
"""Features [length, dim] of an item, and where its lines end: bool [length] or None."""


class FeatureStore:
    """The features of a folder, by key. Picklable: every process maps the files for itself.

    Each writer makes files of its own, complete before they get their names, so that processes and
    machines may share the folder. What others wrote meanwhile is seen after `refresh`.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 256 * MIB) -> None:
        """`max_bytes`: a shard is written once its features take so many."""
        self.folder = folder
        self.max_bytes = max_bytes
        self.damaged: list[str] = []
        """Faults of shards in the folder, a sentence each; their keys count as missing."""
        self._damaged_names: set[str] = set()
        self._names: list[str] = []
        self._index = KeyTable("i8")
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._pid = os.getpid()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __contains__(self, key: str) -> bool:
        return self._index.get(key) is not None

    def __len__(self) -> int:
        return len(self._index)

    def refresh(self) -> None:
        """Merge the parts of the index that are new, of whoever wrote them."""
        known = {*self._names, *self._damaged_names}
        for part in sorted(self.folder.glob("features-*.json")):
            name = part.stem
            if name in known:
                continue
            try:
                keys, with_breaks = _checked_keys(part)
            except _Damaged as damage:
                self.damaged.append(str(damage))
                self._damaged_names.add(name)
                continue
            self._add(name, keys, with_breaks)

    def read(self, key: str) -> StoredFeatures | None:
        """The features of a key as views of the mapped file, or None. Raises MultiTokenError."""
        number = self._index.get(key)
        if number is None:
            return None
        shard = self._shard(int(number) // 2)
        # not asked of the shard, which would list all its names
        return shard.get_tensor(key), shard.get_tensor(key + _BREAKS) if number % 2 else None

    def write(self, features: Mapping[str, StoredFeatures]) -> None:
        """One more shard, whole or not at all. Raises MultiTokenError (a full disk, no rights)."""
        name = f"features-{uuid.uuid4().hex[:12]}"
        shard = self.folder / f"{name}.safetensors"
        tensors = {key: values for key, (values, _) in features.items()}
        with_breaks = {key: b for key, (_, b) in features.items() if b is not None}
        tensors |= {key + _BREAKS: breaks for key, breaks in with_breaks.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            _write_atomically(shard, lambda path: save_file(tensors, path))
            part = {
                "num_bytes": shard.stat().st_size,
                "keys": list(features),
                "with_breaks": list(with_breaks),
            }
            # last: what an index names is there
            _write_atomically(
                shard.with_suffix(".json"), lambda path: path.write_text(json.dumps(part))
            )
        except (OSError, SafetensorError) as error:
            raise MultiTokenError(
                f"cannot write features to {self.folder}: {error}; what was written before is "
                "kept, so make room there (or name another folder) and start again"
            ) from None
        self._add(name, features, with_breaks)

    def _add(self, name: str, keys: Iterable[str], with_breaks: Collection[str]) -> None:
        for key in keys:
            # the shard and, in the last bit, whether lines end in it
            self._index.add(key, 2 * len(self._names) + (key in with_breaks))
        self._names.append(name)

    def _clean(self) -> None:
        """Remove what is damaged, and what writers that died left unfinished."""
        for name in self._damaged_names:
            for suffix in (".json", ".safetensors"):
                (self.folder / (name + suffix)).unlink(missing_ok=True)
        self._damaged_names.clear()
        for partial in self.folder.glob(f"features-*{_PARTIAL}"):
            try:
                if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                    partial.unlink()
            except FileNotFoundError:  # finished, or removed by another process
                continue

    def _shard(self, number: int) -> Any:
        if self._pid != os.getpid():  # after a fork the handles are the parent's
            self._open, self._pid = OrderedDict(), os.getpid()
        if number not in self._open:
            path = self.folder / f"{self._names[number]}.safetensors"
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise MultiTokenError(
                    f"{path} cannot be read any more: {error}; start again, which encodes its "
                    "items anew"
                ) from None
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


class _Damaged(Exception):
    """A part of the index that cannot be used."""


def _checked_keys(part: Path) -> tuple[list[str], set[str]]:
    """The keys that a part of the index names, and those with line ends, if its shard is whole."""
    shard = part.with_suffix(".safetensors")
    try:
        fields = json.loads(part.read_text())
        stored_bytes, keys = int(fields["num_bytes"]), [str(key) for key in fields["keys"]]
        with_breaks = {str(key) for key in fields["with_breaks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{part.name} is no index of features ({error})") from None
    try:
        found = shard.stat().st_size
        if found != stored_bytes:
            raise _Damaged(
                f"{shard.name} is cut off: {found:,} of {stored_bytes:,} bytes are there"
            )
        safe_open(shard, framework="pt")  # reads the header alone
    except (OSError, SafetensorError) as error:
        raise _Damaged(f"{shard.name} cannot be read ({error})") from None
    return keys, with_breaks


def _write_atomically(path: Path, write: Any) -> None:
    """Write under another name, then rename: nobody ever sees half of a file."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def stored_bytes(stored: StoredFeatures) -> int:
    """Return the bytes of an item on disk, without its name."""
    values, breaks = stored
    return values.nbytes + (0 if breaks is None else breaks.nbytes)


def stored_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` -> the dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
