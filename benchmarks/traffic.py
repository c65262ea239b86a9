"""Requests of untrusted clients: questions with media of all sizes, broken requests, clients that
leave.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from client_load import media_part
from PIL import Image

MODEL = "measured"
_CHAT = "/v1/chat/completions"
_JSON = {"Content-Type": "application/json"}
_IMAGE_SIZES = ((8, 8), (33, 17), (224, 224), (640, 480), (1280, 960), (2400, 1600), (3000, 2200))
_TEXTS = (
    "Hello",
    "Tell me about rivers, in twelve words.",
    "What is the third word of this sentence?",
    "Write a line about bread and another about snow.",
)
_ROUNDING = 1e-3
"""Log-probabilities nearer than this may change places when a batch has other rows."""
_MOST_WAIT_S = 5.0


@dataclass(frozen=True)
class Question:
    """A good request, and its answer when asked alone."""

    name: str
    fields: Mapping[str, Any]
    answer: str = ""

    def content(self, *, stream: bool) -> bytes:
        return json.dumps({**self.fields, "stream": stream}).encode()


@dataclass(frozen=True)
class Reply:
    """Status with the code of a refusal, and the text of an answer."""

    status: str
    text: str = ""
    wait_s: float = 0.0
    """Seconds after which a refused request may come again."""


@dataclass(frozen=True)
class Broken:
    """A request that has to be refused, with the statuses that count as a refusal."""

    name: str
    content: bytes
    statuses: tuple[int, ...] = (400,)
    method: str = "POST"
    path: str = _CHAT
    headers: Mapping[str, str] = field(default_factory=lambda: _JSON)


def questions(modalities: Mapping[str, Mapping[str, Any]]) -> list[Question]:
    """Return questions of text alone, and of images and vectors for each modality of these types.

    `modalities`: name -> fields of a modality, as a run's config has them.
    """
    made: list[tuple[str, list[Any] | str]] = [("text", text) for text in _TEXTS]
    made.append(("a long text", " and ".join(_TEXTS * 3)))
    some: list[dict[str, Any]] = []
    for name, fields in modalities.items():
        items: list[tuple[str, bytes]] = []
        if fields["type"] == "image":
            items = [(f"{w} x {h}", image(w, h)) for w, h in _IMAGE_SIZES]
        elif fields["type"] == "vector":
            items = [(f"{n} vectors", vectors(fields["dim"], n)) for n in (1, 2, 5)]
        for number, (what, data) in enumerate(items):
            part = media_part(name, data)
            text = {"type": "text", "text": f"\n{_TEXTS[number % len(_TEXTS)]}"}
            made.append((f"{name} {what}", [part, text]))
        some += [media_part(name, data) for _, data in items[:2]]
    if len(some) > 1:
        made.append(("several items", [*some, {"type": "text", "text": "\nWhat are they?"}]))
    found = []
    for number, (name, content) in enumerate(made):
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if number % 3 == 1:
            messages.insert(0, {"role": "system", "content": "You answer in few words."})
        fields = {"model": MODEL, "messages": messages, "temperature": 0}
        fields |= {"max_tokens": (1, 6, 12, 24)[number % 4], "ignore_eos": number % 2 == 0}
        found.append(Question(name, fields))
    return found


def image(width: int, height: int) -> bytes:
    """Return an image unlike that of any other size: PNG if small, JPEG if not."""
    # Smooth waves: noise hardly compresses, and uploads would take most of the time.
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / (9 + width % 7)), np.cos(y / 11), np.sin((x + y) / 17)], -1)
    file = io.BytesIO()
    Image.fromarray((waves * 127 + 128).astype(np.uint8)).save(
        file, "PNG" if width * height < 100_000 else "JPEG"
    )
    return file.getvalue()


def vectors(dim: int, number: int) -> bytes:
    """Return a `.npy` file [number, dim]."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng(number).normal(size=(number, dim)).astype(np.float32))
    return file.getvalue()


def broken_requests(modalities: Mapping[str, Mapping[str, Any]]) -> list[Broken]:
    """Return requests to be refused: broken JSON, numbers, parts and media, too long, misrouted."""

    def chat(name: str, *content: Any, statuses: tuple[int, ...] = (400,), **fields: Any) -> Broken:
        message = {"role": "user", "content": list(content) or "Hello"}
        body = {"model": MODEL, "messages": [message], "max_tokens": 4, **fields}
        return Broken(name, json.dumps(body).encode(), statuses)

    made = [
        Broken("no JSON", b'{"messages": [{"role": "user", "content"'),
        Broken("brackets without end", b"[" * 100_000),
        Broken("half of a letter", b'{"messages": "\xff\xfe"}'),
        Broken("not said to be JSON", b"{}", (415,), headers={"Content-Type": "text/plain"}),
        Broken("no such route", b"{}", (404,), path="/v1/chat"),
        Broken("another method", b"", (405,), method="GET"),
        Broken("no place for so long", b"x" * (33 * 1024 * 1024), (413,)),
        chat("no messages", messages=[]),
        chat("an unknown role", messages=[{"role": "<|im_start|>", "content": "x"}]),
        chat("an unknown field", temprature=1),
        chat("an unknown part", {"type": "smell", "smell": "x"}),
        chat("another model", model="gpt", statuses=(404,)),
        chat("a path", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        chat("too long", messages=[{"role": "user", "content": "word " * 190_000}]),
        chat("too many tokens", max_tokens=30_000),
    ]
    numbers = [("temperature", -1), ("top_p", 2), ("max_tokens", 0), ("n", 99), ("seed", 2**70)]
    made += [chat(f"{name} {value}", **{name: value}) for name, value in numbers]
    for name, fields in modalities.items():
        made.append(chat(f"{name}: no base64", {"type": "media", "modality": name, "data": "####"}))
        data: list[bytes] = [b"no such thing"]
        if fields["type"] == "image":
            small, large = image(64, 64), image(1280, 960)
            data += [small[: len(small) // 2], large[:200], bytes(reversed(small))]
        elif fields["type"] == "vector":
            nan = np.full(fields["dim"], np.nan, np.float32)
            file = io.BytesIO()
            np.save(file, nan)
            data += [file.getvalue(), vectors(fields["dim"] + 1, 1), vectors(fields["dim"], 1)[:-1]]
        for number, each in enumerate(data):
            made.append(
                chat(f"{name}: damaged, {number}", media_part(name, each), statuses=(400, 422))
            )
    return made


async def alone(http: httpx.AsyncClient, question: Question) -> Question | None:
    """Return the question with its answer; None if rounding decides the answer.

    Where two tokens are about equally likely, sums in another order choose the other one.
    """
    fields = {**question.fields, "logprobs": True, "top_logprobs": 2}
    answer = await http.post(_CHAT, json=fields)
    if answer.status_code != 200:
        raise SystemExit(f"{question.name}, alone: {answer.status_code} {answer.text[:300]}")
    choice = answer.json()["choices"][0]
    for token in choice["logprobs"]["content"]:
        first, second = (each["logprob"] for each in token["top_logprobs"])
        if first - second < _ROUNDING:
            return None
    return Question(question.name, question.fields, choice["message"]["content"])


async def ask(http: httpx.AsyncClient, question: Question, *, stream: bool) -> Reply:
    """Send one request. A stream that fails has the status of its error after its own."""
    answer = await http.post(_CHAT, content=question.content(stream=stream), headers=_JSON)
    if answer.status_code != 200:
        wait_s = float(answer.headers.get("retry-after", 1))
        return Reply(f"{answer.status_code} {_code(answer)}", wait_s=wait_s)
    if not stream:
        return Reply("200", answer.json()["choices"][0]["message"]["content"])
    # Read at once: times are not measured here, only that the stream is complete.
    *events, last, end = answer.text.split("\n\n")
    if (last, end) != ("data: [DONE]", ""):
        return Reply("200 without [DONE]")
    text = ""
    for event in events:
        data = json.loads(event.removeprefix("data: "))
        if "error" in data:
            return Reply(f"200 {data['error']['type']} {data['error']['code']}", text)
        text += "".join(choice["delta"].get("content") or "" for choice in data["choices"])
    return Reply("200", text)


async def ask_patiently(
    http: httpx.AsyncClient, question: Question, random: Random
) -> tuple[Reply, int]:
    """Ask, again after the time of each 429; return the reply and the number of refusals."""
    num_refused = 0
    while True:
        reply = await ask(http, question, stream=random.random() < 0.5)
        if not reply.status.startswith("429"):
            return reply, num_refused
        num_refused += 1
        # Spread over half of the time again, or all refused clients would come back at once.
        await asyncio.sleep(min(reply.wait_s, _MOST_WAIT_S) * random.uniform(1.0, 1.5))


async def send_broken(http: httpx.AsyncClient, broken: Broken) -> str:
    """Return status and code of the answer; `closed` if the connection ends without one."""
    try:
        answer = await http.request(
            broken.method, broken.path, content=broken.content, headers=dict(broken.headers)
        )
    except httpx.TransportError:
        return "closed"
    return f"{answer.status_code} {_code(answer)}"


def _code(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
    except (ValueError, LookupError, TypeError):
        return answer.reason_phrase
    return str(error.get("code") or error.get("type"))


async def leave(url: str, content: bytes, random: Random, *, headers: Sequence[str] = ()) -> str:
    """Send a request for an answer, or a part of it, and close the connection at some moment."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    lines = [f"POST {_CHAT} HTTP/1.1", f"Host: {address.netloc}", *headers]
    lines += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
    request = "\r\n".join(lines).encode() + content
    when = random.choice(("connected", "half sent", "sent", "sent", "waiting", "read", "read"))
    try:
        if when == "half sent":
            writer.write(request[: random.randrange(1, len(request))])
        elif when != "connected":
            writer.write(request)
            await writer.drain()
        if when == "waiting":
            await asyncio.sleep(random.uniform(0.0, 1.0))
        elif when == "read":
            for _ in range(random.randrange(1, 8)):
                if not await asyncio.wait_for(reader.read(400), 60):
                    break
    except (ConnectionError, TimeoutError, asyncio.TimeoutError):
        when = f"{when}, cut off"  # refused before all was sent, or no data within the timeout
    finally:
        # A reset and an orderly end of the connection reach the server in different ways.
        if random.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
    return when
