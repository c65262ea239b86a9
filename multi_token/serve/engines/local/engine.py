"""Local engine: iteration-level (continuous) batching of any language model, in one thread.

start:  find the batching mode, and whether the prefix cache reproduces `generate` (parity.py);
        generate for a plain prompt
loop:   1. schedule waiting requests that fit the token budget; wait for one if none is running
        2. prefill them as a batch, and extend the running batch by it
        3. one decode step for all running requests; finished ones leave
fault:  the requests concerned are retried alone, the others go on (fallback.py)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from multi_token.errors import LanguageModelError
from multi_token.serve.engines.engine import RUNNING, Engine
from multi_token.serve.engines.fallback import (
    check_plain_prompt,
    generate_batch,
    retry_individually,
)
from multi_token.serve.engines.local.decode_loop import DecodeBatch, DecodeParams
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.parity import (
    BatchingMode,
    find_batching_mode,
    supports_prefix_cache,
)
from multi_token.serve.engines.request import GenerationRequest
from multi_token.serve.tenants import TenantQueue

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)
_MAX_PREFILL_TOKENS = 512
"""Prompt tokens of one prefill, so that running requests do not wait long for their next token."""


class LocalEngine(Engine):
    """Generates in process, for every language model that `generate` supports.

    The first `BatchingMode` that reproduces `generate` at startup is used. Where padding changes
    results, only prompts of one length share a batch.

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

        `max_batch_tokens` bounds rows times width of the KV cache, with padding and the longest
        possible output. `prefix_cache_tokens`: tokens of finished requests to keep; 0 disables.
        """
        super().__init__(model, max_tokens, max_batch_tokens)
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.prefix_cache_tokens = prefix_cache_tokens
        self._mode: BatchingMode | None = None
        self._use_prefix_cache = False
        self._batch: DecodeBatch | None = None
        self._progressed_at: float | None = None
        """Time of the last progress of the step in flight; None between steps."""
        self._queue: TenantQueue[GenerationRequest] = TenantQueue()
        """Requests that were not taken yet; `_condition` guards it."""

    def start(self) -> None:
        """Run the startup checks and start the thread; see `Engine`."""
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        # Before the thread starts, so no request waits for the checks.
        if self._mode is None:
            self._mode = find_batching_mode(self.model)
            if self._mode == "continuous" and self.prefix_cache_tokens:
                self._use_prefix_cache = supports_prefix_cache(self.model)
            _LOG.info(
                "batching mode %s, prefix cache %s",
                self._mode,
                "on" if self._use_prefix_cache else "off",
            )
        # Also at every restart: after a sticky error of the device each forward raises, and an
        # engine that is alive again would only fail its next requests. A device may also hang.
        self._mark_progress()
        try:
            check_plain_prompt(self.model)
        # Whatever the model raises, it generates for no request.
        except Exception as error:
            raise LanguageModelError(
                "the language model fails on a plain prompt, so nothing can be generated: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._progressed_at = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._engine_loop, name="local engine", daemon=True)
        self._thread.start()

    @property
    def cache_usage(self) -> float:
        """Share of `max_batch_tokens` in the KV cache, padding included, 0 to 1."""
        batch = self._batch
        if batch is None or not self.is_alive:
            return 0.0
        return len(batch.requests) * batch.width / self.max_batch_tokens

    @property
    def stalled_s(self) -> float:
        """See `Engine`; a step makes progress when it begins and at each forward of `generate`."""
        # Not by requests: those of a step that hangs end at their deadlines.
        progressed_at = self._progressed_at
        return 0.0 if progressed_at is None else time.monotonic() - progressed_at

    def _mark_progress(self) -> None:
        self._progressed_at = time.monotonic()

    def _engine_loop(self) -> None:
        try:
            if self._mode == "static":
                while not self._is_stopping:
                    self._run(self._next_requests(None), self._generate)
            else:
                self._batch = self._new_batch()
                self._decode_loop(self._batch)
        # Any fault here is the model's or a defect: every client must receive its end.
        except Exception as error:  # noqa: BLE001
            _LOG.error("the engine thread ends", exc_info=error)
            with self._condition:
                self._is_stopping = True
            # The next start needs the memory of its KV cache.
            self._batch = None
            self._fail_unfinished()
        finally:
            self._progressed_at = None

    def _new_batch(self) -> DecodeBatch:
        """Return an empty batch with an empty prefix cache: the weights may have changed."""
        prefix_cache = None
        if self._use_prefix_cache:
            prefix_cache = PrefixCache(self.prefix_cache_tokens, self.prefix_stats)
        allow_add = self._mode == "continuous"
        return DecodeBatch(DecodeParams(self.model, allow_add=allow_add, prefix_cache=prefix_cache))

    def _generate(self, requests: Sequence[GenerationRequest]) -> None:
        generate_batch(self.model, requests, on_step=self._mark_progress)

    def _decode_loop(self, batch: DecodeBatch) -> None:
        while not self._is_stopping:
            # A fault of prefill concerns the new requests only: the running batch is unchanged.
            if batch.params.allow_add:
                self._run(self._next_requests(batch), batch.add)
            elif not batch.requests:
                self._run(self._next_requests(batch), batch.add, retry=self._generate)
            self._mark_progress()
            try:
                batch.decode_step()
            # One request must not end the others, whatever it makes the model raise.
            except Exception as error:  # noqa: BLE001
                requests = batch.requests
                # The KV cache may be half written: no row of it can go on.
                batch.clear()
                retry_individually(self.model, requests, self._generate, error)

    def _run(
        self,
        requests: list[GenerationRequest],
        run: Callable[[Sequence[GenerationRequest]], None],
        *,
        retry: Callable[[Sequence[GenerationRequest]], None] | None = None,
    ) -> None:
        """Run requests together; after a fault, each alone through `retry`, by default `run`."""
        try:
            run(requests)
        # One request must not end the others, whatever it makes the model raise.
        except Exception as error:  # noqa: BLE001
            retry_individually(self.model, requests, retry or run, error)

    def _next_requests(self, batch: DecodeBatch | None) -> list[GenerationRequest]:
        """Schedule: return the requests to start now; wait for one if none is running.

        Tenants in turn, each first come, first served, as long as `_fits` holds. Empty if the first
        one does not fit.
        """
        num_running = 0 if batch is None else len(batch.requests)
        with self._condition:
            if not num_running:
                self._progressed_at = None
                self._condition.wait_for(lambda: len(self._queue) or self._is_stopping)
            self._mark_progress()
            num_of_tenant = Counter(
                request.prompt.tenant
                for request in self._requests.values()
                if request.state in RUNNING
            )
            taken: list[GenerationRequest] = []
            for request in self._queue.in_turn(num_of_tenant):
                if self._is_stopping or num_running + len(taken) == self.max_batch:
                    break
                if self._fits(batch, num_running, [*taken, request]):
                    taken.append(request)
                # In mode `continuous` no request overtakes, or a stream of small prompts would
                # starve a large one. The other modes fill a batch once, with prompts of one length
                # if they must.
                elif self._mode == "continuous":
                    break
            return [self._queue.take(request) for request in taken]

    def _start_request(self, request: GenerationRequest) -> None:
        self._queue.add(request, request.prompt.tenant)
        super()._start_request(request)

    def _remove(self, request: GenerationRequest) -> None:
        with self._condition:
            self._queue.discard(request)
        super()._remove(request)

    def _fits(
        self, batch: DecodeBatch | None, num_running: int, requests: Sequence[GenerationRequest]
    ) -> bool:
        """True if these requests may start together: within the token budget, and exact."""
        # A single prompt always fits: `max_tokens` is not above `max_batch_tokens`.
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
