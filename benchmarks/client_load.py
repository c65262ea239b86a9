"""Load on a running server: N clients at once, and the latency of each request.

    python benchmarks/client_load.py URL [--clients 1,8,32] [--rows FILE] [--out FILE]

A client of any server with OpenAI's chat completions, measured from outside: time to the first
token, time between tokens, throughput and errors. It starts no server and loads no model.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from multi_token import __version__
from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.report.machine import machine_facts
from multi_token.serve.chat_ui.examples import bytes_of, question_of
from multi_token.types import Media, Message, Text

KEY_VARIABLE = "MULTI_TOKEN_API_KEY"
Messages = list[dict[str, Any]]
_WORDS = (
    "the a one this that old new small large red blue green river hill house road field stone "
    "garden morning evening winter summer walks sees finds asks holds opens turns stays begins"
)


@dataclass(frozen=True)
class LoadSpec:
    """Requests to send."""

    url: str
    """Address of the server, with or without `/v1` at its end."""
    model: str
    prompts: Sequence[Messages]
    """Taken in turn, from the first one again when all have been sent."""
    max_tokens: int = 64
    ignore_eos: bool = False
    """Generate exactly `max_tokens` tokens, so that runs compare; not every server supports it."""
    api_key: str | None = None
    timeout_s: float = 300.0


@dataclass
class RequestTiming:
    """One request; times in seconds from its start."""

    number: int = 0
    """Position in the order of sending, from 0."""
    pieces: list[float] = field(default_factory=list)
    """Arrival times of chunks with text."""
    seconds: float = math.nan
    """Time of its end."""
    num_prompt: int = 0
    num_tokens: int = 0
    """Generated tokens, as the server counts them."""
    fault: str | None = None
    """Status and code of a refusal, or the name of the error."""
    text: str = ""


@dataclass(frozen=True)
class LoadResult:
    """All requests of one number of clients."""

    num_clients: int
    seconds: float
    """Time from the first request to the end of the last."""
    requests: Sequence[RequestTiming]

    @property
    def answered(self) -> list[RequestTiming]:
        """Requests without a fault."""
        return [request for request in self.requests if request.fault is None]

    def as_json(self) -> dict[str, Any]:
        """Return the figures of this number of clients. Times are in seconds, or null.

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
    """Return mean, median and 99th percentile (nearest rank, so always one of the values)."""
    if not values:
        return {"mean": None, "p50": None, "p99": None}
    ordered = sorted(values)

    def rank(part: float) -> float:
        return ordered[max(0, math.ceil(part * len(ordered)) - 1)]

    return {"mean": sum(ordered) / len(ordered), "p50": rank(0.5), "p99": rank(0.99)}


async def measure(
    load: LoadSpec, num_clients: int, num_requests: int, on_end: Callable[[RequestTiming], None]
) -> LoadResult:
    """Send `num_requests` requests by `num_clients` clients, each as soon as its last one ended.

    `on_end`: called with each request when it has ended.
    """
    numbers = iter(range(num_requests))
    requests: list[RequestTiming] = []
    async with _client(load) as http:

        async def client() -> None:
            for number in numbers:  # one iterator for all clients: a free client takes the next
                request = await _ask(http, load, load.prompts[number % len(load.prompts)])
                request.number = number
                requests.append(request)
                on_end(request)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(num_clients, num_requests))))
        return LoadResult(num_clients, time.perf_counter() - began, requests)


def _client(load: LoadSpec) -> httpx.AsyncClient:
    headers = {} if load.api_key is None else {"Authorization": f"Bearer {load.api_key}"}
    return httpx.AsyncClient(
        headers=headers,
        timeout=load.timeout_s,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,  # a proxy's latency would be measured as well
    )


async def _ask(http: httpx.AsyncClient, load: LoadSpec, messages: Messages) -> RequestTiming:
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
    request = RequestTiming()
    content = json.dumps(body).encode()  # before the clock starts: the client's own work
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
    # Any server may be measured, so events may have any shape: a fault of one request, not an end.
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        request.fault = f"not a stream of chat completions ({type(error).__name__})"
    request.seconds = time.perf_counter() - began
    return request


async def _read(answer: httpx.Response, request: RequestTiming, began: float) -> None:
    """Read a stream to its end; set the request's fault if the stream breaks off."""
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
        # The last chunk has the usage and no choices. Chunks are no tokens: servers join several.
        usage = event.get("usage")
        if usage:
            request.num_prompt = usage["prompt_tokens"]
            request.num_tokens = usage["completion_tokens"]
    # A connection that breaks off looks like an end: only [DONE] tells a complete answer.
    request.fault = request.fault or "the stream ended without [DONE]"


async def _data(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data:"):
            yield line[5:].strip()


def fault_of(answer: httpx.Response) -> str:
    """Return a refusal's status and the server's own code for it."""
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
    """Return the address without the `/v1` of OpenAI's clients."""
    return url.rstrip("/").removesuffix("/v1")


def served_model(url: str, api_key: str | None) -> dict[str, Any]:
    """Return the first entry of `/v1/models`: its `id`, and `modalities` if the server is ours.

    Raises MultiTokenError if no server responds, or not with a list of models.
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


def request_messages(messages: Sequence[Message], fetch: Fetch) -> list[dict[str, Any]]:
    """Return a row's messages as those of a request. Raises MediaError like `bytes_of`."""
    return [{"role": m.role, "content": _content(m, fetch)} for m in messages]


def media_part(modality: str, data: bytes) -> dict[str, Any]:
    """Return the content part of an item of any modality."""
    return {"type": "media", "modality": modality, "data": base64.b64encode(data).decode()}


def _content(message: Message, fetch: Fetch) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, Media) for part in message.parts):
        return "".join(part.text for part in message.parts if isinstance(part, Text))
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, Text)
        else media_part(part.modality, bytes_of(part.source, fetch))
        for part in message.parts
    ]


def written_prompts(
    number: int, num_words: int, items: Sequence[tuple[str, bytes]] = ()
) -> list[Messages]:
    """Return made-up questions, no two alike, each with the same items: (modality, bytes)."""
    media = [media_part(name, data) for name, data in items]
    known = _WORDS.split()
    prompts: list[Messages] = []
    for i in range(number):
        # Other words from the first one on, so that a prefix cache finds nothing to reuse.
        words = [known[(i * 7 + j * (i + 11)) % len(known)] for j in range(num_words)]
        text = f"Question {i}: {' '.join(words)}?"
        content = [*media, {"type": "text", "text": text}] if media else text
        prompts.append([{"role": "user", "content": content}])
    return prompts


def prompts_of_rows(rows: str, modalities: Sequence[str], *, most: int) -> list[Messages]:
    """Return the first rows of a file, each up to its last answer. Raises MultiTokenError."""
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


def _levels(text: str) -> list[int]:
    """`1,8,32` -> numbers of clients."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= 10_000 for number in numbers):
        raise MultiTokenError(f"--clients: expected numbers of 1 to 10000 (1,8,32), got {text}")
    return numbers


def _prompts(args: argparse.Namespace, model: dict[str, Any], most: int) -> list[Messages]:
    if args.rows is None:
        given = [item.partition("=") for item in args.media]
        items = [(name, Fetch().read(source)) for name, _, source in given]
        return written_prompts(most, args.words, items)
    if args.media:
        raise MultiTokenError("--media is for made-up questions, and --rows has its own items")
    return prompts_of_rows(args.rows, list(model.get("modalities") or {}), most=most)


def figures_of(load: LoadSpec, results: Sequence[LoadResult], *, source: str) -> dict[str, Any]:
    """Return all figures, and the settings and machine they were measured with."""
    return {
        "url": load.url,
        "model": load.model,
        "prompts": source,
        "num_prompts": len(load.prompts),
        "max_tokens": load.max_tokens,
        "ignore_eos": load.ignore_eos,
        "multi_token": __version__,
        "client": machine_facts(),
        "levels": [each.as_json() for each in results],
    }


def table_of(results: Sequence[LoadResult]) -> Table:
    """Return a table with a line for each number of clients."""
    table = Table(title="times in ms: p50 / p99")
    for name in ("clients", "answered", "first token", "between", "tokens/s", "requests/s"):
        table.add_column(name, justify="right")
    table.add_column("errors")
    for each in results:
        found = each.as_json()
        errors = [f"{count} x {kind}" for kind, count in found["errors"].items()]
        table.add_row(
            str(each.num_clients),
            f"{found['num_answered']} of {found['num_requests']}",
            _times(found["ttft_s"]),
            _times(found["itl_s"]),
            f"{found['tokens_per_second']:.1f}",
            f"{found['requests_per_second']:.2f}",
            "\n".join(errors),
        )
    return table


def _times(found: dict[str, float | None]) -> str:
    middle, last = found["p50"], found["p99"]
    if middle is None or last is None:
        return "-"
    return f"{1000 * middle:.0f} / {1000 * last:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a server. Raises MultiTokenError."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("url", help="address of the server: http://127.0.0.1:8000")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, each measured")
    parser.add_argument("--requests", type=int, help="for each number; default: 4 a client, >= 16")
    parser.add_argument("--rows", help="send these rows; default: made-up text")
    parser.add_argument("--media", action="append", default=[], help="NAME=FILE: in every question")
    parser.add_argument("--words", type=int, default=32, help="words in a made-up question")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ignore-eos", action="store_true", help="exactly --max-tokens tokens")
    parser.add_argument("--api-key", help=f"default: ${KEY_VARIABLE}")
    parser.add_argument("--timeout", type=float, default=300.0, help="limit of a request, seconds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args(arguments)
    # From the environment by preference: arguments are visible to other users of the machine.
    key = args.api_key or os.environ.get(KEY_VARIABLE) or None
    numbers = _levels(args.clients)
    model = served_model(args.url, key)
    # At least four a client: the first come all at once, the last leave the batch half empty.
    counts = {number: args.requests or max(16, 4 * number) for number in numbers}
    prompts = _prompts(args, model, max(counts.values()))
    load = LoadSpec(
        args.url, model["id"], prompts, args.max_tokens, args.ignore_eos, key, args.timeout
    )
    results = []
    with Progress(console=Console(stderr=True)) as progress:
        for number, count in counts.items():
            task = progress.add_task(f"{number} clients", total=count)
            work = measure(load, number, count, lambda _, t=task: progress.advance(t))
            results.append(asyncio.run(work))
    Console().print(table_of(results))
    if args.out is not None:
        figures = figures_of(load, results, source=args.rows or "made-up text")
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if not any(each.answered for each in results):
        raise MultiTokenError("no request was answered; the table's last column says why")


if __name__ == "__main__":
    try:
        main()
    except MultiTokenError as error:
        sys.exit(str(error))
