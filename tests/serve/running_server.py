"""Real servers in a thread, and small media to send them."""

from __future__ import annotations

import asyncio
import base64
import faulthandler
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-test-key-1"


class RunningServer:
    """uvicorn in a thread, with its service."""

    def __init__(self, service: Any) -> None:
        from multi_token.serve.server import DrainingServer

        self.service = service
        self.server = DrainingServer(service, on_started=lambda: self._started.set())
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(60), "the server did not start"
        self.url = self.server.url

    def _run(self) -> None:
        asyncio.run(self.server.serve())

    def stop(self) -> None:
        """End it, and wait."""
        self.server.should_exit = True
        self._thread.join(60)
        if self._thread.is_alive():
            # stacks of all threads say who holds it
            faulthandler.dump_traceback()
            raise AssertionError("the server did not end")

    def wait_until(self, holds: Callable[[], bool], seconds: float = 5.0) -> bool:
        """Return True as soon as a condition of the server holds, False if it does not in time."""
        end = threading.Event()
        for _ in range(int(seconds / 0.01)):
            if holds():
                return True
            end.wait(0.01)
        return False


@contextmanager
def running(model: Any, *, engine: Any = None, **settings: Any) -> Iterator[RunningServer]:
    """A server of a model on a free port, with other settings."""
    from multi_token.serve.service import Service
    from multi_token.serve.settings import ServeSettings

    fields = {"name": "tiny-run", "port": 0, "num_workers": 1, **settings}
    server = RunningServer(Service(model, ServeSettings(**fields), engine=engine))
    try:
        yield server
    finally:
        server.stop()


def png(colour: tuple[int, int, int] = (220, 30, 30), size: int = 24) -> bytes:
    """An image of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def npy(*values: float) -> bytes:
    """A vector as a `.npy` file."""
    file = io.BytesIO()
    np.save(file, np.asarray(values, dtype=np.float32))
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Bytes as a `data:` URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def b64(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()
