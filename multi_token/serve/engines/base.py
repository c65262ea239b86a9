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
    """For each span float [length, dim], the projector's output."""
    media_keys: tuple[str, ...]
    """For each span; equal only for equal content, encoder, projector and tenant."""
    tenant: str = ""
    """Client identity; cached state is never shared between tenants."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when generation ends."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Sample from the most probable tokens whose probabilities add up to `top_p`."""
    top_k: int = 0
    """Sample from the `top_k` most probable tokens; 0: all."""
    seed: int | None = None
    """Equal seeds give equal tokens for equal prompts."""
    num_logprobs: int | None = None
    """None: no log-probabilities; 0: of the chosen token; n: also of the n most probable."""
    ignore_eos: bool = False
    """Generate `max_new_tokens` tokens, past the model's end of turn."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token. `logprob`: of the model's own distribution, before temperature and top-p."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The most probable ids with their log-probabilities, in descending order."""
    num_cached: int = 0
    """First token only: number of prompt tokens served from the prefix cache."""


@dataclass(frozen=True)
class FinishEvent:
    """Generation ended: by an end-of-turn token, at the length limit, or cancelled."""

    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class ErrorEvent:
    """Generation failed; no further event follows."""

    error: Exception


EngineEvent = TokenEvent | FinishEvent | ErrorEvent


class PrefixCacheStats:
    """Totals since the start. `num_queries`: prompt tokens; `num_hits`: of these, cached ones."""

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_hits = 0

    def record(self, num_prompt_tokens: int, num_cached: int) -> None:
        """Count one prompt."""
        self.num_queries += num_prompt_tokens
        self.num_hits += num_cached
