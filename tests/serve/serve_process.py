"""`multi-token serve` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


@contextmanager
def serve_process(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    python: Sequence[str] = ("-m", "multi_token"),
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, its URL, and what it has printed (which grows); `env` is added to ours.

    `python`: what Python runs, in place of the module.
    """
    process = subprocess.Popen(
        [sys.executable, *python, "serve", *arguments, "--port", "0", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(env or {})},
    )
    printed: list[str] = []
    listens = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if "curl " in line:
                listens.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listens.wait(120), "".join(printed)
        url = re.search(r"listens on (\S+);", "".join(printed))
        assert url is not None
        yield process, url[1], printed
    finally:
        process.kill()
        process.wait()
        reader.join(10)
        assert process.stdout is not None
        process.stdout.close()
