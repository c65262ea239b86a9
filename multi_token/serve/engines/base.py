"""What is asked of an engine, and what it says while it answers.

Border: types only. static.py, continuous.py and vllm.py hold engines; none of them knows text, nor
the HTTP of clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

from multi_token.types import MediaSpan

if TYPE_CHECKING:
    from multi_token.serve.engines.prefix_hits import PrefixCacheStats


@dataclass(frozen=True)
class Prompt:
    """What is to be continued: ids, and what the projectors made of each media item."""

    input_ids: Tensor
    """int64 [time], with filler ids in media spans."""
    media_spans: tuple[MediaSpan, ...]
    """Where each item's tokens stand, in reading order."""
    media_embeds: tuple[Tensor, ...]
    """For each place float [length, dim], what its projector made."""
    media_keys: tuple[str, ...]
    """For each place; equal only for equal content, encoder, projector and tenant."""
    tenant: str = ""
    """Who asks; what is kept of a prompt is not used for another one."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when an answer ends."""

    max_new_tokens: int
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities add up to so much."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    seed: int | None = None
    """Equal seeds give equal answers to equal prompts."""
    num_logprobs: int | None = None
    """None: no log-probabilities; 0: of the chosen token; n: also of the n likeliest."""
    ignore_eos: bool = False
    """Go on behind the model's end of turn until `max_new_tokens`."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token. `logprob`: of the model's own distribution, before temperature and top-p."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids with their log-probabilities, likeliest first."""
    num_cached: int = 0
    """Of an answer's first token: how many of the prompt's the engine had computed already."""


@dataclass(frozen=True)
class FinishEvent:
    """The answer is complete: the model ended it, it is as long as allowed, or was cancelled."""

    reason: Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class ErrorEvent:
    """The answer will not be completed."""

    error: Exception


EngineEvent = TokenEvent | FinishEvent | ErrorEvent


class Engine(Protocol):
    """Continues prompts, many at once, in a thread of its own."""

    name: str
    max_tokens: int | None
    """Of a prompt and its answer together; None: no limit."""

    def start(self) -> None:
        """Begin to answer; again after a stop or a dead thread. Raises ServeError if it cannot."""
        ...

    def stop(self) -> None:
        """Cancel what runs and waits, and end the thread."""
        ...

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Queue a prompt; returns at once.

        `emit` is called from the engine's thread, or from the one that cancels or stops, and must
        not block: any number of Token, then exactly one End or Failure. Raises ServeError for a
        prompt that is wrong by itself (too long, not finite), before it is queued.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End an answer early; a finished or unknown id is no error. End("cancelled") follows."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs and takes prompts."""
        ...

    @property
    def num_running(self) -> int:
        """Prompts that are being answered."""
        ...

    @property
    def num_waiting(self) -> int:
        """Prompts that wait for their turn."""
        ...


@runtime_checkable
class SupportsPrefixStats(Protocol):
    """An engine whose prompts share one cache of keys and values, and that tells of it."""

    prefix_stats: PrefixCacheStats
    """How much of prompts was there already."""

    @property
    def cache_usage(self) -> float:
        """The part of the cache that answers hold, 0 to 1."""
        ...


@runtime_checkable
class SupportsReplicas(Protocol):
    """An engine that has prompts answered by others, and tells of them."""

    retries: Counter[str]
    """Prompts that were handed to another engine, by why."""

    @property
    def num_replicas(self) -> int:
        """Those that are used now."""
        ...
