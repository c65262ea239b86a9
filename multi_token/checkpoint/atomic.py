"""Writes a file or a folder completely or not at all.

Content goes to a sibling with a temporary name, which is renamed at the end: a reader, or a run
after a crash, sees the old content or the new one. A sibling, because a rename cannot cross file
systems.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from multi_token.errors import ConvertError


@contextmanager
def atomic_file(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` at the end and vanishes on an error.

    `sync`: fsync before the rename, so the content survives a crash of the machine as well.
    """
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.chmod(0o644)  # mkstemp's files are readable by their owner only
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which replaces `path` at the end, vanishes on an error."""
    partial = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are readable by their owner only
        if path.exists():  # a rename replaces an empty folder only
            shutil.rmtree(path)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """As `atomic_folder`; raises ConvertError if there is something at `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConvertError(f"{out} is there already and not empty; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out) as partial:
        yield partial
