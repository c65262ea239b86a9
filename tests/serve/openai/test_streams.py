"""Streams: the order of events, clients that disconnect, and requests over their deadline."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from tests.serve.asking import (
    IMAGE,
    NUM_TOKENS,
    QUESTION,
    asked,
    content_of,
    events_of,
    fault_of,
    post,
)
from tests.serve.running_server import KEY, RunningServer

pytestmark = pytest.mark.slow


def test_the_openai_client_reads_a_stream(openai_client: Any, http: httpx.Client) -> None:
    stream = openai_client.chat.completions.create(
        model="tiny-run",
        messages=asked(IMAGE, QUESTION),
        max_tokens=NUM_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == content_of(post(http, asked(IMAGE, QUESTION)))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == NUM_TOKENS
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"


def test_a_stream_has_openais_order(http: httpx.Client) -> None:
    answer = post(http, asked("one two"), stream=True, stream_options={"include_usage": True})
    *chunks, done = events_of(answer)
    assert done == "[DONE]"
    first, *rest, end, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in rest)
    assert all(c["choices"][0]["finish_reason"] is None for c in [first, *rest])
    assert end["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == NUM_TOKENS
    assert all(c["usage"] is None for c in [first, *rest, end])
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1


def test_a_stream_without_usage_has_no_usage(http: httpx.Client) -> None:
    *chunks, _ = events_of(post(http, asked("one two"), stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_the_choices_of_a_stream_have_their_indices(http: httpx.Client) -> None:
    *chunks, _ = events_of(post(http, asked("Which?"), stream=True, n=2, seed=1))
    whole = post(http, asked("Which?"), n=2, seed=1).json()
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_streamed_logprobs_are_those_of_a_complete_response(http: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 1}
    *chunks, _ = events_of(post(http, asked("one two"), stream=True, **fields))
    streamed = [
        entry
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    whole = post(http, asked("one two"), **fields).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole]


def test_a_client_that_leaves_a_stream_frees_its_slot(
    running_server: RunningServer, http: httpx.Client
) -> None:
    body = {"messages": asked("x"), "max_tokens": 480, "ignore_eos": True, "stream": True}
    engine, admission = running_server.service.engine, running_server.service.admission
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()  # without a reference the connection would close
        assert next(lines).startswith("data: ")
        # A request of an earlier test may end a moment after its client has left.
        assert running_server.wait_until(lambda: admission.num_admitted == engine.num_running == 1)
    assert running_server.wait_until(
        lambda: admission.num_admitted == 0 and engine.num_running == 0, seconds=1.0
    )


def test_a_client_that_leaves_while_it_waits_frees_its_slot(
    running_server: RunningServer, server: str
) -> None:
    engine, admission = running_server.service.engine, running_server.service.admission
    body = {"messages": asked("x"), "max_tokens": 480, "ignore_eos": True}

    def impatient() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server}/v1/chat/completions",
                json=body,
                headers={"Authorization": f"Bearer {KEY}"},
                timeout=0.2,
            )

    client = threading.Thread(target=impatient)
    client.start()
    assert running_server.wait_until(lambda: admission.num_admitted == 1)
    client.join()
    assert running_server.wait_until(
        lambda: admission.num_admitted == 0 and engine.num_running == 0, seconds=1.0
    )


def test_a_request_over_its_deadline_is_a_504_without_retry(http: httpx.Client) -> None:
    body = {"messages": asked("x"), "max_tokens": 480, "ignore_eos": True}
    late = {"X-Request-Timeout": "0.15"}
    answer = http.post("/v1/chat/completions", json=body, headers=late)
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    assert fault_of(answer)["type"] == "timeout_error"
    *chunks, error, done = events_of(
        http.post("/v1/chat/completions", json={**body, "stream": True}, headers=late)
    )
    assert chunks and done == "[DONE]"
    assert error["error"]["code"] == "deadline_exceeded"
    wrong = http.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": "soon"})
    assert wrong.status_code == 400


def test_the_openai_client_raises_on_an_error_within_a_stream(openai_client: Any) -> None:
    from openai import APIError

    stream = openai_client.chat.completions.create(
        model="tiny-run",
        messages=asked("x"),
        max_tokens=480,
        stream=True,
        extra_body={"ignore_eos": True},
        extra_headers={"X-Request-Timeout": "0.15"},
    )
    with pytest.raises(APIError, match="longer than"):
        list(stream)
