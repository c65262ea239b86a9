"""uvicorn with our signals: the first lets answers end and leaves with 0, the second aborts.

Border: processes and signals; what draining means to requests is the service's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from multi_token.errors import MultiTokenError
from multi_token.serve.openai.app import build_app
from multi_token.serve.openai.middleware import http_protocol_with_timeouts

if TYPE_CHECKING:
    from multi_token.serve.service import Service

_EXIT_ABORTED = 1
"""The exit code after a second signal."""
_FLUSH_TIMEOUT_S = 2.0
"""What remains, behind the shutdown timeout, to write the last events of streams."""


class DrainingServer(uvicorn.Server):
    """Listens until nothing is being answered any more, so that /ready can still say no."""

    def __init__(self, service: Service, on_started: Callable[[], None] | None = None) -> None:
        """`on_started`: called once, when it listens."""
        settings = service.settings
        self.service = service
        self._on_started = on_started
        self._drain: asyncio.Task[None] | None = None
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
        """Where it listens; the port is known once it does."""
        sockets = [s for server in self.servers for s in server.sockets]
        port = sockets[0].getsockname()[1] if sockets else self.config.port
        host = self.config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal is not raised again behind a clean end: that leaves with 0."""
        if threading.current_thread() is not threading.main_thread():
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

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        if self._loop is None or self.service.admission.is_draining:
            os._exit(_EXIT_ABORTED)  # whatever hangs, this does not wait for it
        self.service.admission.drain()
        self._loop.call_soon_threadsafe(self._start_drain)

    async def startup(self, sockets: Any = None) -> None:
        """Load, then listen. Why the service does not start is its `start_error`, not logged."""
        self._loop = asyncio.get_running_loop()
        log = logging.getLogger("uvicorn.error")
        log.addFilter(self._is_worth_logging)
        try:
            await super().startup(sockets)
        except SystemExit:
            # uvicorn's own end of a start that failed, at which nobody could say why any more
            self.should_exit = True
        finally:
            log.removeFilter(self._is_worth_logging)
        if self.started and self._on_started is not None:
            self._on_started()

    def _is_worth_logging(self, record: logging.LogRecord) -> bool:
        """Whether a line of uvicorn's says what its caller is not told anyway."""
        return not isinstance(self.service.start_error, MultiTokenError)

    def _start_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        await self.service.drain(self.service.settings.shutdown_timeout_s)
        # answers that were cut off have been told so; their last events are still to be written
        await self.service.admission.wait_until_empty(_FLUSH_TIMEOUT_S)
        self.should_exit = True
