"""Types of the engines: prompts and sampling parameters in, token events out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from multi_token.types import MediaSpan


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the media embeddings that replace the ids of each span."""

    input_ids: Tensor
    """int64 [time], with filler ids in media spans."""
    media_spans: tuple[MediaSpan, ...]
    """Span of each media item, in the order of `input_ids`."""
    media_embeds: tuple[Tensor, ...]
    """For each span float [length, dim]: the projector's output."""
    media_keys: tuple[str, ...]
    """For each span a key: equal only for equal content, encoder, projector and tenant."""
    tenant: str = ""
    """Client identity; cached state is never shared between tenants."""


@dataclass(frozen=True)
class SamplingParams:
    """Choice of the next token, and the end of generation."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to `top_p`."""
    top_k: int = 0
    """Sample from the `top_k` most probable tokens; 0 means all."""
    seed: int | None = None
    """Equal seeds give equal tokens for equal prompts."""
    num_logprobs: int | None = None
    """Log-probabilities to emit. None: none; 0: the chosen token's; N: also of N top tokens."""
    ignore_eos: bool = False
    """Generate `max_new_tokens` tokens, past the model's end of turn."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token."""

    id: int
    logprob: float | None = None
    """Natural logarithm, of the model's own distribution before temperature and top-p."""
    top: tuple[tuple[int, float], ...] = ()
    """Most probable ids with their log-probabilities, in descending order."""
    num_cached: int = 0
    """First token only: number of prompt tokens that the prefix cache held."""


@dataclass(frozen=True)
class FinishEvent:
    """Generation ended: by an end-of-turn token, at the length limit, or cancelled."""

    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class ErrorEvent:
    """Generation failed; no further event follows."""

    error: Exception


EngineEvent = TokenEvent | FinishEvent | ErrorEvent


@dataclass
class PrefixCacheStats:
    """Totals since the start: prompt tokens (`num_queries`), and the cached ones (`num_hits`)."""

    num_queries: int = 0
    num_hits: int = 0

    def record(self, num_prompt_tokens: int, num_cached: int) -> None:
        self.num_queries += num_prompt_tokens
        self.num_hits += num_cached
