"""HTTP server: uvicorn with graceful drain and read timeouts.

The first SIGTERM or SIGINT drains: running requests finish, new ones get 503, the exit code is 0.
The second aborts with exit code 1. A server whose engine is given up, since it dies or hangs, exits
with exit code 1. A client that sends its headers or reads its response too slowly loses its
connection.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from multi_token.errors import MultiTokenError
from multi_token.serve.openai.app import build_app
from multi_token.serve.openai.middleware import ABORT

if TYPE_CHECKING:
    from multi_token.serve.service import Service

_FLUSH_TIMEOUT_S = 2.0
"""Time after the shutdown timeout to send the last events of streams."""


class DrainingServer(uvicorn.Server):
    """uvicorn that keeps listening while it drains, so that /ready can report 503."""

    def __init__(self, service: Service, on_started: Callable[[], None] | None = None) -> None:
        """`on_started`: called once, when the server listens."""
        settings = service.settings
        self.service = service
        self._on_started = on_started
        self._drain: Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                build_app(service),
                host=settings.host.strip("[]"),
                port=settings.port,
                http=http_protocol_with_timeouts(
                    settings.header_timeout_s, settings.send_timeout_s
                ),
                ws="none",
                lifespan="on",
                access_log=False,
                server_header=False,
                log_config=None,
                timeout_graceful_shutdown=2,
            )
        )

    @property
    def url(self) -> str:
        """Address of the server; a port of 0 is resolved once it listens."""
        sockets = [s for server in self.servers for s in server.sockets]
        port = sockets[0].getsockname()[1] if sockets else self.config.port
        host = self.config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install our handlers for SIGINT and SIGTERM."""
        # uvicorn raises the signal again after its shutdown, so a drained server would exit with
        # 128 + 15. Supervisors take that for a crash. Here a drained server returns: exit code 0.
        if not _owns_process():
            yield
            return
        kept = {
            sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for sig, handler in kept.items():
                signal.signal(sig, handler)
        if self.service.watchdog.is_stalled:
            # Before the interpreter waits for threads that hang on the device.
            os._exit(1)

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server should exit: uvicorn's reasons, or the watchdog's."""
        return await super().on_tick(counter) or self.service.watchdog.error is not None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, abort at the second."""
        # os._exit: no exit handler runs, since threads of an engine may hang in native code.
        if self._loop is None or self.service.admission.is_draining:
            os._exit(1)
        self.service.admission.drain()
        # asyncio keeps weak references to tasks only, so the server holds this one.
        self._drain = asyncio.run_coroutine_threadsafe(self._drain_and_exit(), self._loop)

    async def startup(self, sockets: Any = None) -> None:
        """Start the service, then listen. `service.start_error` keeps the error of a failure."""
        self._loop = asyncio.get_running_loop()
        log = logging.getLogger("uvicorn.error")
        log.addFilter(self._is_worth_logging)
        try:
            await super().startup(sockets)
        except SystemExit:
            # uvicorn exits when the lifespan fails; the command reports `start_error` instead.
            self.should_exit = True
        finally:
            log.removeFilter(self._is_worth_logging)
        if not self.started:
            return
        if _owns_process():
            # A full garbage collection looks at 400,000 objects of libraries and model: 0.4 s in
            # which no thread runs. From here on it looks at those of requests only.
            gc.collect()
            gc.freeze()
        if self._on_started is not None:
            self._on_started()

    def _is_worth_logging(self, record: logging.LogRecord) -> bool:
        """Drop uvicorn's traceback of an error that the command prints as one sentence."""
        return not isinstance(self.service.start_error, MultiTokenError)

    async def _drain_and_exit(self) -> None:
        await self.service.drain(self.service.settings.shutdown_timeout_s)
        # Requests cut off by the timeout have their error queued; it still has to be sent.
        await self.service.admission.wait_until_empty(_FLUSH_TIMEOUT_S)
        self.should_exit = True


def _owns_process() -> bool:
    """Return True in a process of the server alone, not in a thread of another program."""
    return threading.current_thread() is threading.main_thread()


def http_protocol_with_timeouts(
    header_timeout_s: float, send_timeout_s: float
) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 protocol, closing connections that are slow to send headers or to read.

    uvicorn (0.54) limits neither the time for headers nor the time for a response's last bytes.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            app: Any = self.app

            # The middleware cannot reach the transport; this is its way to abort a connection.
            async def with_abort(scope: Any, receive: Any, send: Any) -> None:
                scope[ABORT] = transport.abort
                await app(scope, receive, send)

            self.app = with_abort
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._drop_if_stuck()

        def _drop_if_stuck(self, num_left_before: int | None = None) -> None:
            """Abort once the unsent bytes have not shrunk for `send_timeout_s`."""
            num_left = self.transport.get_write_buffer_size()
            if num_left and num_left == num_left_before:
                self.transport.abort()
            elif num_left:
                self.loop.call_later(send_timeout_s, self._drop_if_stuck, num_left)

        def _watch(self) -> None:
            """Run one timer from a request's first byte until its headers are complete."""
            # More bytes do not restart the timer, or a client could send a byte a second for ever.
            if self.conn.their_state is not h11.IDLE:
                self._unwatch()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_timeout_s, self._late)

        def _unwatch(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _late(self) -> None:
            self._timer = None
            if not self.transport.is_closing() and self.conn.their_state is h11.IDLE:
                self.transport.close()

    return TimedProtocol
