"""Engine contract: prompts and sampling parameters in, token events out.

Types, and the checks that every engine makes before it queues a prompt. Engines know neither text
nor HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from torch import Tensor

from multi_token.serve.errors import ServeError
from multi_token.types import MediaSpan

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration


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


class Engine(Protocol):
    """Generates for many prompts at once, in a thread of its own."""

    name: str
    max_tokens: int | None
    """Limit of prompt and new tokens together; None: no limit."""

    def start(self) -> None:
        """Start the thread; again after a stop or a dead thread. Raises ServeError on failure."""
        ...

    def stop(self) -> None:
        """Cancel running and waiting requests, and end the thread."""
        ...

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Queue a prompt; returns at once.

        `emit` is called from the engine's thread, or from the thread that cancels or stops, and
        must not block. It receives any number of TokenEvents, then one FinishEvent or ErrorEvent.
        Raises ServeError before queueing if the prompt is invalid (too long, NaN or inf).
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request early; FinishEvent("cancelled") follows. Unknown ids are ignored."""
        ...

    @property
    def is_alive(self) -> bool:
        """True while the engine accepts prompts."""
        ...

    @property
    def num_running(self) -> int:
        """Number of requests in prefill or decoding."""
        ...

    @property
    def num_waiting(self) -> int:
        """Number of queued requests."""
        ...


@runtime_checkable
class SupportsPrefixStats(Protocol):
    """Engine with a prefix cache, and its statistics."""

    prefix_stats: PrefixCacheStats

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that running requests occupy, 0 to 1."""
        ...


@runtime_checkable
class SupportsReplicas(Protocol):
    """Engine that dispatches prompts to replicas, and their statistics."""

    retries: Counter[str]
    """Number of prompts sent to a second replica, by reason."""

    @property
    def num_replicas(self) -> int:
        """Number of replicas that are up."""
        ...


class PrefixCacheStats:
    """Totals since the start. `num_queries`: prompt tokens; `num_hits`: of these, cached ones."""

    def __init__(self) -> None:
        self.num_queries = 0
        self.num_hits = 0

    def record(self, num_prompt_tokens: int, num_cached: int) -> None:
        """Count one prompt."""
        self.num_queries += num_prompt_tokens
        self.num_hits += num_cached


def context_length(model: MultiTokenForConditionalGeneration) -> int | None:
    """Return the context length of the language model's config; None if it names none."""
    config = getattr(model.language_model, "config", None)
    text = config.get_text_config() if config is not None else None
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def min_limit(*limits: int | None) -> int | None:
    """Return the smallest limit; None stands for no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def check_prompt(
    model: MultiTokenForConditionalGeneration,
    prompt: Prompt,
    options: SamplingParams,
    max_tokens: int | None,
) -> None:
    """Raise ServeError for a prompt that no engine can run.

    Too long, no room for a new token, media that disagree with their spans, NaN or inf.
    """
    num_ids = len(prompt.input_ids)
    if num_ids == 0:
        raise ServeError("the prompt is empty; send a message", param="messages")
    if options.max_new_tokens < 1:
        raise ServeError(
            f"expected max_tokens of at least 1, got {options.max_new_tokens}", param="max_tokens"
        )
    if max_tokens is not None and num_ids + options.max_new_tokens > max_tokens:
        raise ServeError(
            f"this prompt has {num_ids} tokens and asks for {options.max_new_tokens} more, over "
            f"the limit of {max_tokens} for both; shorten the messages or lower max_tokens",
            param="messages",
            code="context_length_exceeded",
        )
    _check_media(model, prompt)


def _check_media(model: MultiTokenForConditionalGeneration, prompt: Prompt) -> None:
    counts = (len(prompt.media_spans), len(prompt.media_embeds), len(prompt.media_keys))
    if len(set(counts)) > 1:
        raise ServeError(
            "expected equal numbers of media spans, embeddings and keys, got {}, {} and {}".format(
                *counts
            ),
            status=500,
        )
    dim = model.get_input_embeddings().weight.shape[1]  # type: ignore[index,union-attr]
    end = 0
    for span, embeds in zip(prompt.media_spans, prompt.media_embeds, strict=True):
        if embeds.shape != (span.length, dim) or span.start < end:
            raise ServeError(
                f"the media embeddings of {span.modality!r} have shape {tuple(embeds.shape)}, "
                f"expected {(span.length, dim)} after the previous item",
                status=500,
            )
        end = span.start + span.length
        if not bool(embeds.isfinite().all()):
            raise ServeError(
                f"the media embeddings of {span.modality!r} contain NaN or inf; send another item",
                param="messages",
            )
    if end > len(prompt.input_ids):
        raise ServeError("a media span ends after the prompt", status=500)
    # generation by ids starts from the last prompt id, and a filler id has no meaning of its own
    if end == len(prompt.input_ids) and model.capabilities.prefill_mode == "ids":
        raise ServeError(
            "the prompt ends with a media item, but this language model needs text at the end; "
            "add a text after the item",
            param="messages",
        )
