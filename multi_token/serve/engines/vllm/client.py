"""vLLM client: the HTTP contract of `/v1/completions`, with its streams and errors (vLLM 0.32).

Only this file knows vLLM's fields and opens sockets to its servers. Responses are parsed as JSON,
never unpickled.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import httpx
import torch
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.media.fetch import MIB
from multi_token.serve.engines.base import SamplingParams, TokenEvent

FaultReason = Literal["unreachable", "full", "failed", "lost", "rejected"]
_CONNECT_S = 5.0
_HEALTH_S = 5.0
_MAX_EVENT_BYTES = 4 * MIB
_MAX_FAULT_BYTES = 64 * 1024
_JSON = {"Content-Type": "application/json"}
_TOKEN_ID = "token_id:"
_STATUSES_OF_BAD_PROMPTS = (400, 413, 422)


class EngineError(MultiTokenError):
    """A vLLM server did not complete a request.

    `reason`: no connection (`unreachable`), no capacity (`full`), an error response (`failed`), a
    stream that broke off (`lost`), or a prompt that the server refuses (`rejected`).
    """

    def __init__(self, message: str, reason: FaultReason) -> None:
        super().__init__(message)
        self.reason: FaultReason = reason


@dataclass(frozen=True)
class ServedModel:
    """First entry of a server's `/v1/models`."""

    name: str
    """Name of the model in requests."""
    max_tokens: int | None
    """Limit of prompt and new tokens together."""


@dataclass(frozen=True)
class StreamDelta:
    """One event of a stream."""

    tokens: tuple[TokenEvent, ...]
    finish: str | None = None
    """Finish reason of the last event: `stop` or `length`."""
    stop_id: int | None = None
    """Id that ended generation, if vLLM reports one."""


def completion_body(
    prompt: Sequence[int] | Tensor,
    options: SamplingParams,
    *,
    model: str,
    end_ids: Iterable[int],
    salt: str | None = None,
) -> bytes:
    """Return a request body.

    `prompt`: ids, or embeddings [time, hidden] of the complete prompt. `end_ids` end generation.
    Prompts of different `salt` share no prefix cache.
    """
    # Every sampling field is named: vLLM fills absent ones from the generation config in its
    # model's folder.
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
        # With `ignore_eos` vLLM ignores the model's own end ids, but not these.
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
    # A clone: torch.save writes the complete storage of a view.
    torch.save(embeds.detach().cpu().contiguous().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


class VllmClient:
    """One vLLM server over HTTP, within one event loop."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """`url`: without `/v1`. `key`: the server's `--api-key`."""
        self.url = url
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # No read timeout: a queued prompt may be silent for minutes; health checks end it.
            timeout=httpx.Timeout(None, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def is_healthy(self) -> bool:
        """Return True if `/health` responds with 200 in time."""
        try:
            return (await self._http.get("/health", timeout=_HEALTH_S)).status_code == 200
        except httpx.HTTPError:
            return False

    async def served_model(self) -> ServedModel:
        """Return the first entry of `/v1/models`. Raises EngineError."""
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
                "GET /v1/models returns no list of models; is it vLLM?", "failed"
            ) from None
        return ServedModel(str(name), length if isinstance(length, int) else None)

    async def complete(self, body: bytes, num_top: int = 0) -> AsyncIterator[StreamDelta]:
        """Stream the response to a request. Raises EngineError.

        `num_top`: number of most probable ids with each token. If the iterator is closed early, the
        connection closes too, and vLLM ends the request.
        """
        has_begun = False
        try:
            async with self._http.stream(
                "POST", "/v1/completions", content=body, headers=_JSON
            ) as response:
                if response.status_code != 200:
                    raise _engine_error(response.status_code, await _first_bytes(response))
                has_begun = True
                async for fields in _sse_events(response):
                    delta = parse_event(fields, num_top)
                    if delta is not None:
                        yield delta
        except httpx.HTTPError as error:
            is_connected = has_begun or not isinstance(
                error, (httpx.ConnectError, httpx.ConnectTimeout)
            )
            raise EngineError(
                _error_message(error), "lost" if is_connected else "unreachable"
            ) from None


def parse_event(fields: Mapping[str, Any], num_top: int = 0) -> StreamDelta | None:
    """Parse one event of a stream; None for one without a choice. Raises EngineError."""
    try:
        if "error" in fields:
            error = fields["error"]
            error = error if isinstance(error, dict) else {"message": error}
            raise EngineError(str(error.get("message")), _reason(error.get("code")))
        if not fields["choices"]:
            return None
        choice = fields["choices"][0]
        ids = choice.get("token_ids") or []
        tokens = tuple(_tokens(ids, choice.get("logprobs"), num_top))
        finish, stop = choice.get("finish_reason"), choice.get("stop_reason")
    except (LookupError, TypeError, ValueError, AttributeError):
        raise EngineError("an event in another format than vLLM's", "failed") from None
    if finish not in (None, "stop", "length"):
        raise EngineError(f"vLLM ended the response ({finish})", "failed")
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
        top_ids = [(_id(key), float(value)) for key, value in (entry or {}).items()]
        top_ids.sort(key=lambda pair: -pair[1])
        # vLLM adds the chosen id even if it is not among the most probable ones.
        top = tuple(top_ids[:num_top])
        tokens.append(TokenEvent(id, None if own is None else float(own), top))
    return tokens


def _id(key: str) -> int:
    if not key.startswith(_TOKEN_ID):
        raise ValueError("expected token_id:ID")
    return int(key.removeprefix(_TOKEN_ID))


async def _sse_events(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the JSON objects of an event stream. Raises EngineError if it ends without [DONE]."""
    rest, is_done = b"", False
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > _MAX_EVENT_BYTES:
            raise EngineError(f"an event of over {_MAX_EVENT_BYTES} bytes", "failed")
        for line in lines:
            text = line.strip().removeprefix(b"data:").strip()
            if text == b"[DONE]":
                # No `break`: httpx reuses only a connection whose body was read to its end.
                is_done = True
            if is_done or not text or not line.startswith(b"data:"):
                continue
            try:
                fields = json.loads(text)
            except ValueError:
                raise EngineError("an event that is not JSON", "failed") from None
            if not isinstance(fields, dict):
                raise EngineError("an event that is not a JSON object", "failed")
            yield fields
    if not is_done:
        raise EngineError("the response broke off", "lost")


async def _first_bytes(response: httpx.Response) -> bytes:
    # Bounded: an error page may be endless.
    found = b""
    async for data in response.aiter_bytes():
        found += data
        if len(found) > _MAX_FAULT_BYTES:
            break
    return found


def _engine_error(status: int, body: bytes) -> EngineError:
    message = body[:500].decode("utf-8", "replace")
    # Without vLLM's error object the raw body is the message.
    with suppress(ValueError, AttributeError):
        fields = json.loads(body)
        error = fields.get("error", fields)
        message = str(error.get("message", error) if isinstance(error, dict) else error)
    reason = _reason(status)
    return EngineError(message if reason == "rejected" else f"HTTP {status}: {message}", reason)


def _reason(status: Any) -> FaultReason:
    """Map an HTTP status, or the code in an event of a stream that began with 200."""
    if status in (429, 503):
        return "full"
    return "rejected" if status in _STATUSES_OF_BAD_PROMPTS else "failed"


def _error_message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
