"""The middleware around a small application, in a real uvicorn: keys, hosts, bytes, times."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from multi_token.media.fetch import MIB
from multi_token.serve.media.memory import MediaMemory, parse_bytes
from multi_token.serve.openai.middleware import GuardMiddleware
from multi_token.serve.server import http_protocol_with_timeouts
from multi_token.serve.settings import ServeSettings
from tests.serve.running_server import KEY, RunningServer

pytestmark = pytest.mark.slow

OTHER_KEY = "sk-test-key-2"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Respond with the length of the body; /endless never ends, and /fault raises."""
    message = await receive()
    assert not message["more_body"]
    if scope["path"] == "/fault":
        raise RuntimeError("secret at 0x7f0000 in /home/me")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while scope["path"] == "/endless":
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
    body = json.dumps({"length": len(message["body"]), "path": scope["path"]}).encode()
    await send({"type": "http.response.body", "body": body})


class GuardedServer:
    """The application with its middleware on a free port."""

    def __init__(self, **settings: Any) -> None:
        import uvicorn

        self.statuses: list[int] = []
        found = ServeSettings(**settings)
        self.guard = GuardMiddleware(
            echo, found, MediaMemory(found.media_memory_bytes), on_end=self.statuses.append
        )
        config = uvicorn.Config(
            self.guard,
            port=0,
            http=http_protocol_with_timeouts(found.header_timeout_s, found.send_timeout_s),
            lifespan="off",
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))
        self.thread.start()
        while not self.server.started:
            threading.Event().wait(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def raw(self, request: str) -> bytes:
        """Send these letters, and read until the connection is closed."""
        with self.socket() as connection:
            connection.sendall(request.replace("\n", "\r\n").encode("latin-1"))
            return connection.makefile("rb").read()


@contextmanager
def guarded_server(**settings: Any) -> Iterator[GuardedServer]:
    opened = GuardedServer(**settings)
    try:
        yield opened
    finally:
        opened.server.should_exit = True
        opened.server.force_exit = True
        opened.thread.join(10)


@pytest.fixture(scope="module")
def keyed() -> Iterator[GuardedServer]:
    with guarded_server(api_keys=(KEY, OTHER_KEY)) as opened:
        yield opened


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", [KEY, OTHER_KEY])
def test_each_key_is_accepted(key: str, keyed: GuardedServer) -> None:
    assert httpx.get(f"{keyed.url}/v1/models", headers=bearer(key)).status_code == 200
    assert httpx.get(f"{keyed.url}/x", headers={"Authorization": f"bearer  {key}"}).is_success


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY}, Bearer {OTHER_KEY}"},
        {"Authorization": "Bearer \xe9\xff"},
        {"X-Api-Key": KEY},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "DELETE"])
def test_without_a_valid_key_every_request_gets_401(
    headers: dict[str, str], method: str, keyed: GuardedServer
) -> None:
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = httpx.request(method, f"{keyed.url}/v1/models", headers=encoded)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert answer.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "//v1/models",
        "/v1/../health",
        "/health/",
        "//health",
        "/HEALTH",
        "/health;x",
        "/metrics",
        "/ready",
        "/docs",
        "/openapi.json",
        "/",
        "/healthz",
        "/x?/health",
        "/%2e%2e/health",
    ],
)
def test_only_health_needs_no_key(path: str, keyed: GuardedServer) -> None:
    request = f"GET {path} HTTP/1.1\nHost: x\nConnection: close\n\n"
    assert keyed.raw(request).startswith(b"HTTP/1.1 401")
    assert httpx.get(f"{keyed.url}/health").status_code == 200
    assert httpx.head(f"{keyed.url}/health").status_code == 200


@pytest.mark.parametrize(
    "host", ["x/health?", "127.0.0.1/health?x=", "a.example.", "user@x", "", "x#/health", "health"]
)
def test_the_host_header_does_not_replace_a_key(host: str, keyed: GuardedServer) -> None:
    request = f"GET /v1/models HTTP/1.1\nHost: {host}\nConnection: close\n\n"
    assert keyed.raw(request).startswith((b"HTTP/1.1 401", b"HTTP/1.1 400"))
    absolute = f"GET http://x/health HTTP/1.1\nHost: {host or 'x'}\nConnection: close\n\n"
    assert b"HTTP/1.1 200" not in keyed.raw(absolute)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example:8000", 421),
        ("0x7f000001", 421),
        ("", 421),
    ],
)
def test_without_keys_the_host_of_another_machine_is_refused(host: str, status: int) -> None:
    async def answered() -> int:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/models",
            "headers": [(b"host", host.encode())],
        }
        await GuardMiddleware(echo, ServeSettings(), MediaMemory())(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(answered()) == status


def test_a_public_host_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org"):
        with pytest.raises(ValidationError, match="API key is needed"):
            ServeSettings(host=host)
        ServeSettings(host=host, api_keys=(KEY,))
    for host in ("127.0.0.1", "127.0.0.2", "::1", "[::1]", "localhost"):
        ServeSettings(host=host)


@pytest.mark.parametrize("key", ["short", "with a blank in it", "caf\xe9caf\xe9", ""])
def test_a_weak_key_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="an API key must have"):
        ServeSettings(api_keys=(key,))


def test_keys_are_not_printed() -> None:
    assert KEY not in repr(ServeSettings(api_keys=(KEY,)))


def test_the_bytes_of_a_body_without_length_are_counted() -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536

    with guarded_server(max_body_bytes=100_000) as opened:
        answer = httpx.post(f"{opened.url}/x", content=endless(), timeout=10)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        exact = httpx.post(f"{opened.url}/x", content=b"x" * 100_000)
        assert exact.json()["length"] == 100_000
        assert httpx.post(f"{opened.url}/x", content=b"x" * 100_001).status_code == 413
        assert opened.guard.memory.num_bytes == 0


@pytest.mark.parametrize("length", ["1" * 30, "100001", "99999999999999999999"])
def test_an_announced_length_over_the_limit_is_refused_at_once(length: str) -> None:
    with guarded_server(max_body_bytes=100_000) as opened:
        request = f"POST /x HTTP/1.1\nHost: localhost\nContent-Length: {length}\n\n"
        assert b"413" in opened.raw(request)[:20] or b"400" in opened.raw(request)[:20]


def test_memory_for_the_largest_body_is_needed_and_the_error_says_how_much() -> None:
    ServeSettings(media_memory_bytes=1513 * MIB)
    with pytest.raises(ValidationError, match="raise --media-memory-mb to 1513"):
        ServeSettings(media_memory_bytes=1512 * MIB)


def test_a_slow_body_times_out() -> None:
    with guarded_server(body_timeout_s=0.3) as opened, opened.socket() as connection:
        connection.sendall(b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n")
        began = time.monotonic()
        connection.sendall(b"x")
        answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - began < 5


def test_slow_headers_time_out() -> None:
    with guarded_server(header_timeout_s=0.3) as opened:
        for start in (b"", b"GET /x HTTP/1.1\r\nHost: localhost\r\nX-A: "):
            with opened.socket() as connection:
                connection.sendall(start)
                assert connection.makefile("rb").read() == b""
        # the second request of a connection has the same limit
        with opened.socket() as connection:
            connection.sendall(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"\r\n0\r\n\r\n"):
                answer += connection.recv(4096)
            connection.sendall(b"GET /")
            began = time.monotonic()
            assert b"HTTP/1.1 " not in connection.makefile("rb").read()
            assert time.monotonic() - began < 4  # uvicorn's own limit between requests is 5 s
        assert httpx.get(f"{opened.url}/x").status_code == 200


def test_a_response_that_the_client_does_not_read_is_aborted() -> None:
    with guarded_server(send_timeout_s=0.3) as opened, opened.socket() as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        waiting = threading.Event()
        for _ in range(1000):
            if opened.statuses:
                break
            waiting.wait(0.01)
        assert opened.statuses == [200]
        # aborted: after a close the connection would stay until the client has read the rest
        assert not opened.server.server_state.connections


@contextmanager
def full_of_bodies(size: int, **settings: Any) -> Iterator[tuple[GuardedServer, list[Any]]]:
    """A server whose memory for bodies of this size is full; all of them have arrived in part."""
    least = 8 * parse_bytes(size, 1)
    num_bodies = least // 2 // size
    fields = {"max_body_bytes": size, "max_json_values": 1, "media_memory_bytes": least, **settings}
    held: list[socket.socket] = []
    with guarded_server(**fields) as opened:
        try:
            for _ in range(num_bodies):
                held.append(opened.socket())
                held[-1].sendall(head_of(size) + b"x" * 100_000)
            while opened.guard.memory.num_bytes < num_bodies * size:
                threading.Event().wait(0.005)
            yield opened, held
        finally:
            for connection in held:
                connection.close()


def head_of(size: int) -> bytes:
    return f"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n".encode()


def test_bodies_wait_for_memory_and_small_ones_do_not() -> None:
    with full_of_bodies(200_000) as (opened, held):
        memory = opened.guard.memory
        answers: list[httpx.Response] = []
        body = b"x" * 200_000
        waits = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{opened.url}/x", content=body, timeout=30))
        )
        waits.start()
        while not memory.num_waiting:
            threading.Event().wait(0.005)
        assert httpx.post(f"{opened.url}/x", content=b"x" * 60_000).json()["length"] == 60_000
        assert not answers and memory.num_bytes == len(held) * len(body)
        held[0].close()
        waits.join(30)
        assert answers[0].json()["length"] == len(body)
        # what arrives in chunks has no length, so it takes the largest one until it has arrived
        held[1].close()
        chunks = (b"x" * 50_000 for _ in range(3))
        assert httpx.post(f"{opened.url}/x", content=chunks).json()["length"] == 150_000


def test_a_chunked_body_takes_the_largest_memory_whatever_length_it_announces() -> None:
    with guarded_server(max_body_bytes=200_000) as opened, opened.socket() as client:
        head = head_of(1).replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(head + b"186A0\r\n" + b"x" * 70_000)
        while not opened.guard.memory.num_bytes:
            threading.Event().wait(0.005)
        assert opened.guard.memory.num_bytes == 200_000


def test_paths_without_a_key_take_small_bodies_only(keyed: GuardedServer) -> None:
    large = httpx.post(f"{keyed.url}/health", content=b"x" * 70_000)
    assert large.status_code == 413 and "65536" in large.json()["error"]["message"]
    assert httpx.post(f"{keyed.url}/health", content=b"x" * 60_000).json()["length"] == 60_000


def test_a_body_that_waits_too_long_for_memory_gets_a_429() -> None:
    with full_of_bodies(200_000, memory_wait_s=0.1) as (opened, held):
        answer = httpx.post(f"{opened.url}/x", content=b"x" * 200_000)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "bodies_too_large"
        assert opened.guard.memory.num_waiting == 0
        held[0].close()
        while opened.guard.memory.num_bytes == len(held) * 200_000:
            threading.Event().wait(0.005)
        assert httpx.post(f"{opened.url}/x", content=b"x" * 200_000).status_code == 200


@pytest.mark.parametrize("status", [408, 413, 429])
def test_a_client_that_still_sends_a_refused_body_reads_the_response(status: int) -> None:
    """The body is larger than all buffers between the two, so it is sent only if it is read."""
    size = 32 * 2**20
    with ExitStack() as stack:
        if status == 429:
            opened, _ = stack.enter_context(full_of_bodies(size, memory_wait_s=0.1))
        else:
            settings = {"max_body_bytes": size // 4} if status == 413 else {"body_timeout_s": 2}
            opened = stack.enter_context(guarded_server(**settings))
        client = stack.enter_context(opened.socket())
        body = b"x" * size
        if status == 408:
            client.sendall(head_of(size) + b"x")
            client.recv(1, socket.MSG_PEEK)  # until the server has refused the body
            client.sendall(body[1:])
        else:
            client.sendall(head_of(size) + body)  # it reads nothing before that
        answer = client.makefile("rb").read()
    assert answer.startswith(f"HTTP/1.1 {status}".encode())
    assert b"connection: close" in answer


def test_an_exception_of_a_route_becomes_a_500_without_its_text(
    keyed: GuardedServer, caplog: pytest.LogCaptureFixture
) -> None:
    answer = httpx.post(f"{keyed.url}/fault", headers=bearer(KEY) | {"X-Request-Id": "mine-7"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["message"] == "internal server error" and error["error_id"] == "mine-7"
    assert answer.headers["x-should-retry"] == "false"
    assert any("mine-7" in record.getMessage() and record.exc_info for record in caplog.records)


def test_a_request_id_with_other_characters_is_replaced(keyed: GuardedServer) -> None:
    def named(given: str) -> str:
        answer = httpx.get(f"{keyed.url}/x", headers=bearer(KEY) | {"X-Request-Id": given})
        return answer.headers["x-request-id"]

    assert named("abc-1_2") == "abc-1_2"
    assert named("a b").startswith("req-") and named("x" * 65).startswith("req-")


def test_the_log_has_one_line_per_request_without_content(
    running_server: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = {
        "messages": [{"role": "user", "content": "a very private matter"}],
        "max_tokens": 2,
        "user": "alice",
    }
    with caplog.at_level("INFO", logger="multi_token.serve"):
        answer = httpx.post(
            f"{running_server.url}/v1/chat/completions", json=body, headers=bearer(KEY)
        )
        assert answer.status_code == 200
        named = answer.headers["x-request-id"]

        def lines() -> list[Any]:
            return [record for record in caplog.records if named in record.getMessage()]

        assert running_server.wait_until(lambda: bool(lines()))
    (record,) = lines()
    line = json.loads(record.getMessage())
    assert line["route"] == "/v1/chat/completions" and line["status"] == 200
    assert line["id"] == named
    assert line["completion_tokens"] == 2 and line["media"] == {}
    text = record.getMessage()
    assert "private" not in text and "alice" not in text and KEY not in text


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_website_cannot_send_a_request_by_a_form(kind: str, http: httpx.Client) -> None:
    answer = http.post(
        "/v1/chat/completions", content=b'{"messages": []}', headers={"Content-Type": kind}
    )
    assert answer.status_code == 415
    options = http.options("/v1/chat/completions", headers={"Origin": "https://evil.example"})
    assert options.status_code == 405
    assert "access-control-allow-origin" not in options.headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/page", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("HEAD", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/health/%2e%2e/v1/models", 404),
    ],
)
def test_unknown_routes_get_the_same_error_object(
    method: str, path: str, status: int, http: httpx.Client
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    if method != "HEAD":
        error = answer.json()["error"]
        assert error["type"] in ("invalid_request_error", "not_found_error")
        assert "passwd" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"messages": ' + b"[" * 5000, b"\x00\xff", b"1" * 9999]
)
def test_a_body_that_is_not_a_request_is_refused(body: bytes, http: httpx.Client) -> None:
    for path in ("/v1/chat/completions", "/generate"):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
