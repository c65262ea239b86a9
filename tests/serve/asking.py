"""Chat requests for a server, and parsers of its responses."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from tests.serve.running_server import b64, data_url, npy, png

NUM_TOKENS = 8
RED, BLUE = png((220, 30, 30)), png((30, 60, 220))
NUMBERS = npy(1, -2, 3, 0.5, 2)
QUESTION = {"type": "text", "text": "What is this?"}
IMAGE = {"type": "image_url", "image_url": {"url": data_url(RED)}}
VECTOR = {"type": "media", "modality": "vector", "data": b64(NUMBERS)}


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content) if len(content) > 1 else content[0]}]


def post(http: httpx.Client, messages: Any, **fields: Any) -> httpx.Response:
    body = {"messages": messages, "max_tokens": NUM_TOKENS, **fields}
    return http.post("/v1/chat/completions", json=body)


def content_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def events_of(answer: httpx.Response) -> list[Any]:
    """The events of a stream; the last one is "[DONE]"."""
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = answer.text.split("\n\n")
    assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
    found = [line.removeprefix("data: ") for line in lines[:-1]]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


def fault_of(answer: httpx.Response) -> dict[str, Any]:
    """The error object; its message is one line of ASCII without paths and memory addresses."""
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert re.fullmatch(r"[\x20-\x7e]{1,300}", error["message"])
    assert "0x" not in error["message"]
    assert not re.search(r"(?<![\w:/])/\w", error["message"]), error["message"]
    return error
