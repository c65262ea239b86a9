"""A web site on this machine that counts who comes: a canary for addresses that lead inwards."""

from __future__ import annotations

import gzip
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

CONTENT = b"the bytes of a picture"
MIB = 1024 * 1024


class Canary(BaseHTTPRequestHandler):
    """Answers by path, and notes every request with its headers."""

    hits: list[tuple[str, dict[str, str]]]
    port: int

    def do_GET(self) -> None:
        type(self).hits.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        answer = getattr(self, f"_{re.split('[/?]', self.path)[1]}", None)
        if answer is None:
            self._send(404, b"")
        else:
            answer()

    def _file(self) -> None:
        self._send(200, CONTENT, **{"Set-Cookie": "id=7"})

    def _to(self) -> None:
        self._send(302, b"", Location=unquote(self.path.removeprefix("/to/")))

    def _moved(self) -> None:
        self._send(int(self.path.rpartition("/")[2]), b"", Location="/file")

    def _relative(self) -> None:
        self._send(307, b"", Location="file")

    def _chain(self) -> None:
        left = int(self.path.rpartition("/")[2])
        self._send(302, b"", Location=f"/chain/{left - 1}" if left else "/file")

    def _endless(self) -> None:
        self._begin({})
        self._drip(b"x" * 65_536, 0.0)

    def _drops(self) -> None:
        self._begin({})
        self._drip(b"x", 0.02)

    def _headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self._drip(b"X-A: b\r\n", 0.02)

    def _lies(self) -> None:
        """Announces less than it sends, or more."""
        self._begin({"Content-Length": self.path.rpartition("/")[2]})
        self._drip(b"x" * 1000, 0.0, times=100)

    def _bomb(self) -> None:
        self._send(200, gzip.compress(bytes(30 * MIB)), **{"Content-Encoding": "gzip"})

    def _begin(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def _drip(self, piece: bytes, pause_s: float, times: int = 20_000) -> None:
        gone = threading.Event()
        for _ in range(times):
            try:
                self.wfile.write(piece)
            except OSError:  # the client has had enough, which is the claim
                return
            gone.wait(pause_s)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def canary() -> Iterator[type[Canary]]:
    class Handler(Canary):
        hits: list[tuple[str, dict[str, str]]] = []  # noqa: RUF012 - of this server alone

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Handler.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Handler
    server.shutdown()
    thread.join()
    server.server_close()
