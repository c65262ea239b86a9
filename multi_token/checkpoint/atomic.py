"""Writes a file or a folder completely or not at all, and locks a file for one process.

Content goes to a sibling with a temporary name, which is renamed at the end: a reader, or a run
after a crash, sees the old content or the new one. A sibling, because a rename cannot cross file
systems.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from multi_token.errors import ConvertError, MultiTokenError


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` at the end and vanishes on an error.

    `sync`: fsync before the rename, so the content survives a crash of the machine as well.
    """
    partial = _temporary_sibling(path)
    partial.touch(exist_ok=False)
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_arrays(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    """Write arrays as safetensors, with the folders above. Raises MultiTokenError (a full disk)."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            save_file(dict(arrays), partial)
    except (OSError, SafetensorError) as error:
        raise MultiTokenError(
            f"{file} could not be written ({error}); free some space there, and start the same "
            "command again"
        ) from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which replaces `path` at the end, vanishes on an error."""
    partial, old = _temporary_sibling(path), _temporary_sibling(path)
    partial.mkdir()
    try:
        yield partial
        # A rename replaces an empty folder only. The old folder goes after the new one is there: a
        # crash in between leaves it under its temporary name.
        if path.exists():
            path.replace(old)
        partial.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _temporary_sibling(path: Path) -> Path:
    # not by `tempfile`, whose files and folders only their owner may read, whatever the umask
    return path.absolute().parent / f".{path.name}.{uuid4().hex}"


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """As `atomic_folder`; raises ConvertError if there is something at `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} is there already and not empty; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as partial:
        yield partial


def lock_file(file: IO[Any], *, wait: bool = False) -> str | None:
    """Lock an open file until it is closed, or its process ends in any way.

    Returns None, or the reason why the system has no lock for the file. Raises BlockingIOError if
    another process holds the lock; with `wait`, waits for it instead.
    """
    if sys.platform == "win32":
        return "this system has no lockf"
    import fcntl

    try:
        # lockf and not flock: a lock of flock is inherited by forked data workers, which outlive a
        # killed process by some seconds
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        # POSIX allows either for a lock that another process holds
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(*error.args) from None
        return f"{error.strerror or error} (its file system)"
    return None
