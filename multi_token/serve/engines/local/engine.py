"""Local engine: iteration-level (continuous) batching of any language model, in one thread.

start:  find the batching mode and whether the prefix cache reproduces `generate` (parity.py)
loop:   1. take waiting requests that fit the token budget; none running: wait for one
        2. prefill them as a batch, and extend the running batch by it
        3. one decode step for all running requests; finished ones leave
fault:  the requests concerned are retried alone, the others go on (fallback.py)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multi_token.generate import eos_token_ids
from multi_token.serve.engines.base import (
    EngineEvent,
    PrefixCacheStats,
    Prompt,
    SamplingParams,
    check_prompt,
    context_length,
    min_limit,
)
from multi_token.serve.engines.fallback import check_model_alive, generate_batch, retry_individually
from multi_token.serve.engines.local.decode_loop import DecodeBatch, DecodeParams
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.parity import (
    BatchingMode,
    find_batching_mode,
    supports_prefix_cache,
)
from multi_token.serve.engines.request import GenerationRequest, fail_request
from multi_token.serve.engines.scheduler import Scheduler
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)
_MAX_PREFILL_TOKENS = 512
"""Prompt tokens of one prefill, so that running requests do not wait long for their next token."""


class LocalEngine:
    """Generates in process, for every language model that `generate` supports.

    Mode `continuous`: requests join and leave the batch between decode steps. `shrinking`: requests
    only leave, and waiting ones start with the next batch. `static`: a batch runs to its end
    through `generate`. The first mode that reproduces `generate` at startup is used. Where padding
    changes results, only prompts of one length share a batch.

    In mode `continuous`, prompts reuse the KV cache of earlier prompts of the same tenant with the
    same prefix: a system message, an image that is asked about again, a longer conversation.
    """

    name = "local"

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        max_batch: int = 8,
        max_batch_tokens: int = 32768,
        max_tokens: int | None = None,
        prefix_cache_tokens: int = 2048,
    ) -> None:
        """Prepare the engine; `start` runs it.

        Args:
            model: with its processor.
            max_batch: largest number of running requests.
            max_batch_tokens: bound of rows times width of the KV cache, padding and the longest
                possible output included.
            max_tokens: see `Engine`; by default the language model's context length.
            prefix_cache_tokens: tokens of finished requests kept in the prefix cache; 0 disables.
        """
        self.model = model
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_tokens = min_limit(max_tokens, context_length(model), max_batch_tokens)
        self._filler_id = model.require_processor().chat.filler_id
        self._end_ids = frozenset(eos_token_ids(model))
        self.prefix_cache_tokens = prefix_cache_tokens
        self.prefix_stats = PrefixCacheStats()
        self._scheduler = Scheduler()
        self._mode: BatchingMode | None = None
        self._use_prefix_cache = False
        self._batch: DecodeBatch | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Run the startup checks and start the thread.

        Raises LanguageModelError for a model that cannot generate.
        """
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        # before the thread starts, so no request waits for the checks
        if self._mode is None:
            self._mode = find_batching_mode(self.model, self._filler_id)
            if self._mode == "continuous" and self.prefix_cache_tokens:
                self._use_prefix_cache = supports_prefix_cache(self.model, self._filler_id)
            _LOG.info(
                "batching mode %s, prefix cache %s",
                self._mode,
                "on" if self._use_prefix_cache else "off",
            )
        self._is_stopping = False
        self._thread = threading.Thread(target=self._engine_loop, name="local engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel all requests and end the thread after its current step."""
        with self._scheduler.condition:
            self._is_stopping = True
            self._scheduler.condition.notify_all()
        for request in self._scheduler.unfinished():
            request.cancel()
        if self._thread is not None:
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Queue a prompt; see `Engine`."""
        check_prompt(self.model, prompt, options, self.max_tokens)
        request = GenerationRequest(
            request_id, prompt, options, emit, self._end_ids, self._scheduler.remove
        )
        # under the lock: a thread that dies fails all queued requests, and one that is queued
        # after that would wait forever
        with self._scheduler.condition:
            if not self.is_alive:
                raise ServeError("the engine is not running", status=503)
            self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """End a request early; see `Engine`."""
        self._scheduler.cancel(request_id)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    @property
    def cache_usage(self) -> float:
        """Share of `max_batch_tokens` in the KV cache, padding included, 0 to 1."""
        batch = self._batch
        if batch is None or not self.is_alive:
            return 0.0
        return len(batch.requests) * batch.width / self.max_batch_tokens

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def _engine_loop(self) -> None:
        try:
            if self._mode == "static":
                while requests := self._next_requests(None):
                    self._generate_batch(requests)
            else:
                self._batch = self._new_batch()
                self._decode_loop(self._batch)
        # any fault here is the model's or a defect: every client must receive its end
        except Exception as error:  # noqa: BLE001
            _LOG.error("the engine thread ends", exc_info=error)
            with self._scheduler.condition:
                self._is_stopping = True
            for request in self._scheduler.unfinished():
                request.fail(ServeError("the engine has failed", status=503))

    def _new_batch(self) -> DecodeBatch:
        """Return an empty batch with an empty prefix cache: the weights may have changed."""
        prefix_cache = (
            PrefixCache(self.prefix_cache_tokens, self.prefix_stats)
            if self._use_prefix_cache
            else None
        )
        params = DecodeParams.of(
            self.model,
            self._filler_id,
            allow_add=self._mode == "continuous",
            prefix_cache=prefix_cache,
        )
        return DecodeBatch(self.model, params)

    def _generate_batch(self, requests: list[GenerationRequest]) -> None:
        """Mode `static`: run a batch to its end."""
        try:
            generate_batch(self.model, requests, self._filler_id)
        # one prompt must not end the others, whatever it makes the model raise
        except Exception as error:  # noqa: BLE001
            _LOG.error("a batch of %d requests failed", len(requests), exc_info=error)
            retry_individually(self.model, requests, self._filler_id, error)

    def _decode_loop(self, batch: DecodeBatch) -> None:
        while not self._is_stopping:
            if batch.params.allow_add or not batch.requests:
                self._add(batch, self._next_requests(batch))
            try:
                batch.decode_step()
            # one request must not end the others, whatever it makes the model raise
            except Exception as error:  # noqa: BLE001
                requests = batch.requests
                # the KV cache may be half written: no row of it can go on
                batch.clear()
                _LOG.error("a step of %d requests failed", len(requests), exc_info=error)
                retry_individually(self.model, requests, self._filler_id, error)

    def _add(self, batch: DecodeBatch, requests: list[GenerationRequest]) -> None:
        """Prefill requests. A fault concerns these only: the running batch is unchanged."""
        try:
            batch.add(requests)
        # one prompt must not end the others, whatever it makes the model raise
        except Exception as cause:  # noqa: BLE001
            _LOG.error("prefill of %d requests failed", len(requests), exc_info=cause)
            if batch.params.allow_add:
                self._add_individually(batch, requests, cause)
            else:
                retry_individually(self.model, requests, self._filler_id, cause)

    def _add_individually(
        self, batch: DecodeBatch, requests: list[GenerationRequest], cause: Exception
    ) -> None:
        """Prefill one request after the other, after `cause` broke them together."""
        check_model_alive(self.model, cause)
        for request in requests:
            request.restart()
            try:
                batch.add([request])
            # as in `retry_individually`
            except Exception as error:  # noqa: BLE001
                check_model_alive(self.model, error)
                fail_request(request, error)

    def _next_requests(self, batch: DecodeBatch | None) -> list[GenerationRequest]:
        """Return the requests to start now; wait for one if none is running.

        Empty if nothing fits, or if the engine is stopping.
        """
        running = [] if batch is None else batch.requests
        scheduler = self._scheduler
        with scheduler.condition:
            if not running:
                scheduler.condition.wait_for(lambda: scheduler.waiting or self._is_stopping)
            if self._is_stopping:
                return []
            return scheduler.take_next(
                lambda requests: self._fits(batch, len(running), requests),
                max_requests=self.max_batch - len(running),
                # the other modes fill a batch once, with prompts of one length where they must
                allow_overtaking=self._mode != "continuous",
            )

    def _fits(
        self,
        batch: DecodeBatch | None,
        num_running: int,
        requests: Sequence[GenerationRequest],
    ) -> bool:
        """True if these requests may start together: within the token budget, and exact."""
        # a single prompt always fits: `max_tokens` is not above `max_batch_tokens`
        if not num_running and len(requests) == 1:
            return True
        lengths = [len(request.prompt.input_ids) for request in requests]
        is_long = self._mode == "continuous" and sum(lengths) > _MAX_PREFILL_TOKENS
        if is_long and len(requests) > 1:
            return False
        if batch is None:
            longest = max(lengths) + max(request.options.max_new_tokens for request in requests)
        else:
            longest = batch.width_after_adding(requests)
        if longest * (num_running + len(requests)) > self.max_batch_tokens:
            return False
        is_equal = not num_running and len(set(lengths)) == 1
        return is_equal or self.model.capabilities.can_batch_lengths(longest)
