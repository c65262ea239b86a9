"""Response objects of OpenAI's API: completions, chunks, usage, log-probabilities, errors."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers.convert_slow_tokenizer import bytes_to_unicode

from multi_token.serve.engines.base import TokenEvent
from multi_token.serve.errors import ServeError

FinishReason = Literal["stop", "length"]
SSE_DONE = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0
"""OpenAI's value in place of -inf, which JSON cannot hold."""


@dataclass(frozen=True)
class Usage:
    """Token counts of a request. `media`: media tokens of each modality by its name."""

    num_prompt_tokens: int
    media: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Name of a modality -> `image` or `audio`, where OpenAI's usage has a field for it."""

    def as_json(self, num_completion: int, num_cached: int = 0) -> dict[str, Any]:
        """OpenAI's `usage` object, with `media_tokens` added to the prompt's details.

        `num_cached`: prompt tokens served from the prefix cache.
        """

        def num_of(kind: str) -> int:
            return sum(n for name, n in self.media.items() if self.kinds.get(name) == kind)

        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_completion,
            "total_tokens": self.num_prompt_tokens + num_completion,
            "prompt_tokens_details": {
                "text_tokens": self.num_prompt_tokens - sum(self.media.values()),
                "image_tokens": num_of("image"),
                "audio_tokens": num_of("audio"),
                "cached_tokens": num_cached,
                "media_tokens": dict(self.media),
            },
        }


@dataclass(frozen=True)
class Completion:
    """One complete choice."""

    text: str
    finish: FinishReason
    logprobs: dict[str, Any] | None


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the objects of one response, which share id, time and model."""

    id: str
    created: int
    model: str
    with_usage: bool = False
    """True if a stream ends with a usage chunk."""

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def completion(
        self, completions: Sequence[Completion], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Build a complete response."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish,
            }
            for index, completion in enumerate(completions)
        ]
        return {**self._envelope("chat.completion", choices), "usage": usage}

    def chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish: FinishReason | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Build a stream chunk of one choice."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        fields = self._envelope("chat.completion.chunk", [choice])
        # With include_usage, OpenAI sends "usage": null in every chunk before the last.
        return {**fields, "usage": None} if self.with_usage else fields

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Build the last chunk of a stream with usage: no choices."""
        return {**self._envelope("chat.completion.chunk", []), "usage": usage}


def sse_event(fields: Mapping[str, Any]) -> bytes:
    """Encode a server-sent event."""
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def error_body(error: ServeError, error_id: str) -> bytes:
    """Encode the body of an error response."""
    return json.dumps(error.as_json(error_id)).encode()


def error_headers(error: ServeError) -> list[tuple[str, str]]:
    """Build the headers of an error response, with `retry-after` and `x-should-retry`."""
    headers = [("content-type", "application/json")]
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    if error.retry_after is not None:
        headers.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
    if error.code == "shutting_down":
        headers.append(("connection", "close"))
    # OpenAI's client repeats 5xx by itself unless x-should-retry says no. After 500 and 504 the
    # same request would take as long and fail again.
    retry = error.retry
    if retry is None and error.status in (500, 504):
        retry = False
    if retry is not None:
        headers.append(("x-should-retry", "true" if retry else "false"))
    return headers


class TokenText:
    """Text and bytes of single token ids, for `logprobs`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
        kinds = {decoder.get("type"), *(d["type"] for d in decoder.get("decoders", []))}
        # Byte-level BPE writes each byte as a printable letter; this is the inverse.
        letters = bytes_to_unicode() if "ByteLevel" in kinds else {}
        self._byte_of_letter = {letter: byte for byte, letter in letters.items()}
        self._cached_bytes = functools.lru_cache(maxsize=65_536)(self._token_bytes)

    def logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any]:
        """Build OpenAI's `logprobs` object of these tokens."""
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
        return {"token": data.decode("utf-8", "replace"), "logprob": value, "bytes": list(data)}

    def _token_bytes(self, id: int) -> bytes:
        # Not `decode`: a token may be a part of a character, and would decode to U+FFFD.
        piece = self.tokenizer.convert_ids_to_tokens(id) or ""
        if id in self.tokenizer.added_tokens_decoder:
            return piece.encode("utf-8", "replace")
        if piece and all(letter in self._byte_of_letter for letter in piece):
            return bytes(self._byte_of_letter[letter] for letter in piece)
        # SentencePiece: <0xE2> is a byte that no piece covers, and U+2581 marks a space.
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode("utf-8", "replace")
