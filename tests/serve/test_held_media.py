"""Media of all requests together stay within the budget, and none outlive their prompt."""

from __future__ import annotations

import gc
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from multi_token.serve.media.memory import Stage, parse_bytes
from multi_token.serve.openai.protocol import ChatRequest
from multi_token.types import Media, Prepared
from tests.serve.asking import asked, content_of, post
from tests.serve.running_server import RunningServer, data_url, png, running

pytestmark = pytest.mark.slow

NUM_REQUESTS, NUM_IMAGES = 40, 4


def prepared_bytes() -> int:
    """Bytes of all encoder inputs in this process, garbage included."""
    # `type`, since `isinstance` asks the class of what a dead weak reference named.
    found = [thing for thing in gc.get_objects() if type(thing) is Prepared]
    return sum(x.nbytes for prepared in found for x in prepared.inputs.values())


def num_alive() -> int:
    """Number of media items and parsed requests in this process, garbage included."""
    return sum(type(thing) in (Media, ChatRequest) for thing in gc.get_objects())


def image(number: int) -> dict[str, Any]:
    colour = (number % 256, number // 256, 7)
    return {"type": "image_url", "image_url": {"url": data_url(png(colour))}}


def test_forty_requests_at_once_hold_no_more_than_the_budget(served_model: Any) -> None:
    settings = {"max_body_bytes": 20_000, "max_json_values": 1_000}
    budget = 8 * parse_bytes(*settings.values())
    go = threading.Event()

    def hold(*_: Any) -> None:
        assert go.wait(60)

    hook = served_model.projectors["image"].register_forward_pre_hook(hold)
    # Garbage of earlier tests may be collected at any time, and would be missed in the counts.
    gc.collect()
    held_before = prepared_bytes()
    try:
        with (
            running(served_model, media_memory_bytes=budget, **settings) as server,
            httpx.Client(base_url=server.url, timeout=120) as client,
            ThreadPoolExecutor(NUM_REQUESTS) as pool,
        ):

            def ask(number: int) -> httpx.Response:
                first = number * NUM_IMAGES
                images = [image(first + i) for i in range(NUM_IMAGES)]
                return post(client, asked(*images, {"type": "text", "text": "x"}), max_tokens=1)

            answers = [pool.submit(ask, number) for number in range(NUM_REQUESTS)]
            memory = server.service.prompts.media_memory
            # No item is embedded, so nothing more is prepared once one waits.
            assert server.wait_until(lambda: memory.num_waiting > 0, seconds=60)
            # A worker's result takes its memory first, and is there a moment later.
            assert server.wait_until(lambda: 2 * (prepared_bytes() - held_before) > budget / 8)
            held = prepared_bytes() - held_before
            assert 2 * held <= budget / 4, "the part of encoder inputs"
            assert memory.num_bytes <= budget
            go.set()
            for answer in answers:
                content_of(answer.result())
            assert server.wait_until(lambda: memory.num_bytes == 0)
            assert server.wait_until(lambda: prepared_bytes() == held_before)
    finally:
        go.set()
        hook.remove()


def test_neither_body_nor_media_are_kept_while_a_request_generates(served_model: Any) -> None:
    forwards = itertools.count()
    is_held, go = threading.Event(), threading.Event()

    def hold(*_: Any, **__: Any) -> None:
        # From the first decode step on, so that the response has begun.
        if next(forwards):
            is_held.set()
            assert go.wait(60)

    with running(served_model) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        large = [
            {"type": "image_url", "image_url": {"url": data_url(png(size=24) + bytes(90_000))}}
        ]
        body = {"messages": asked(*large, {"type": "text", "text": "x"}), "max_tokens": 3}
        gc.collect()
        before = num_alive()
        # After the start, which generates as well.
        hook = served_model.language_model.register_forward_pre_hook(hold, with_kwargs=True)
        try:
            with client.stream(
                "POST", "/v1/chat/completions", json={**body, "stream": True, "ignore_eos": True}
            ) as answer:
                lines = answer.iter_lines()  # without a reference the connection would close
                assert "role" in next(lines)
                assert is_held.wait(60)
                memory = server.service.prompts.media_memory
                # The frames that made the prompt may end a moment later. What is kept stays for as
                # long as the step is held.
                assert server.wait_until(lambda: num_alive() == before)
                assert server.wait_until(lambda: memory.num_bytes == 0)
                assert server.service.admission.num_admitted == 1
                go.set()
        finally:
            go.set()
            hook.remove()


@contextmanager
def nothing_can_be_parsed(model: Any, **settings: Any) -> Iterator[RunningServer]:
    """A server whose memory for parsing bodies is in use."""
    with running(model, **settings) as server:
        memory = server.service.prompts.media_memory
        lease = memory.lease(Stage.PARSE)
        lease.acquire(memory.largest(Stage.PARSE))
        try:
            yield server
        finally:
            lease.release()


LARGE = {"messages": [{"role": "user", "content": "x" * 100_000}]}


@pytest.mark.parametrize(
    ("settings", "headers", "status", "code"),
    [
        ({"memory_wait_s": 0.1}, {}, 429, "bodies_too_large"),
        ({}, {"X-Request-Timeout": "0.1"}, 504, "deadline_exceeded"),
    ],
)
def test_a_body_does_not_wait_for_ever_to_be_parsed(
    served_model: Any, settings: Any, headers: Any, status: int, code: str
) -> None:
    with nothing_can_be_parsed(served_model, **settings) as server:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json=LARGE, headers=headers, timeout=15)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        memory = server.service.prompts.media_memory
        assert memory.num_bytes == memory.largest(Stage.PARSE) and memory.num_waiting == 0


def test_a_client_that_leaves_does_not_wait_to_be_parsed(served_model: Any) -> None:
    with nothing_can_be_parsed(served_model, memory_wait_s=60) as server:
        memory = server.service.prompts.media_memory
        body = json.dumps(LARGE).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode()
                + body
            )
            assert server.wait_until(lambda: memory.num_waiting == 1)
        # First the wait ends, then the memory of the body.
        largest = memory.largest(Stage.PARSE)
        assert server.wait_until(lambda: (memory.num_waiting, memory.num_bytes) == (0, largest))
