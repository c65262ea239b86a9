"""A media encoder that dies or hangs is seen in /health, and the server ends.

The same of the engine: test_admission.py, and tests/cli/test_serve.py with the exit code.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from multi_token.serve.watchdog import MAX_RESTARTS
from tests.serve.asking import QUESTION, VECTOR, asked, content_of, fault_of, post
from tests.serve.running_server import running

pytestmark = pytest.mark.slow


@contextmanager
def projecting(model: Any, act: Callable[[], None], **settings: Any) -> Iterator[Any]:
    """A server and its client; `act` is called before each projection of vectors."""
    with (
        running(model, media_cache_bytes=0, **settings) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        hook = model.projectors["vector"].register_forward_pre_hook(lambda *_: act())
        try:
            yield server, client
        finally:
            hook.remove()


def ask(client: httpx.Client) -> httpx.Response:
    return post(client, asked(VECTOR, QUESTION), max_tokens=1)


def test_an_encoder_that_dies_is_restarted_and_the_server_given_up_after_some_times(
    served_model: Any,
) -> None:
    lost = threading.Event()

    def fail() -> None:
        if lost.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with projecting(served_model, fail) as (server, client):
        service, loop = server.service, server.server._loop
        embedder = service.prompts.media_embedder
        content_of(ask(client))
        lost.set()
        # no watchdog for a while, or it would start the thread again between two lines
        loop.call_soon_threadsafe(service._watching.cancel)
        for _ in range(2):
            answer = ask(client)
            assert answer.status_code == 503 and fault_of(answer)["code"] == "encoder_failed"
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        watching = asyncio.run_coroutine_threadsafe(service.watchdog.watch(), loop)
        for number in range(MAX_RESTARTS):
            assert server.wait_until(lambda: service.is_healthy)
            if number == 0:
                lost.clear()
                content_of(ask(client))
                assert embedder.num_restarts == 0, "restarts with an item between do not add up"
                lost.set()
                assert ask(client).status_code == 503
                assert server.wait_until(lambda: service.is_healthy)
            assert embedder.num_restarts == number + 1
            assert ask(client).status_code == 503
        watching.result(10)
    assert str(service.watchdog.error).startswith(
        f"the media encoder was restarted {MAX_RESTARTS} times and encoded no item (the device "
        "failed (CUDA error: an illegal memory access"
    )


def test_an_encoder_that_hangs_is_reported_and_the_server_given_up(served_model: Any) -> None:
    go = threading.Event()

    def hang() -> None:
        assert go.wait(60)

    try:
        with projecting(served_model, hang, engine_step_timeout_s=0.5) as (server, client):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{server.url}/v1/chat/completions",
                    json={"messages": asked(VECTOR, QUESTION)},
                    timeout=0.2,
                )
            assert server.wait_until(lambda: not server.service.is_healthy)
            assert client.get("/health").status_code == 503
            assert server.wait_until(lambda: server.service.watchdog.error is not None)
            go.set()
        error = str(server.service.watchdog.error)
        assert error.startswith("the media encoder has made no progress for 1.5 s")
    finally:
        go.set()
