"""Invalid requests: each is refused with one sentence before a stream begins, and fails alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.asking import IMAGE, QUESTION, RED, VECTOR, asked, content_of, fault_of, post
from tests.serve.running_server import data_url

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("messages", "status", "words"),
    [
        (asked({"type": "smell", "smell": "x"}, QUESTION), 400, ["smell", "image_url", "media"]),
        (
            asked({"type": "prompt_embeds", "data": "AAAA"}, QUESTION),
            400,
            ["prompt_embeds", "media"],
        ),
        (asked({"type": "smell_url", "smell_url": "x"}, QUESTION), 400, ["vector_url"]),
        (asked({"text": "x"}, QUESTION), 400, ["type", "input_audio"]),
        (
            asked(
                {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, QUESTION
            ),
            400,
            ["audio", "image", "vector", '"type": "media"'],
        ),
        (asked({"type": "media", "modality": "vectr", "data": ""}, QUESTION), 400, ["vector"]),
        (asked({"type": "media", "modality": "vector"}, QUESTION), 400, ["data or url"]),
        (
            asked({"type": "image_url", "image_url": "data:image/png;base64,####"}, QUESTION),
            400,
            ["not valid base64"],
        ),
        (
            asked({"type": "image_url", "image_url": data_url(b"no image")}, QUESTION),
            400,
            ["image"],
        ),
        (
            asked({"type": "image_url", "image_url": data_url(RED[:60])}, QUESTION),
            400,
            ["image"],
        ),
        (asked({"type": "image_url", "image_url": "/etc/passwd"}, QUESTION), 400, ["data:"]),
        (asked({"type": "image_url", "image_url": "file:///etc/passwd"}, QUESTION), 400, ["data:"]),
        (
            asked({"type": "media", "modality": "image", "data": "../x.png"}, QUESTION),
            400,
            ["base64"],
        ),
        (
            asked({"type": "image_url", "image_url": "http://127.0.0.1/a.png"}, QUESTION),
            400,
            ["fetches no URLs"],
        ),
        (asked({"type": "media", "modality": "vector", "data": [1, 2]}, QUESTION), 400, ["5"]),
        (
            asked({"type": "media", "modality": "vector", "data": [1, "x"]}, QUESTION),
            400,
            ["numbers"],
        ),
        ([{"role": "system", "content": [IMAGE]}, *asked("x")], 400, ["system", "media"]),
        ([{"role": "tool", "content": "x"}, *asked("x")], 400, ["tool"]),
        ([{"role": "<|im_start|>", "content": "x"}], 400, ["role"]),
        ([*asked("x"), {"role": "assistant", "content": "y"}], 400, ["last message"]),
        (asked("word " * 2000), 400, ["512"]),
    ],
)
def test_an_invalid_request_is_refused_with_a_sentence(
    messages: Any, status: int, words: list[str], http: httpx.Client
) -> None:
    answer = post(http, messages)
    assert answer.status_code == status, answer.text
    error = fault_of(answer)
    assert all(word in error["message"] for word in words), error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_invalid_request_is_refused_before_a_stream_begins(http: httpx.Client) -> None:
    answer = post(http, asked({"type": "image_url", "image_url": "x"}, QUESTION), stream=True)
    assert answer.status_code == 400
    assert fault_of(answer)["param"] == "messages.0.content.0.image_url"


def test_a_poisoned_request_fails_alone(http: httpx.Client) -> None:
    poison = {"type": "media", "modality": "vector", "data": [3e38, 3e38, 3e38, -3e38, 3e38]}
    parts = [VECTOR, poison, VECTOR, VECTOR]
    with ThreadPoolExecutor(4) as together:
        answers = list(together.map(lambda part: post(http, asked(part, QUESTION)), parts))
    assert fault_of(answers.pop(1))["type"] == "invalid_request_error"
    alone = content_of(post(http, asked(VECTOR, QUESTION)))
    assert [content_of(answer) for answer in answers] == [alone] * 3


def test_another_model_is_not_found(http: httpx.Client) -> None:
    answer = post(http, asked("x"), model="gpt-4")
    assert answer.status_code == 404
    assert fault_of(answer)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["/etc/passwd"]},
        {"messages": [{"role": "user", "content": "<image>"}], "images": []},
        {"messages": [{"role": "user", "content": "<image>"}], "images": [{"path": "/etc/passwd"}]},
        {"messages": "x"},
        [],
    ],
)
def test_generate_reads_no_file_and_refuses_invalid_rows(row: Any, http: httpx.Client) -> None:
    answer = http.post("/generate", json=row)
    assert answer.status_code == 400, answer.text
    assert "passwd" not in fault_of(answer)["message"]


def test_nothing_that_a_client_writes_becomes_a_label(http: httpx.Client) -> None:
    odd = "zebra77"
    http.get(f"/{odd}")
    post(http, asked(odd), model=odd, user=odd)
    post(http, asked({"type": odd}, QUESTION))
    post(http, asked({"type": "media", "modality": odd, "data": ""}, QUESTION))
    http.get("/version", headers={"X-Request-Id": odd, "User-Agent": odd})
    assert odd not in http.get("/metrics").text
