"""Load for a running server: many clients at once, and what each of them waited.

Border: a client of anybody's chat completions, which it measures from outside; it starts no server
and loads no model.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.serve.row_parts import media_part, question_of, request_messages

Messages = list[dict[str, Any]]
_WORDS = (
    "the a one this that old new small large red blue green river hill house road field stone "
    "garden morning evening winter summer walks sees finds asks holds opens turns stays begins"
)


@dataclass(frozen=True)
class Load:
    """What is asked, and how."""

    url: str
    """Of the server, with or without `/v1` at its end."""
    model: str
    prompts: Sequence[Messages]
    """Taken in turn, from the first one again when all have been sent."""
    max_tokens: int = 64
    ignore_eos: bool = False
    """Answers of exactly `max_tokens` tokens, so that runs compare; not every server knows it."""
    api_key: str | None = None
    timeout_s: float = 300.0


@dataclass
class Request:
    """One request: when things came, in seconds from its start."""

    number: int = 0
    """Its place in the order of asking, from 0."""
    pieces: list[float] = field(default_factory=list)
    """Arrivals of chunks with text."""
    seconds: float = math.nan
    """Until its end."""
    num_prompt: int = 0
    num_tokens: int = 0
    """As the server counts them."""
    fault: str | None = None
    """Its kind: a status and code, or the name of what broke."""
    text: str = ""


@dataclass(frozen=True)
class Measured:
    """All requests with one number of clients."""

    num_clients: int
    seconds: float
    """From the first request to the end of the last."""
    requests: Sequence[Request]

    @property
    def answered(self) -> list[Request]:
        """Those without a fault."""
        return [request for request in self.requests if request.fault is None]

    def as_json(self) -> dict[str, Any]:
        """Figures of this number of clients. Times are in seconds; null where there are none.

        `ttft`: from sending to the first chunk with text. `itl`: between two such chunks.
        `tpot`: (latency - ttft) / (tokens - 1) of a request, as vLLM's bench has it.
        """
        answered = self.answered
        num_tokens = sum(request.num_tokens for request in answered)
        gaps = [b - a for r in answered for a, b in zip(r.pieces, r.pieces[1:], strict=False)]
        per_token = [
            (r.seconds - r.pieces[0]) / (r.num_tokens - 1)
            for r in answered
            if r.pieces and r.num_tokens > 1
        ]
        return {
            "num_clients": self.num_clients,
            "num_requests": len(self.requests),
            "num_answered": len(answered),
            "errors": dict(Counter(r.fault for r in self.requests if r.fault is not None)),
            "seconds": self.seconds,
            "ttft_s": summary([r.pieces[0] for r in answered if r.pieces]),
            "itl_s": summary(gaps),
            "tpot_s": summary(per_token),
            "latency_s": summary([r.seconds for r in answered]),
            "prompt_tokens": sum(r.num_prompt for r in answered),
            "completion_tokens": num_tokens,
            "tokens_per_second": num_tokens / self.seconds,
            "requests_per_second": len(answered) / self.seconds,
        }


def summary(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and 99th percentile (the nearest rank, so always one of the values)."""
    if not values:
        return {"mean": None, "p50": None, "p99": None}
    ordered = sorted(values)

    def rank(part: float) -> float:
        return ordered[max(0, math.ceil(part * len(ordered)) - 1)]

    return {"mean": sum(ordered) / len(ordered), "p50": rank(0.5), "p99": rank(0.99)}


async def measure(
    load: Load, num_clients: int, num_requests: int, on_end: Callable[[Request], None]
) -> Measured:
    """`num_requests` requests by `num_clients` clients, each of which asks again when answered.

    `on_end`: told of each request when it has ended.
    """
    numbers = iter(range(num_requests))
    requests: list[Request] = []
    async with _client(load) as http:

        async def client() -> None:
            for number in numbers:  # shared: whoever is free takes the next
                request = await _ask(http, load, load.prompts[number % len(load.prompts)])
                request.number = number
                requests.append(request)
                on_end(request)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(num_clients, num_requests))))
        return Measured(num_clients, time.perf_counter() - began, requests)


def _client(load: Load) -> httpx.AsyncClient:
    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    return httpx.AsyncClient(
        headers=headers,
        timeout=load.timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy would be measured as well
    )


async def _ask(http: httpx.AsyncClient, load: Load, messages: Messages) -> Request:
    body: dict[str, Any] = {
        "model": load.model,
        "messages": messages,
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    request = Request()
    content = json.dumps(body).encode()  # not in the times: it is the client's own work
    headers = {"Content-Type": "application/json"}
    began = time.perf_counter()
    try:
        url = f"{base_of(load.url)}/v1/chat/completions"
        async with http.stream("POST", url, content=content, headers=headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                request.fault = fault_of(answer)
            else:
                await _read(answer, request, began)
    except httpx.HTTPError as error:
        request.fault = type(error).__name__
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        request.fault = f"not a stream of chat completions ({type(error).__name__})"
    request.seconds = time.perf_counter() - began
    return request


async def _read(answer: httpx.Response, request: Request, began: float) -> None:
    """Read a stream to its end; the request's fault is set where it has none."""
    async for data in _data(answer):
        if data == "[DONE]":
            if request.num_tokens == 0 and request.fault is None:
                request.fault = "no usage in the stream"
            return
        event = json.loads(data)
        if event.get("error"):
            request.fault = f"in the stream: {_code(event['error'])}"
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content")
            if text:
                request.pieces.append(time.perf_counter() - began)
                request.text += text
        usage = event.get("usage")
        if usage:
            request.num_prompt = usage["prompt_tokens"]
            request.num_tokens = usage["completion_tokens"]
    request.fault = request.fault or "the stream ended without [DONE]"


async def _data(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def fault_of(answer: httpx.Response) -> str:
    """The kind of a refusal: its status, and the server's own code for it."""
    try:
        code = _code(answer.json()["error"])
    except (ValueError, LookupError, TypeError):
        code = answer.reason_phrase
    return f"{answer.status_code} {code}"


def _code(error: Any) -> str:
    if not isinstance(error, Mapping):
        return str(error)[:60]
    return str(error.get("code") or error.get("type") or error.get("message"))[:60]


def base_of(url: str) -> str:
    """The address without what OpenAI's clients have at its end."""
    return url.rstrip("/").removesuffix("/v1")


def served_model(url: str, api_key: str | None) -> dict[str, Any]:
    """What `/v1/models` says of the first model: its `id`, and `modalities` if it is ours.

    Raises MultiTokenError if nobody answers there, or not with that.
    """
    address = f"{base_of(url)}/v1/models"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(address, headers=headers, timeout=30, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise MultiTokenError(
            f"expected a server at {address}: {error or type(error).__name__}; start one with "
            "`multi-token serve RUN`"
        ) from None
    if answer.status_code == 401:
        raise MultiTokenError(f"{address} asks for a key; give --api-key")
    try:
        (model, *_) = answer.json()["data"]
        return {**model, "id": str(model["id"])}
    except (ValueError, LookupError, TypeError):
        raise MultiTokenError(
            f"expected a list of models from {address}, got {fault_of(answer)}"
        ) from None


def written_prompts(
    number: int, num_words: int, items: Sequence[tuple[str, bytes]] = ()
) -> list[Messages]:
    """Made-up questions, no two alike, each about the same items: (sense, bytes)."""
    media = [media_part(name, data) for name, data in items]
    known = _WORDS.split()
    prompts: list[Messages] = []
    for i in range(number):
        words = [known[(i * 7 + j * (i + 11)) % len(known)] for j in range(num_words)]
        text = f"Question {i}: {' '.join(words)}?"
        content = [*media, {"type": "text", "text": text}] if media else text
        prompts.append([{"role": "user", "content": content}])
    return prompts


def prompts_of_rows(rows: str, modalities: Sequence[str], *, most: int) -> list[Messages]:
    """The first rows of a file, each up to its last answer. Raises MultiTokenError."""
    return list(_prompts_of_rows(rows, modalities, most))


def _prompts_of_rows(rows: str, modalities: Sequence[str], most: int) -> Iterator[Messages]:
    every = load_rows(rows)
    if not len(every):
        raise MultiTokenError(f"{rows} has no rows; expected at least one to ask about")
    fetch = Fetch(root=media_root(rows))
    for index in range(min(most, len(every))):
        conversation = to_conversation(
            every[index], modalities, row_id=f"{Path(rows).name}[{index}]"
        )
        yield request_messages(question_of(conversation)[0], fetch)
