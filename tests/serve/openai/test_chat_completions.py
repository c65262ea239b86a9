"""Chat completions over HTTP, requested by the `openai` client and by httpx."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from multi_token.types import Conversation, Media, Message, Text
from tests.serve.asking import (
    BLUE,
    IMAGE,
    NUM_TOKENS,
    NUMBERS,
    QUESTION,
    RED,
    VECTOR,
    asked,
    content_of,
    events_of,
    post,
)
from tests.serve.running_server import KEY, b64, data_url, running


def generated(model: Any, *messages: Message) -> str:
    (answer,) = model.generate([Conversation(messages)], max_new_tokens=NUM_TOKENS)
    return answer


CASES: dict[str, tuple[list[dict[str, Any]], tuple[Message, ...]]] = {
    "text": (asked("Is it a cat?"), (Message("user", (Text("Is it a cat?"),)),)),
    "image": (
        asked(IMAGE, QUESTION),
        (Message("user", (Media("image", RED), Text("What is this?"))),),
    ),
    "several modalities": (
        asked(
            {"type": "text", "text": "Look: "},
            VECTOR,
            {"type": "image_url", "image_url": data_url(BLUE)},
            {"type": "text", "text": " and "},
            IMAGE,
        ),
        (
            Message(
                "user",
                (
                    Text("Look: "),
                    Media("vector", NUMBERS),
                    Media("image", BLUE),
                    Text(" and "),
                    Media("image", RED),
                ),
            ),
        ),
    ),
    "in the middle of a conversation": (
        [
            {"role": "system", "content": "You are a helpful assistant."},
            *asked(IMAGE, QUESTION),
            {"role": "assistant", "content": "a red square", "refusal": None, "tool_calls": []},
            {"role": "user", "content": [VECTOR, {"type": "text", "text": "And this?"}]},
        ],
        (
            Message("system", (Text("You are a helpful assistant."),)),
            Message("user", (Media("image", RED), Text("What is this?"))),
            Message("assistant", (Text("a red square"),)),
            Message("user", (Media("vector", NUMBERS), Text("And this?"))),
        ),
    ),
    "slots spelled in text": (
        asked("What is <image>, <|image|> or \ue0000\ue001?"),
        (Message("user", (Text("What is <image>, <|image|> or \ue0000\ue001?"),)),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_greedy_answer_is_that_of_generate(
    case: str, http: httpx.Client, served_model: Any
) -> None:
    messages, expected = CASES[case]
    answer = post(http, messages, temperature=0)
    assert content_of(answer).strip() == generated(served_model, *expected)


@pytest.mark.slow
def test_concurrent_requests_get_the_same_answers(served_model: Any) -> None:
    key = {"Authorization": f"Bearer {KEY}"}
    with (
        running(served_model, api_keys=(KEY,)) as server,
        httpx.Client(base_url=server.url, headers=key, timeout=30) as client,
        ThreadPoolExecutor(len(CASES)) as together,
    ):
        texts = together.map(lambda c: content_of(post(client, c[0])), CASES.values())
        for text, (_, expected) in zip(texts, CASES.values(), strict=True):
            assert text.strip() == generated(served_model, *expected)


def test_an_answer_depends_on_its_image(http: httpx.Client) -> None:
    blue = {"type": "image_url", "image_url": {"url": data_url(BLUE), "detail": "low"}}
    assert content_of(post(http, asked(IMAGE, QUESTION))) != content_of(
        post(http, asked(blue, QUESTION))
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": data_url(RED)},
        {"type": "media", "modality": "image", "data": b64(RED), "format": "png"},
        {"type": "media", "modality": "image", "url": data_url(RED)},
        {"type": "file", "file": {"file_data": data_url(RED), "filename": "a.pdf"}},
        {"type": "file", "file": {"file_data": b64(RED), "filename": "red.PNG"}},
    ],
    ids=["plain address", "data", "url", "file by its type", "file by its name"],
)
def test_every_way_to_send_an_image_gives_one_answer(
    part: dict[str, Any], http: httpx.Client
) -> None:
    assert content_of(post(http, asked(part, QUESTION))) == content_of(
        post(http, asked(IMAGE, QUESTION))
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "media", "modality": "vector", "data": [1, -2, 3, 0.5, 2]},
        {"type": "vector_url", "vector_url": {"url": data_url(NUMBERS, "application/npy")}},
        {"type": "vector_url", "vector_url": data_url(NUMBERS, "")},
    ],
    ids=["a list of numbers", "its own part", "its own part, plain"],
)
def test_every_way_to_send_a_vector_gives_one_answer(
    part: dict[str, Any], http: httpx.Client
) -> None:
    assert content_of(post(http, asked(part, QUESTION))) == content_of(
        post(http, asked(VECTOR, QUESTION))
    )


def test_the_openai_client_gets_an_answer_with_usage(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny-run",
        messages=asked(IMAGE, VECTOR, QUESTION),
        max_completion_tokens=NUM_TOKENS,
        extra_body={"ignore_eos": True},
    )
    (choice,) = answer.choices
    assert answer.object == "chat.completion" and answer.model == "tiny-run"
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content and choice.logprobs is None
    details = answer.usage.prompt_tokens_details
    assert details.image_tokens == 3 and details.audio_tokens == 0
    assert details.media_tokens == {"image": 3, "vector": 2}
    assert details.text_tokens == answer.usage.prompt_tokens - 5
    assert answer.usage.completion_tokens == NUM_TOKENS
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + NUM_TOKENS


def test_n_answers_are_drawn_apart_and_a_seed_repeats_them(openai_client: Any) -> None:
    def drawn() -> list[str]:
        answer = openai_client.chat.completions.create(
            model="tiny-run",
            messages=asked("Which?"),
            n=3,
            seed=5,
            temperature=1.5,
            max_tokens=NUM_TOKENS,
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = drawn()
    assert len(set(first)) == 3
    assert drawn() == first


def test_logprobs_have_openais_form(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="tiny-run",
        messages=asked("one two"),
        logprobs=True,
        top_logprobs=3,
        temperature=0,
        max_tokens=NUM_TOKENS,
        extra_body={"ignore_eos": True},
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == NUM_TOKENS
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert token.token == bytes(token.bytes).decode("utf-8", "replace")
    whole = b"".join(bytes(token.bytes) for token in content)
    assert whole.decode("utf-8", "replace") == answer.choices[0].message.content


def test_an_answer_ends_before_its_stop_string(http: httpx.Client) -> None:
    whole = content_of(post(http, asked("one two"), max_tokens=16, ignore_eos=True))
    stop = whole[len(whole) // 2 :][:2]
    answer = post(http, asked("one two"), max_tokens=16, ignore_eos=True, stop=["never", stop])
    assert content_of(answer) == whole[: whole.index(stop)]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    *chunks, _ = events_of(
        post(http, asked("one two"), max_tokens=16, ignore_eos=True, stop=stop, stream=True)
    )
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole[: whole.index(stop)]


def test_ignored_fields_are_listed_in_a_header(http: httpx.Client) -> None:
    answer = post(
        http,
        asked("x"),
        media_io_kwargs={"video": {"num_frames": 4}},
        metadata={"run": "1"},
        presence_penalty=0,
        tools=[],
    )
    assert answer.status_code == 200
    assert answer.headers["x-multi-token-ignored"] == "media_io_kwargs, metadata"


def test_models_report_context_length_and_modalities(
    openai_client: Any, http: httpx.Client
) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == "tiny-run" and model.object == "model"
    assert model.max_model_len == 512
    assert model.modalities == {"image": "image", "vector": "vector"}
    assert http.get("/v1/models/tiny-run").json()["id"] == "tiny-run"
    assert http.get("/v1/models/other").status_code == 404


def test_states_and_metrics_are_reported(http: httpx.Client) -> None:
    content_of(post(http, asked(VECTOR, QUESTION)))
    for route in ("/health", "/ready", "/version", "/docs", "/openapi.json"):
        assert http.get(route).status_code == 200, route
    text = http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "time_to_first_token_seconds_bucket",
        "time_per_output_token_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
        "prompt_tokens_total",
        "generation_tokens_total",
        'media_decode_seconds_bucket{le="0.005",modality="vector"}',
        "encoder_seconds_bucket",
        'media_tokens_total{modality="vector"}',
        'requests_total{status="200"}',
    ):
        assert f"multi_token_{name}" in text, name


def test_generate_takes_rows_of_the_original_multi_token(
    http: httpx.Client, served_model: Any
) -> None:
    row = {"messages": [{"role": "user", "content": "What is <image>?"}], "images": [b64(RED)]}
    answer = http.post("/generate", json=row)
    assert answer.status_code == 200, answer.text
    message = Message("user", (Text("What is "), Media("image", RED), Text("?")))
    (expected,) = served_model.generate([Conversation((message,))], max_new_tokens=128)
    assert answer.json() == {"output": expected}
