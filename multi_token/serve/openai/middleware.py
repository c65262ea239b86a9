"""ASGI middleware before the routes: API key, Host header, body size, time limits, access log.

The middleware reads the complete body under limits, so every input of a route is bounded.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from multi_token.errors import MultiTokenError
from multi_token.serve.errors import ServeError
from multi_token.serve.media.memory import MediaMemory, RequestMemory
from multi_token.serve.openai.responses import error_body, error_headers
from multi_token.serve.settings import ServeSettings, is_loopback

Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

LOG = logging.getLogger("multi_token.serve")
RECORD = "multi_token.record"
"""Key of a request's `RequestLog` in its ASGI scope."""
ABORT = "multi_token.abort"
"""Key in the ASGI scope of a function that drops the connection and its unsent bytes."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OPEN_PATHS = frozenset({"/health"})
MEMORY = "multi_token.memory"
"""Key of a request's `RequestMemory` in its ASGI scope."""
SMALL_BODY_BYTES = 64 * 1024
"""Bodies up to this size do not wait for memory. They are parsed on the event loop: cheaper than
the switch to a thread."""
_DRAIN_IDLE_S = 1.0
"""Time without a byte after which the rest of a refused body is not waited for."""
_MAX_BODIES_DRAINED = 8
"""Bodies of the largest size that are read and dropped of one that is longer than the limit."""


@dataclass
class RequestLog:
    """Log entry of one request. It holds no content: names, counts and codes only."""

    id: str
    tenant: str = ""
    """Digest of the API key; separates the caches of different keys."""
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    """Token counts, modalities, the code of an error."""

    def refuse(self, error: Exception) -> ServeError:
        """Log an error that ends the request, and return the error that the client gets."""
        if isinstance(error, MultiTokenError):
            if not isinstance(error, ServeError):
                LOG.warning("request %s refused: %s", self.id, type(error).__name__)
                # Modalities and chat templates raise MultiTokenError. Its text may contain paths;
                # ServeError removes them.
                error = ServeError(str(error), param="messages")
            self.fields["code"] = error.code or error.type
            return error
        # A bug of ours: the log has the traceback, the client an error without details.
        LOG.error("request %s failed", self.id, exc_info=error)
        self.fields["code"] = "internal_error"
        return ServeError("internal server error", status=500)


class ClientGone(Exception):
    """The client has disconnected."""


class GuardMiddleware:
    """Check, read and log every request."""

    def __init__(
        self,
        app: Any,
        settings: ServeSettings,
        memory: MediaMemory,
        on_end: Callable[[int], None] | None = None,
        public_paths: Collection[str] = (),
    ) -> None:
        """`memory`: budget of the bodies. `on_end`: called with the status of every request, 0 if
        its client disconnected first. `public_paths`: paths that need no key."""
        self.app = app
        self._public_paths = frozenset(public_paths)
        self._on_end = on_end
        self.settings = settings
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self.memory = memory

    async def __call__(self, scope: Scope, receive: Messages, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        record = RequestLog(given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
        scope[RECORD] = record
        timed_send = _TimedSend(send, record, self.settings, scope.get(ABORT))
        try:
            await self._handle(scope, receive, timed_send)
        except ClientGone:
            record.fields["code"] = "client_gone"
        # Outermost frame: whatever a route raises ends one request only.
        except Exception as error:  # noqa: BLE001
            refused = record.refuse(error)
            # Now, since the rest of a refused body may be read for a minute.
            if MEMORY in scope:
                scope[MEMORY].release()
            if not record.status:
                await timed_send.send_error(refused, receive)
        finally:
            if MEMORY in scope:
                scope[MEMORY].release()
            _log_request(scope, record)
            if self._on_end is not None:
                self._on_end(record.status)

    async def _handle(self, scope: Scope, receive: Messages, timed_send: _TimedSend) -> None:
        record: RequestLog = scope[RECORD]
        # A client without a key may not take memory for a large body.
        limit = SMALL_BODY_BYTES
        if scope["path"] not in _OPEN_PATHS:
            self._check_host(scope)
            if scope["path"] not in self._public_paths:
                record.tenant = self._authenticate(scope)
                limit = self.settings.max_body_bytes
        scope[MEMORY] = RequestMemory(self.memory, record.tenant)
        unread = [await self._read_body(scope, receive, limit)]
        timed_send.is_body_read = True

        async def replay() -> MutableMapping[str, Any]:
            if not unread:
                return await receive()
            # Popped, so it is not kept while its request generates.
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        await self.app(scope, replay, timed_send.send)

    def _check_host(self, scope: Scope) -> None:
        """Raise ServeError (421) for another machine's Host header if no API key is needed."""
        # DNS rebinding: a website whose name resolves to 127.0.0.1 could read answers through the
        # user's browser. Its requests carry the website's name in Host. A key stops it as well.
        if self._digests:
            return
        host = _header(scope, b"host")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        if name != self.settings.host and not is_loopback(name):
            raise ServeError(
                "the Host header does not name this machine; to serve under another name, start "
                "the server with an API key",
                status=421,
                code="wrong_host",
            )

    def _authenticate(self, scope: Scope) -> str:
        """Return the tenant of the request's API key. Raises ServeError (401)."""
        if not self._digests:
            return ""
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        # Digests of equal length, and no early exit: the time must not tell how much of a key is
        # right, nor which key.
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ServeError(
                "missing or invalid API key; send the header Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
        return digest.hex()[:16]

    async def _read_body(self, scope: Scope, receive: Messages, limit: int) -> bytearray:
        """Read the complete body of at most `limit` bytes; wait for its memory if it is not small.

        Raises ServeError (408, 413, 429) and ClientGone.
        """
        too_long = ServeError(
            f"the body is longer than the limit of {limit} bytes", status=413, code="body_too_large"
        )
        # Content-Length can only refuse early. The bytes are counted below all the same: a chunked
        # body has no such header. 18 digits: int() of a very long string takes quadratic time.
        announced = _header(scope, b"content-length")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            raise too_long
        # The announced length at once, and not as bytes arrive: bodies of which a part has arrived
        # would wait for each other's memory. Beside Transfer-Encoding, which beats it (RFC 9112,
        # 6.3), it is no bound.
        is_chunked = bool(_header(scope, b"transfer-encoding"))
        num_wanted = int(announced) if announced.isdecimal() and not is_chunked else limit
        memory: RequestMemory = scope[MEMORY]
        body = bytearray()
        is_complete = False
        # One deadline for the whole body: a limit per chunk would let a body drip in for ever.
        until = time.monotonic() + self.settings.body_timeout_s
        try:
            while True:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                if len(body) + len(chunk) > limit:
                    raise too_long
                if len(body) <= SMALL_BODY_BYTES < len(body) + len(chunk):
                    began = time.monotonic()
                    await memory.wait_for(memory.body, num_wanted, self.settings.memory_wait_s)
                    until += time.monotonic() - began
                body += chunk
                if not message.get("more_body", False):
                    memory.body.shrink(len(body))
                    is_complete = True
                    return body
        except asyncio.TimeoutError:
            raise ServeError(
                f"the body did not arrive within {self.settings.body_timeout_s:g} s",
                status=408,
                code="body_timeout",
            ) from None
        finally:
            # The error keeps this frame alive while the rest of the body is read.
            if not is_complete:
                body.clear()


@dataclass
class _TimedSend:
    """ASGI `send` with a time limit; records the status and adds headers to every response."""

    asgi_send: Send
    record: RequestLog
    settings: ServeSettings
    abort: Callable[[], None] | None
    is_body_read: bool = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.record.id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        try:
            await asyncio.wait_for(self.asgi_send(message), self.settings.send_timeout_s)
        except asyncio.TimeoutError:
            # Abort, not close: closing flushes the buffer first, which this client does not read.
            if self.abort is not None:
                self.abort()
                await asyncio.sleep(0)
            raise ClientGone from None
        except OSError:
            raise ClientGone from None

    async def send_error(self, error: ServeError, receive: Messages) -> None:
        """Send an error response; the client's disconnect is recorded, not raised."""
        body = error_body(error, self.record.id)
        headers = [*error_headers(error), ("content-length", str(len(body)))]
        is_cut_off = not self.is_body_read and error.status in (408, 413, 429)
        if is_cut_off:
            headers.append(("connection", "close"))
        pairs = [(name.encode(), value.encode()) for name, value in headers]
        try:
            await self.send(
                {"type": "http.response.start", "status": error.status, "headers": pairs}
            )
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            # A socket closed with unread input sends RST, and a client that still sends its body
            # would lose the response: it would retry where it should wait.
            if is_cut_off:
                max_bytes = _MAX_BODIES_DRAINED * self.settings.max_body_bytes
                await _drain(receive, self.settings.body_timeout_s, max_bytes)
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            self.record.fields["code"] = "client_gone"


async def _drain(receive: Messages, max_s: float, max_bytes: int) -> None:
    """Read and drop what a client still sends, up to a time and a number of bytes."""

    async def read_rest() -> None:
        num_bytes, more = 0, True
        while more and num_bytes <= max_bytes:
            message = await asyncio.wait_for(receive(), _DRAIN_IDLE_S)
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read_rest(), max_s)


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _log_request(scope: Scope, record: RequestLog) -> None:
    line = {
        "id": record.id,
        "method": scope["method"],
        # The route's template, never the path: a path holds what the client wrote.
        "route": getattr(scope.get("route"), "path", "other"),
        "status": record.status,
        "seconds": round(time.monotonic() - record.started, 4),
        **({"tenant": record.tenant} if record.tenant else {}),
        **{name: value for name, value in record.fields.items() if value is not None},
    }
    LOG.info("%s", json.dumps(line))
