"""The door: key, host, received bytes and time, before anything of a request is looked at.

Border: ASGI and HTTP only; it parses no JSON and knows no route but `/health`, which needs no key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from multi_token.serve.errors import ServeError
from multi_token.serve.openai.responses import error_body, error_headers
from multi_token.serve.settings import ServeSettings

Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOG = logging.getLogger("multi_token.serve")
RECORD = "multi_token.record"
"""Where a request's `Record` is in its ASGI scope."""
ABORT = "multi_token.abort"
"""Where `timed_protocol` puts what drops the connection, with all that was not sent yet."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OPEN_PATHS = frozenset({"/health"})
_MAX_BODIES_BUFFERED = 8
_DRAIN_S = 1.0


@dataclass
class RequestLog:
    """What is written about a request: no content, unless a bug of ours puts it into an error."""

    id: str
    tenant: str = ""
    """Of the key, not the key; separates what is kept for one from another."""
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    """Counts and names: tokens, senses, the code of an error."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class GuardMiddleware:
    """ASGI middleware around everything."""

    def __init__(
        self,
        app: Any,
        settings: ServeSettings,
        on_end: Callable[[int], None] | None = None,
        public_paths: Collection[str] = (),
    ) -> None:
        """`on_end`: told the status of every request; 0 if its client left before. `keyless`: paths
        that need no key, as they hold nothing of anybody."""
        self.app = app
        self._public_paths = frozenset(public_paths)
        self._on_end = on_end
        self.settings = settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._num_buffered_bytes = 0

    async def __call__(self, scope: Scope, receive: Messages, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        record = RequestLog(given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
        scope[RECORD] = record
        timed_send = _TimedSend(send, record, self.settings.send_timeout_s, scope.get(ABORT))
        try:
            await self._handle(scope, receive, timed_send)
        except ClientGone:
            record.fields["code"] = "client_gone"
        except ServeError as error:
            record.fields["code"] = error.code
            await timed_send.send_error(error, receive)
        except Exception as error:  # a fault of ours ends one request, not the server
            record.fields["code"] = "internal_error"
            LOG.error("request %s failed", record.id, exc_info=error)
            if not record.status:
                await timed_send.send_error(
                    ServeError("the server has a fault", status=500), receive
                )
        finally:
            _log_request(scope, record)
            if self._on_end is not None:
                self._on_end(record.status)

    async def _handle(self, scope: Scope, receive: Messages, timed_send: _TimedSend) -> None:
        record: RequestLog = scope[RECORD]
        if scope["path"] not in _OPEN_PATHS:
            self._check_host(scope)
            if scope["path"] not in self._public_paths:
                record.tenant = self._authenticate(scope)
        body = await self._read_body(scope, receive)
        replayed = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal replayed, body
            if replayed:
                return await receive()
            replayed = True
            whole, body = body, b""  # not held for as long as the answer takes
            return {"type": "http.request", "body": whole, "more_body": False}

        await self.app(scope, replay, timed_send.send)

    def _check_host(self, scope: Scope) -> None:
        """Without a key, only requests that name this machine: a page of the web whose name was
        made to lead here (DNS rebinding) could otherwise read answers."""
        if self._digests:
            return
        host = _header(scope, b"host")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        if name not in ("localhost", self.settings.host) and not _is_loopback(name):
            raise ServeError(
                "the Host header should name this machine; to be reached by another name, start "
                "the server with a key",
                status=421,
                code="wrong_host",
            )

    def _authenticate(self, scope: Scope) -> str:
        """Raises ServeError (401) without a right key. Every key is compared, in equal time."""
        if not self._digests:
            return ""
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ServeError(
                "a key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
        return digest.hex()[:16]

    async def _read_body(self, scope: Scope, receive: Messages) -> bytes:
        """All bytes of the body, counted as they come: what a header says of them is no proof."""
        limit = self.settings.max_body_bytes
        too_long = ServeError(
            f"the body is longer than {limit} bytes, the limit", status=413, code="body_too_large"
        )
        announced = _header(scope, b"content-length")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise too_long
        chunks: list[bytes] = []
        num_bytes = 0
        until = time.monotonic() + self.settings.body_timeout_s
        try:
            while True:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                self._num_buffered_bytes += len(chunk)
                if num_bytes > limit:
                    raise too_long
                if self._num_buffered_bytes > _MAX_BODIES_BUFFERED * limit:
                    raise ServeError(
                        "rate limit: too many long requests arrive at once; try again later",
                        status=429,
                        code="bodies_too_large",
                        retry_after=1,
                    )
                chunks.append(chunk)
                if not message.get("more_body", False):
                    return b"".join(chunks)
        except asyncio.TimeoutError:
            raise ServeError(
                f"the body took longer than {self.settings.body_timeout_s:g} s to arrive",
                status=408,
                code="body_timeout",
            ) from None
        finally:
            self._num_buffered_bytes -= num_bytes


class _TimedSend:
    """`send` with a time limit; it notes the status, and adds headers that all answers have."""

    def __init__(
        self, send: Send, record: RequestLog, timeout_s: float, abort: Callable[[], None] | None
    ) -> None:
        self._send = send
        self._record = record
        self._timeout_s = timeout_s
        self._abort = abort

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self._record.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        try:
            await asyncio.wait_for(self._send(message), self._timeout_s)
        except asyncio.TimeoutError:
            if self._abort is not None:
                self._abort()  # closed, it would wait for the client to take what is left
                await asyncio.sleep(0)
            raise ClientGone from None
        except OSError:
            raise ClientGone from None

    async def send_error(self, error: ServeError, receive: Messages) -> None:
        """Answer with an error, and read a little of what still comes: a connection that is closed
        while its client sends would take the answer with it."""
        body = error_body(error, self._record.id)
        headers = [*error_headers(error), ("content-length", str(len(body)))]
        if error.status in (408, 413, 429):
            headers.append(("connection", "close"))
        pairs = [(name.encode(), value.encode()) for name, value in headers]
        try:
            await self.send(
                {"type": "http.response.start", "status": error.status, "headers": pairs}
            )
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            if error.status == 413:
                await _drain(receive)
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            self._record.fields["code"] = "client_gone"


async def _drain(receive: Messages) -> None:
    until = time.monotonic() + _DRAIN_S
    while (left := until - time.monotonic()) > 0:
        try:
            message = await asyncio.wait_for(receive(), left)
        except asyncio.TimeoutError:
            return
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _header(scope: Scope, name: bytes) -> str:
    """The first header of this name, or nothing."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _log_request(scope: Scope, record: RequestLog) -> None:
    """One line of JSON a request."""
    line = {
        "id": record.id,
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", "other"),
        "status": record.status,
        "seconds": round(time.monotonic() - record.started, 4),
        **({"tenant": record.tenant} if record.tenant else {}),
        **{name: value for name, value in record.fields.items() if value is not None},
    }
    LOG.info("%s", json.dumps(line))


def http_protocol_with_timeouts(
    header_timeout_s: float, send_timeout_s: float
) -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, but a connection is dropped whose headers take too long to arrive, or
    whose client takes nothing of what is left to send when it ends."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            app: Any = self.app

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
            num_left = self.transport.get_write_buffer_size()
            if num_left and num_left == num_left_before:
                self.transport.abort()
            elif num_left:
                self.loop.call_later(send_timeout_s, self._drop_if_stuck, num_left)

        def _watch(self) -> None:
            """One timer from a request's first byte to its last header; more bytes move it not."""
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
