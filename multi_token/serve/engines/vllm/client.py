"""vLLM's HTTP contract: what `/v1/completions` is asked, what comes back, and its faults.

Border: the only file that knows vLLM's fields (measured on 0.32) and that opens sockets to engines.
Which engine is asked, and what follows a fault, is engine_pool.py's. Of answers only JSON is read.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.serve.engines.base import SamplingParams, TokenEvent

FaultReason = Literal["unreachable", "full", "failed", "lost", "rejected"]
_CONNECT_S = 5.0
_HEALTH_S = 5.0
_MAX_EVENT_BYTES = 4 * 1024 * 1024
_MAX_FAULT_BYTES = 64 * 1024
_TOKEN_ID = "token_id:"
_STATUSES_OF_BAD_PROMPTS = (400, 413, 422)


class EngineError(MultiTokenError):
    """An engine did not answer. `reason`: no connection (`unreachable`), no place (`full`), an
    answer that is an error (`failed`), one that broke off (`lost`), a prompt that it does not take
    (`rejected`).
    """

    def __init__(self, message: str, reason: FaultReason) -> None:
        super().__init__(message)
        self.reason: FaultReason = reason


@dataclass(frozen=True)
class ServedModel:
    """What an engine says that it serves."""

    name: str
    """How its model is called in requests."""
    max_tokens: int | None
    """Of a prompt and its answer together."""


@dataclass(frozen=True)
class StreamDelta:
    """What one event of a stream brings."""

    tokens: tuple[TokenEvent, ...]
    finish: str | None = None
    """Why the answer ends here: `stop` or `length`."""
    stop_id: int | None = None
    """The id that ended it, where vLLM says it."""


def completion_body(
    prompt: Sequence[int] | Tensor,
    options: SamplingParams,
    *,
    model: str,
    end_ids: Iterable[int],
    salt: str | None = None,
) -> bytes:
    """The body of a request. `prompt`: ids, or embeddings [time, hidden] of the whole prompt.

    Every field of sampling is named: vLLM fills those that are not from the generation config in
    its model's folder. `salt`: prompts under another one share no cached keys and values.
    """
    fields: dict[str, Any] = {
        "model": model,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": options.ignore_eos,
        # vLLM heeds these even where it ignores the model's own
        "stop_token_ids": [] if options.ignore_eos else sorted(end_ids),
        "stream": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if options.seed is not None:
        fields["seed"] = options.seed % 2**63
    if options.num_logprobs is not None:
        fields["logprobs"] = options.num_logprobs
    if salt is not None:
        fields["cache_salt"] = salt
    if isinstance(prompt, Tensor):
        fields["prompt_embeds"] = _base64(prompt)
    else:
        fields["prompt"] = list(prompt)
    return json.dumps(fields).encode()


def _base64(embeds: Tensor) -> str:
    file = io.BytesIO()
    # a clone: of a part of a tensor the whole storage would be written
    torch.save(embeds.detach().cpu().contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


class VllmClient:
    """One engine over HTTP, within one event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url`: without `/v1`. `key`: what `vllm serve --api-key` was given."""
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Whether `/health` says so in time."""
        try:
            return (await self._http.get("/health", timeout=_HEALTH_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def served_model(self) -> ServedModel:
        """The first of `/v1/models`. Raises EngineFault."""
        try:
            response = await self._http.get("/v1/models", timeout=_HEALTH_S)
        except httpx.HTTPError as error:
            raise EngineError(f"GET /v1/models: {_error_message(error)}", "unreachable") from None
        if response.status_code != 200:
            raise _engine_error(response.status_code, response.content)
        try:
            first = response.json()["data"][0]
            name, length = first["id"], first.get("max_model_len")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EngineError(
                "GET /v1/models brings no list of models; is it vLLM?", "failed"
            ) from None
        return ServedModel(str(name), length if isinstance(length, int) else None)

    async def complete(self, body: bytes, num_top: int = 0) -> AsyncIterator[StreamDelta]:
        """The answer to a request as it comes. Raises EngineFault.

        `num_top`: of the likeliest ids with each token.

        Left early, the connection is closed, and vLLM gives the place to the next.
        """
        has_begun = False
        headers = {"Content-Type": "application/json"}
        try:
            async with self._http.stream(
                "POST", "/v1/completions", content=body, headers=headers
            ) as response:
                if response.status_code != 200:
                    raise _engine_error(response.status_code, await _first_bytes(response))
                has_begun = True
                async for fields in _sse_events(response):
                    delta = read_event(fields, num_top)
                    if delta is not None:
                        yield delta
        except httpx.HTTPError as error:
            is_connected = has_begun or not isinstance(
                error, (httpx.ConnectError, httpx.ConnectTimeout)
            )
            raise EngineError(
                _error_message(error), "lost" if is_connected else "unreachable"
            ) from None


def read_event(fields: Mapping[str, Any], num_top: int = 0) -> StreamDelta | None:
    """One event of a stream, parsed; None for one without a choice. Raises EngineFault."""
    try:
        if "error" in fields:
            error = fields["error"]
            told = error if isinstance(error, dict) else {"message": error}
            raise EngineError(str(told.get("message")), _reason(told.get("code")))
        if not fields["choices"]:
            return None
        choice = fields["choices"][0]
        ids = choice.get("token_ids") or []
        tokens = tuple(_tokens(ids, choice.get("logprobs"), num_top))
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise EngineError("an event of another form than vLLM's", "failed") from None
    if finish not in (None, "stop", "length"):
        raise EngineError(f"the engine ended the answer ({finish})", "failed")
    return StreamDelta(tokens, finish, stop if isinstance(stop, int) else None)


def _tokens(
    ids: Sequence[Any], logprobs: Mapping[str, Any] | None, num_top: int
) -> list[TokenEvent]:
    if not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError("ids are whole numbers")
    if logprobs is None:
        return [TokenEvent(id) for id in ids]
    tokens = []
    for id, own, entry in zip(
        ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        likeliest = [(_id(key), float(value)) for key, value in (entry or {}).items()]
        likeliest.sort(key=lambda pair: -pair[1])
        # the chosen one is there even if it is none of the likeliest
        top = tuple(likeliest[:num_top])
        tokens.append(TokenEvent(id, None if own is None else float(own), top))
    return tokens


def _id(key: str) -> int:
    if not key.startswith(_TOKEN_ID):
        raise ValueError("expected token_id:ID")
    return int(key.removeprefix(_TOKEN_ID))


async def _sse_events(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """The objects of a stream of events, until its [DONE]. Raises EngineFault if there is none."""
    rest, is_done = b"", False
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MAX_EVENT_BYTES:
            raise EngineError(f"an event of over {_MAX_EVENT_BYTES} bytes", "failed")
        for line in lines:
            text = line.strip().removeprefix(b"data:").strip()
            if text == b"[DONE]":
                is_done = True  # and read on: a body that is read whole leaves its connection free
            if is_done or not text or not line.startswith(b"data:"):
                continue
            try:
                fields = json.loads(text)
            except ValueError:
                raise EngineError("an event that is no JSON", "failed") from None
            if not isinstance(fields, dict):
                raise EngineError("an event that is no object", "failed")
            yield fields
    if not is_done:
        raise EngineError("the answer broke off", "lost")


async def _first_bytes(response: httpx.Response) -> bytes:
    """The first bytes of a body."""
    found = b""
    async for data in response.aiter_bytes():
        found += data
        if len(found) > _MAX_FAULT_BYTES:
            break
    return found


def _engine_error(status: int, body: bytes) -> EngineError:
    message = body[:500].decode("utf-8", "replace")
    try:
        fields = json.loads(body)
        error = fields.get("error", fields)
        message = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass  # then it is told as it is
    reason = _reason(status)
    return EngineError(message if reason == "rejected" else f"HTTP {status}: {message}", reason)


def _reason(status: Any) -> FaultReason:
    """What a status means; a stream that has begun with 200 says it in an event."""
    if status in (429, 503):
        return "full"
    return "rejected" if status in _STATUSES_OF_BAD_PROMPTS else "failed"


def _error_message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
