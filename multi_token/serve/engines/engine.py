"""Engine: base class of the local and the vLLM engine.

The base class checks prompts and keeps each request from `submit` to its last event. A subclass
generates for the requests in a thread.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from multi_token.generate import eos_token_ids
from multi_token.serve.engines.base import EngineEvent, PrefixCacheStats, Prompt, SamplingParams
from multi_token.serve.engines.request import GenerationRequest
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

RUNNING = ("prefill", "decoding")
"""States of a request that the engine generates for."""


class Engine(ABC):
    """Generates for many prompts at once, in a thread of its own. Public methods are thread-safe.

    Attributes:
        model: the model, with its processor.
        max_tokens: limit of prompt and new tokens together; None: no limit.
        prefix_stats: totals of the prefix cache in this process.
        retries: number of prompts sent to a second replica, by reason.
    """

    name: str
    is_remote: bool = False
    """True for a gateway: prompts go to replicas, which have prefix caches of their own."""

    def __init__(self, model: MultiTokenForConditionalGeneration, *max_tokens: int | None) -> None:
        """`max_tokens`: limits beside the language model's context length; None: no limit."""
        self.model = model
        self.max_tokens = min_limit(context_length(model), *max_tokens)
        self.prefix_stats = PrefixCacheStats()
        self.retries: Counter[str] = Counter()
        self._end_ids = frozenset(eos_token_ids(model))
        # Reentrant: a callback may cancel or submit inside of a locked section. A request's own
        # lock is always taken first, since a request that ends removes itself from `_requests`.
        self._condition = threading.Condition(threading.RLock())
        self._requests: dict[str, GenerationRequest] = {}
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    @abstractmethod
    def start(self) -> None:
        """Start the thread, also again after `stop` or a failure. No effect on a running engine.

        Raises LanguageModelError if the engine cannot generate for this model.
        """

    def stop(self) -> None:
        """Cancel running and waiting requests, and end the thread after its current step."""
        with self._condition:
            self._is_stopping = True
        for request in self._unfinished():
            self._cancel_request(request)
        if self._thread is not None and self._thread.is_alive():
            self._wake_thread()
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Queue a prompt; returns at once.

        `emit` receives any number of TokenEvents, then one FinishEvent or ErrorEvent. It is called
        from the engine's thread, or from the thread that cancels or stops, and must not block.
        Raises ServeError for an invalid prompt (too long, say), or if the engine is down.
        """
        check_prompt(self.model, prompt, options, self.max_tokens)
        request = GenerationRequest(request_id, prompt, options, emit, self._end_ids, self._remove)
        # Under the lock: a thread that dies fails all queued requests, and a request that is queued
        # after that would wait forever.
        with self._condition:
            if not self.is_alive:
                raise self._unavailable_error()
            if request_id in self._requests:
                raise ServeError("a request with this id is running", param="request_id")
            self._requests[request_id] = request
            self._start_request(request)

    def cancel(self, request_id: str) -> None:
        """End a request early; FinishEvent("cancelled") follows. Unknown ids are ignored."""
        with self._condition:
            request = self._requests.get(request_id)
        # Outside of the lock: `cancel` calls the client, which may submit to this engine.
        if request is not None:
            self._cancel_request(request)

    @property
    def is_alive(self) -> bool:
        """True while the engine accepts prompts."""
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    @property
    def stalled_s(self) -> float:
        """Seconds since the last progress of the step in flight; 0 between steps."""
        return 0.0

    @property
    def num_running(self) -> int:
        """Number of requests in prefill or decoding."""
        return sum(request.state in RUNNING for request in self._unfinished())

    @property
    def num_waiting(self) -> int:
        """Number of queued requests."""
        return sum(request.state == "waiting" for request in self._unfinished())

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that running requests occupy, 0 to 1."""
        return 0.0

    @property
    def num_replicas(self) -> int:
        """Number of replicas that are up; 0 for an engine in this process."""
        return 0

    def _start_request(self, request: GenerationRequest) -> None:
        """Let the thread see a queued request."""
        self._condition.notify_all()

    def _cancel_request(self, request: GenerationRequest) -> None:
        request.cancel()

    def _wake_thread(self) -> None:
        """Let the thread see `_is_stopping`."""
        with self._condition:
            self._condition.notify_all()

    def _unfinished(self) -> list[GenerationRequest]:
        """Return waiting and running requests, in the order of their arrival."""
        with self._condition:
            return list(self._requests.values())

    def _remove(self, request: GenerationRequest) -> None:
        with self._condition:
            # The id may already belong to a later request.
            if self._requests.get(request.id) is request:
                del self._requests[request.id]

    def _fail_unfinished(self) -> None:
        for request in self._unfinished():
            request.fail(ServeError("the engine has failed", status=503))

    def _unavailable_error(self) -> ServeError:
        return ServeError("the engine is not running", status=503)


def context_length(model: MultiTokenForConditionalGeneration) -> int | None:
    """Return the context length of the language model's config; None if it names none."""
    config = model.language_model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def min_limit(*limits: int | None) -> int | None:
    """Return the smallest limit; None means no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def check_prompt(
    model: MultiTokenForConditionalGeneration,
    prompt: Prompt,
    options: SamplingParams,
    max_tokens: int | None,
) -> None:
    """Raise ServeError for a prompt that no engine can run.

    The prompt is empty or too long, or its media do not match their spans. Only shapes are looked
    at: `MediaEmbedder` checks values once, in its thread. A value that is read here would hold up
    the event loop for every item of every choice, on a GPU until the decode step in flight ends.
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
    dim = model.get_input_embeddings().weight.shape[1]  # type: ignore[index,union-attr]
    end = 0
    media = zip(prompt.media_spans, prompt.media_embeds, prompt.media_keys, strict=True)
    for span, embeds, _ in media:
        if embeds.shape != (span.num_embeds, dim) or span.start < end:
            raise ServeError(
                f"the media embeddings of {span.modality!r} have shape {tuple(embeds.shape)}, "
                f"expected {(span.num_embeds, dim)} after the previous item",
                status=500,
            )
        end = span.start + span.length
    if end > len(prompt.input_ids):
        raise ServeError("a media span ends after the prompt", status=500)
    # Generation by ids starts from the last prompt id, and a filler id has no meaning of its own.
    if end == len(prompt.input_ids) and model.capabilities.prefill_mode == "ids":
        raise ServeError(
            "the prompt ends with a media item, but this language model needs text at the end; "
            "add a text after the item",
            param="messages",
        )
