"""A server under load: full queues, limits, disconnects, a failed engine, and draining."""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from multi_token.serve.watchdog import MAX_RESTARTS
from tests.serve.running_server import RunningServer, running

pytestmark = pytest.mark.slow

LONG = {
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 480,
    "ignore_eos": True,
}
SHORT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def without_modalities(model: Any) -> Any:
    """The same model for text alone: its server starts no media workers."""
    found = copy.copy(model)
    found.modalities = {}
    return found


@pytest.fixture(scope="module")
def text_model(served_model: Any) -> Any:
    return without_modalities(served_model)


@pytest.fixture(scope="module")
def small(text_model: Any) -> Iterator[RunningServer]:
    """A server for one running and one waiting generation."""
    with running(text_model, max_batch=1, max_queue=1) as server:
        yield server


def chat(server: RunningServer, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_a_model_without_modalities_answers_text_and_refuses_media(small: RunningServer) -> None:
    assert chat(small, SHORT).status_code == 200
    part = {"type": "image_url", "image_url": "data:,x"}
    answer = chat(small, {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400 and "none" in answer.json()["error"]["message"]


def test_a_full_queue_is_a_429_with_retry_after(small: RunningServer) -> None:
    admission = small.service.admission
    with httpx.stream(
        "POST", f"{small.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        statuses: list[int] = []
        second = threading.Thread(target=lambda: statuses.append(chat(small, SHORT).status_code))
        second.start()
        assert small.wait_until(lambda: admission.num_admitted == 2)
        refused = chat(small, SHORT)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        error = refused.json()["error"]
        assert error["type"] == "rate_limit_error" and "rate limit" in error["message"]
        assert httpx.get(f"{small.url}/health").status_code == 200
    second.join()
    assert statuses == [200]  # it started when the first one ended
    assert chat(small, SHORT).status_code == 200
    assert 'rejections_total{reason="queue_full"}' in httpx.get(f"{small.url}/metrics").text


def test_one_key_cannot_fill_the_queue_of_another(text_model: Any) -> None:
    keys = ("sk-greedy-key", "sk-other-key")
    greedy, other = ({"Authorization": f"Bearer {key}"} for key in keys)
    go = threading.Event()

    def hold(*_: Any, **__: Any) -> None:
        assert go.wait(30)

    with running(text_model, api_keys=keys, max_batch=1, max_queue=3) as server:
        hook = text_model.language_model.register_forward_pre_hook(hold, with_kwargs=True)
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(chat(server, SHORT, **other)))
        try:
            with ExitStack() as streams:
                statuses = []
                for _ in range(4):
                    options = {"json": {**SHORT, "stream": True}, "headers": greedy, "timeout": 30}
                    url = f"{server.url}/v1/chat/completions"
                    answer = streams.enter_context(httpx.stream("POST", url, **options))
                    statuses.append(answer.status_code)
                assert statuses == [200, 200, 200, 429]
                asking.start()
                assert server.wait_until(lambda: server.service.admission.num_admitted == 4)
                go.set()
                asking.join()
        finally:
            go.set()
            hook.remove()
    assert [answer.status_code for answer in answers] == [200]


def test_more_choices_than_the_capacity_are_a_400(small: RunningServer) -> None:
    answer = chat(small, {**SHORT, "n": 3})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_the_openai_client_retries_after_a_429(small: RunningServer) -> None:
    from openai import OpenAI

    with (
        OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=3) as client,
        httpx.stream(
            "POST", f"{small.url}/v1/chat/completions", json={**LONG, "n": 2, "stream": True}
        ) as busy,
    ):
        lines = busy.iter_lines()
        next(lines)
        leave = threading.Timer(0.2, busy.close)
        leave.start()
        answer = client.chat.completions.create(model="tiny-run", **SHORT)
        assert answer.choices[0].message.content is not None
        leave.join()


def test_a_client_that_never_reads_its_stream_is_aborted(
    text_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    many = {**LONG, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(many).encode()
    with running(text_model, send_timeout_s=0.5) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
        assert server.wait_until(lambda: server.service.admission.num_admitted == 8)
        assert server.wait_until(lambda: server.service.admission.num_admitted == 0, seconds=20)
        metrics = httpx.get(f"{server.url}/metrics").text
    assert 'requests_aborted_total{reason="client_gone"} 1.0' in metrics
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_several_clients_may_send_the_same_request_id(text_model: Any) -> None:
    with running(text_model) as server:
        statuses: list[httpx.Response] = []

        def ask() -> None:
            statuses.append(chat(server, {**SHORT, "max_tokens": 60}, **{"X-Request-Id": "a"}))

        clients = [threading.Thread(target=ask) for _ in range(3)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert [answer.status_code for answer in statuses] == [200] * 3


def test_text_beyond_any_prompt_is_refused_before_it_is_tokenized(
    small: RunningServer,
) -> None:
    body = {"messages": [{"role": "user", "content": "a" * (512 * 64 + 1)}]}
    answer = chat(small, body)
    assert answer.status_code == 400 and "32768" in answer.json()["error"]["message"]


def test_disconnected_clients_leave_no_request_running(small: RunningServer) -> None:
    service = small.service

    def leave(_: int) -> None:
        with httpx.stream(
            "POST", f"{small.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=30
        ) as answer:
            lines = answer.iter_lines()
            next(lines)

    for number in range(20):
        leave(number)
    assert small.wait_until(
        lambda: (
            service.admission.num_admitted == 0
            and service.engine.num_running == 0
            and service.engine.num_waiting == 0
            and not service._outputs
        )
    )
    assert chat(small, SHORT).status_code == 200


def test_a_dead_engine_is_reported_and_started_again(text_model: Any) -> None:
    broken = threading.Event()

    def fail(*_: Any, **__: Any) -> None:
        if broken.is_set():
            raise RuntimeError("broken at 0x7f00 in /home/me")

    hook = text_model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with running(text_model) as server:
            service, loop = server.service, server.server._loop
            assert chat(server, SHORT).status_code == 200
            # no watchdog for a while, or it would start the engine again between two lines
            loop.call_soon_threadsafe(service._watching.cancel)
            broken.set()
            answer = chat(server, SHORT)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "the engine has failed"
            assert httpx.get(f"{server.url}/health").status_code == 503
            assert httpx.get(f"{server.url}/ready").status_code == 503
            broken.clear()
            watching = asyncio.run_coroutine_threadsafe(service.watchdog.watch(), loop)
            assert server.wait_until(lambda: server.service.is_healthy)
            assert httpx.get(f"{server.url}/health").status_code == 200
            assert chat(server, SHORT).status_code == 200
            metrics = httpx.get(f"{server.url}/metrics").text
            assert "multi_token_engine_restarts_total 1.0" in metrics
            watching.cancel()
    finally:
        hook.remove()


def test_restarts_with_complete_responses_between_them_do_not_add_up(text_model: Any) -> None:
    broken = threading.Event()

    def fail(*_: Any, **__: Any) -> None:
        if broken.is_set():
            raise RuntimeError("out of memory")

    hook = text_model.language_model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        with running(text_model) as server:
            for _ in range(MAX_RESTARTS + 1):
                broken.set()
                assert chat(server, SHORT).status_code == 503
                broken.clear()
                assert server.wait_until(lambda: server.service.is_healthy)
                assert chat(server, SHORT).status_code == 200
            assert server.service.watchdog.error is None
    finally:
        hook.remove()


def test_an_engine_that_hangs_is_reported_also_when_its_client_has_left(text_model: Any) -> None:
    go = threading.Event()

    def hang(*_: Any, **__: Any) -> None:
        assert go.wait(60)

    with running(text_model, engine_step_timeout_s=0.5) as server:
        hook = text_model.language_model.register_forward_pre_hook(hang, with_kwargs=True)
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/chat/completions", json=SHORT, timeout=0.1)
            assert server.wait_until(lambda: not server.service.is_healthy)
            assert server.wait_until(lambda: server.service.admission.num_admitted == 0)
            assert httpx.get(f"{server.url}/health").status_code == 503
            assert httpx.get(f"{server.url}/ready").status_code == 503
            refused = chat(server, SHORT)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "engine_stalled"
        finally:
            go.set()
            hook.remove()
        assert server.wait_until(lambda: server.service.is_healthy)
        assert chat(server, SHORT).status_code == 200
        assert server.wait_until(lambda: server.service.engine.stalled_s == 0)


def test_a_draining_server_completes_running_requests_and_refuses_new_ones(text_model: Any) -> None:
    with running(text_model) as server:
        answers: list[httpx.Response] = []
        inside = threading.Thread(target=lambda: answers.append(chat(server, LONG)))
        inside.start()
        assert server.wait_until(lambda: server.service.admission.num_admitted == 1)
        server.service.admission.drain()
        refused = chat(server, SHORT)
        assert refused.status_code == 503 and refused.headers["x-should-retry"] == "true"
        assert refused.headers["connection"] == "close"
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.get(f"{server.url}/health").status_code == 200
        inside.join()
        assert [answer.status_code for answer in answers] == [200]


def test_a_stream_that_is_cut_off_ends_with_an_error(text_model: Any) -> None:
    with running(text_model) as server:
        loop = server.server._loop
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=30
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            drained = asyncio.run_coroutine_threadsafe(server.service.drain(0.0), loop)
            *_, error, done = [line for line in lines if line]
            drained.result(10)
        assert "shutting_down" in error and done == "data: [DONE]"
