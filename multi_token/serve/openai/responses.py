"""The answer in OpenAI's form: objects, chunks of a stream, log-probabilities, errors.

Border: plain dicts and bytes; nothing is waited for here, and nothing generated.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from multi_token.serve.engines.base import TokenEvent
from multi_token.serve.errors import ServeError

FinishReason = Literal["stop", "length"]
SSE_DONE = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0
"""OpenAI's value for what is next to impossible: JSON has no infinity."""


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. `media`: of each sense, by its name in the run."""

    num_prompt_tokens: int
    media: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Name of a sense -> `image` or `audio`, for those that OpenAI's fields can say."""

    def as_json(self, num_completion: int, num_cached: int = 0) -> dict[str, Any]:
        """OpenAI's `usage`, with `media_tokens` beside its own details.

        `num_cached`: tokens of the prompt that the engine had computed before, if it says.
        """
        of_kind = {
            kind: sum(n for name, n in self.media.items() if self.kinds.get(name) == kind)
            for kind in ("image", "audio")
        }
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_completion,
            "total_tokens": self.num_prompt_tokens + num_completion,
            "prompt_tokens_details": {
                "text_tokens": self.num_prompt_tokens - sum(self.media.values()),
                "image_tokens": of_kind["image"],
                "audio_tokens": of_kind["audio"],
                "cached_tokens": num_cached,
                "media_tokens": dict(self.media),
            },
        }


@dataclass(frozen=True)
class ResponseBuilder:
    """What every object of one answer has."""

    id: str
    created: int
    model: str

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def completion(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """The whole answer."""
        return {**self._envelope("chat.completion", list(choices)), "usage": usage}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish: FinishReason | None = None,
        logprobs: dict[str, Any] | None = None,
        with_usage: bool = False,
    ) -> dict[str, Any]:
        """A piece of one choice. `with_usage`: the stream ends with usage, so here it is null."""
        completion_choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }
        fields = self._envelope("chat.completion.chunk", [completion_choice])
        return {**fields, "usage": None} if with_usage else fields

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, if usage was asked for."""
        return {**self._envelope("chat.completion.chunk", []), "usage": usage}


def completion_choice(
    index: int, text: str, finish: FinishReason, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    """One whole choice."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": logprobs,
        "finish_reason": finish,
    }


def sse_event(fields: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def error_body(error: ServeError, error_id: str) -> bytes:
    """The body of a failed request."""
    return json.dumps(error.as_json(error_id)).encode()


def error_headers(error: ServeError) -> list[tuple[str, str]]:
    """Its headers: whether and when to try again is said to clients that listen to it."""
    headers = [("content-type", "application/json")]
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    if error.retry_after is not None:
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
    if error.code == "shutting_down":
        headers.append(("connection", "close"))
    retry = error.retry
    if retry is None and error.status in (500, 504):
        retry = False  # the same again would cost the same again
    if retry is not None:
        headers.append(("x-should-retry", "true" if retry else "false"))
    return headers


class TokenText:
    """The text and bytes of single ids, as log-probabilities are told."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type"), *(d["type"] for d in decoder.get("decoders", []))}
        self._byte_of_letter = _byte_of_letter() if "ByteLevel" in kinds else None
        self._cached_bytes = functools.lru_cache(maxsize=65_536)(self._token_bytes)

    def logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """Some tokens' `logprobs`."""
        return {
            "content": [
                {
                    **self._entry(token.id, token.logprob),
                    "top_logprobs": [self._entry(id, logprob) for id, logprob in token.top],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _entry(self, id: int, logprob: float | None) -> dict[str, Any]:
        data = self._cached_bytes(id)
        value = _LOWEST_LOGPROB if logprob is None else max(logprob, _LOWEST_LOGPROB)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": value,
            "bytes": list(data),
        }

    def _token_bytes(self, id: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(id) or ""
        if id in self.tokenizer.added_tokens_decoder:
            return piece.encode("utf-8", "replace")
        if self._byte_of_letter is not None and all(
            letter in self._byte_of_letter for letter in piece
        ):
            return bytes(self._byte_of_letter[letter] for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode("utf-8", "replace")


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE's letter for each byte, the other way round."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
