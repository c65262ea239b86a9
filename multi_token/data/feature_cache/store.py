"""Features by key in safetensors files of bounded size, for many readers and writers at once.

FOLDER/features-<id>.safetensors    a shard: tensors by key; memory-mapped when it is read
FOLDER/features-<id>.json           its part of the index, written after it: size and keys
FOLDER/sources-<id>.safetensors     keys by source: path, size and time of change of a file, or URL
FOLDER/.features-*, .sources-*      a file that is being written
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from torch import Tensor

from multi_token.checkpoint.atomic import atomic_file
from multi_token.data.feature_cache.keys import KeyTable, hex_digits
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import MIB

# names in files, which older versions wrote as well
_NEWLINES, _WITH_NEWLINES = ".breaks", "with_breaks"
_FACTS = ".facts"
_STALE_SECONDS = 3600
"""No file takes that long to write, or to be seen whole by every machine that shares the folder."""
_MAX_OPEN = 256
"""Shards that one process keeps mapped."""

StoredFeatures = tuple[Tensor, Tensor | None, Tensor | None]
"""Features [length, dim] of an item, bool [length] for its line ends or None, and its facts as
uint8 (modalities/facts.py) or None."""


class FeatureStore:
    """Features of a folder, by key. Picklable: each process maps the files itself.

    Processes and machines may share the folder: each writer writes files of its own, which are
    complete before they get their names. `refresh` reads what other writers added.
    """

    def __init__(self, folder: Path, *, max_bytes: int = 256 * MIB) -> None:
        """`max_bytes`: size of the features at which a shard is written."""
        self.folder = folder
        self.max_bytes = max_bytes
        self.damaged: list[str] = []
        """Faults of files in the folder, as of the last `refresh`. Their keys count as missing."""
        self._removable: set[str] = set()
        self._names: list[str] = []
        self._index = KeyTable("i8")
        self._sources = KeyTable("S32")
        self._source_files: set[str] = set()
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
        """Merge the parts of the index, and the keys by source, that any writer added since.

        Files that could not be read before are tried again.
        """
        self.damaged.clear()
        self._removable.clear()
        known = {*self._names}
        keys: list[NDArray[Any]] = []
        numbers: list[NDArray[np.int64]] = []
        for file in sorted(self.folder.glob("features-*.json")):
            if file.stem in known:
                continue
            try:
                found, with_newlines = _read_part(file)
            except (OSError, _Damaged) as fault:
                # its items are encoded again, which costs less than a run that cannot start
                self._add_fault(file, fault, "its items are encoded again")
                continue
            keys.append(found)
            numbers.append(_number(len(self._names), with_newlines))
            self._names.append(file.stem)
        # at once: each merge sorts the table, and there is a file for each shard
        if keys:
            self._index.add_arrays(np.concatenate(keys), np.concatenate(numbers))
        self._refresh_sources()

    def _refresh_sources(self) -> None:
        sources: list[NDArray[Any]] = []
        keys: list[NDArray[Any]] = []
        for file in sorted(self.folder.glob("sources-*.safetensors")):
            if file.stem in self._source_files:
                continue
            try:
                found = _read_sources(file)
            except (OSError, _Damaged) as fault:
                self._add_fault(file, fault, "its files are read again")
                continue
            self._source_files.add(file.stem)
            sources.append(found[0])
            keys.append(found[1])
        if sources:
            self._sources.add_arrays(np.concatenate(sources), np.concatenate(keys))

    def _add_fault(self, file: Path, fault: OSError | _Damaged, remedy: str) -> None:
        """Note a file that cannot be used. It is removed if it never can be."""
        if isinstance(fault, _Damaged):
            self.damaged.append(f"{fault}; {remedy}")
            if _is_old(file) and _is_old(file.with_suffix(".safetensors")):
                self._removable.add(file.stem)
        else:
            # of this process or the network (too many open files): others may be reading the file
            self.damaged.append(f"{file.name} cannot be read ({fault}); {remedy}")

    @property
    def names(self) -> set[str]:
        """Names of the shards that this process knows."""
        return {*self._names}

    def key_of(self, source: str) -> str | None:
        """Return the key that a source had when its content was last read, or None."""
        found = self._sources.get(source)
        return found if isinstance(found, str) or found is None else found.decode()

    def add_sources(self, keys: Mapping[str, str]) -> None:
        """Store keys by source, in a file of their own. Raises MultiTokenError."""
        name = f"sources-{uuid.uuid4().hex[:12]}"
        arrays = {
            "sources": _as_bytes(keys.keys()),
            "keys": _as_bytes(keys.values()),
        }
        with self._writing(), atomic_file(self.folder / f"{name}.safetensors", sync=True) as path:
            save_arrays(arrays, path)
        self._source_files.add(name)
        for source, key in keys.items():
            self._sources.add(source, key)

    def read(self, key: str, *, with_facts: bool = False) -> StoredFeatures | None:
        """Return the features of a key, mapped from the file, or None. Raises MultiTokenError."""
        number = self._index.get(key)
        if number is None:
            return None
        shard = self._shard(int(number) // 2)
        # the last bit of the number, since asking the shard would list all its names
        newlines = shard.get_tensor(key + _NEWLINES) if number % 2 else None
        facts = None
        if with_facts:
            # no entry in the index, which every process reads completely at its start
            with suppress(SafetensorError):  # an item without facts
                facts = shard.get_tensor(key + _FACTS)
        return shard.get_tensor(key), newlines, facts

    def write(self, features: Mapping[str, StoredFeatures]) -> None:
        """Write a shard atomically. Raises MultiTokenError (a full disk, missing permission)."""
        # a random name: writers on several machines need no lock
        name = f"features-{uuid.uuid4().hex[:12]}"
        shard = self.folder / f"{name}.safetensors"
        tensors = {key: values for key, (values, _, _) in features.items()}
        with_newlines = {key: ends for key, (_, ends, _) in features.items() if ends is not None}
        tensors |= {key + _NEWLINES: ends for key, ends in with_newlines.items()}
        tensors |= {
            key + _FACTS: facts for key, (_, _, facts) in features.items() if facts is not None
        }
        with self._writing():
            # synced: after a power cut, the index must not name a shard that was never on the disk
            with atomic_file(shard, sync=True) as path:
                save_file(tensors, path)
            part = {
                "num_bytes": shard.stat().st_size,
                "keys": list(features),
                _WITH_NEWLINES: list(with_newlines),
            }
            # after the shard, so that a part of the index never names a missing one
            with atomic_file(shard.with_suffix(".json"), sync=True) as path:
                path.write_text(json.dumps(part))
        for key in features:
            self._index.add(key, _number(len(self._names), key in with_newlines))
        self._names.append(name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()
            yield
        except (OSError, SafetensorError) as error:
            raise MultiTokenError(
                f"cannot write features to {self.folder}: {error}; complete shards are kept, so "
                "free disk space there (or name another folder) and start again"
            ) from None

    def _clean(self) -> None:
        """Remove damaged shards, and unfinished files of writers that died."""
        for name in self._removable:
            for suffix in (".json", ".safetensors"):
                (self.folder / (name + suffix)).unlink(missing_ok=True)
        self._removable.clear()
        for pattern in (".features-*", ".sources-*"):
            for partial in self.folder.glob(pattern):
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
                    f"{path} cannot be read any more: {error}; start again, and its items are "
                    "encoded again"
                ) from None
            # each mapped file counts against the limit of open files and of mappings
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


def _number(shard: int, with_newlines: Any) -> Any:
    """Number of a shard and, in the last bit, whether an item has line ends; also of an array."""
    return 2 * shard + with_newlines


def _as_bytes(digests: Collection[str]) -> NDArray[np.uint8]:
    """Digests as hexadecimal digits -> uint8 [digests, 16]."""
    return np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(len(digests), 16)


class _Damaged(Exception):
    """A file whose content cannot be used: half of it, or another one."""


def _is_old(file: Path) -> bool:
    """True if the file is not there, or no writer can still be busy with it."""
    try:
        return time.time() - file.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _read_sources(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return sources, and their keys as hexadecimal digits. Raises _Damaged, OSError."""
    # read here: safetensors reports every failure to open a file as FileNotFoundError
    content = file.read_bytes()
    try:
        arrays = load_arrays(content)
        return arrays["sources"], hex_digits(arrays["keys"])
    except (SafetensorError, KeyError) as error:
        raise _Damaged(f"{file.name} cannot be read ({error})") from None


def _read_part(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a part of the index, and check that its shard is whole.

    Returns the keys [keys, 16], and True for those of items with line ends. Raises _Damaged, and
    OSError for a fault that says nothing of the files.
    """
    shard = file.with_suffix(".safetensors")
    content = file.read_bytes()
    try:
        fields = json.loads(content)
        stored_bytes, keys = int(fields["num_bytes"]), _as_bytes(fields["keys"])
        with_newlines = np.isin(hex_digits(keys), hex_digits(_as_bytes(fields[_WITH_NEWLINES])))
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{file.name} is no index of features ({error})") from None
    try:
        # opened here: safetensors reports every failure to open a file as FileNotFoundError
        with shard.open("rb") as opened:
            found = os.fstat(opened.fileno()).st_size
    except FileNotFoundError as error:
        raise _Damaged(f"{shard.name} cannot be read ({error})") from None
    if found != stored_bytes:
        raise _Damaged(f"{shard.name} is cut off: {found:,} of {stored_bytes:,} bytes are there")
    try:
        safe_open(shard, framework="numpy")  # reads the header alone
    except SafetensorError as error:
        raise _Damaged(f"{shard.name} cannot be read ({error})") from None
    return keys, with_newlines
