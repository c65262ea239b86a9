"""Decoding of untrusted items, and worker processes; for tests of limits and bombs."""

from __future__ import annotations

import re
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from multi_token.errors import MediaError
from multi_token.media.fetch import Fetch
from multi_token.serve.errors import ServeError
from multi_token.serve.media.worker_process import media_error
from multi_token.types import Prepared

MIB = 1024 * 1024
TIMEOUT_S = 2.0
"""Time of an item in the pool of `media/conftest.py`."""
SECRET = "a-secret-of-the-server"
UNTRUSTED = Fetch(max_bytes=8 * MIB, allow_paths=False, allow_urls=False)


def text_of(prepared: Prepared) -> str:
    """The letters that the modality `trial` answers a command with."""
    return bytes(prepared.inputs["values"].tolist()).decode("latin-1")


def prepare(modality: Any, source: Any) -> Prepared:
    return modality.prepare(modality.load(source, UNTRUSTED))


def refusal(modality: Any, source: Any) -> str:
    """The message that a client gets: printable ASCII, no path, no memory address."""
    with pytest.raises(MediaError) as caught:
        prepare(modality, source)
    error = media_error(modality.type, str(caught.value))
    assert isinstance(error, ServeError) and error.status == 400
    message = str(error)
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", message)
    assert "0x" not in message and not re.search(r"(^|\s)\S*/\S", message), message
    return message


@contextmanager
def little_memory(mib: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
        assert peak < mib * MIB, f"{peak / MIB:.1f} MiB"
    finally:
        tracemalloc.stop()


def is_gone(pid: int) -> bool:
    """True if the process ends within ten seconds; a zombie has ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def children(pid: int) -> list[int]:
    """Ids of the processes that a process has started."""
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
