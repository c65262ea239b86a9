"""The engine that any language model can be served with: prompts in one padded batch.

Border: who goes into the batch and when. How it is answered stands in stepping.py, and in padded.py
for models whose rows cannot leave.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from multi_token.generate import eos_token_ids
from multi_token.serve.engines.base import EngineEvent, Prompt, SamplingParams
from multi_token.serve.engines.fallback import check_model_alive, generate_batch, retry_individually
from multi_token.serve.engines.local.decode_loop import DecodeBatch
from multi_token.serve.engines.local.prefix_cache import PrefixCache
from multi_token.serve.engines.local.reads import Reads
from multi_token.serve.engines.parity import (
    BatchingMode,
    find_batching_mode,
    may_read_beside,
    supports_prefix_cache,
)
from multi_token.serve.engines.prefix_hits import PrefixCacheStats
from multi_token.serve.engines.prompts import check_prompt, context_length, min_limit
from multi_token.serve.engines.scheduler import GenerationRequest, Scheduler, fail_request
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)
_MAX_PREFILL_TOKENS = 512
"""Tokens of prompts that join at once, so that those who are being answered do not wait long."""


class LocalEngine:
    """Answers prompts in one padded batch: a row leaves when it has ended, and who comes joins.

    So at the start of each step, if a trial at the start finds that it is exact (way.py). Else rows
    leave only, and who comes waits for the next batch; or they stay until all have ended, which is
    exact for every language model that can be asked at all. Where padding changes answers, only
    prompts of one length share a batch.

    Where rows can join, what a prompt begins with like an earlier one of the same tenant (a system
    message, the same picture, a conversation that goes on) is not read again; and on a CPU with
    more than one core prompts are read in a second thread, so that nobody's answer stands still
    meanwhile.
    """

    name = "static"

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        max_batch: int = 8,
        max_batch_tokens: int = 32768,
        max_tokens: int | None = None,
        num_cache_tokens: int = 2048,
    ) -> None:
        """`max_batch`: prompts answered together. `max_batch_tokens`: padded, with the longest
        answer; bounds the memory of the key-value cache. `max_tokens`: see `Engine`; by default
        what the language model's config says. `num_cache_tokens`: of prompts and answers, whose
        keys and values are kept when these have ended; 0: none.
        """
        self.model = model
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_tokens = min_limit(max_tokens, context_length(model), max_batch_tokens)
        self._filler_id = model.require_processor().chat.filler_id
        self._end_ids = frozenset(eos_token_ids(model))
        self.num_cache_tokens = num_cache_tokens
        self.prefix_stats = PrefixCacheStats()
        self._scheduler = Scheduler()
        self._mode: BatchingMode | None = None
        self._use_prefix_cache = False
        self._reads_beside = False
        self._reads: Reads | None = None
        self._batch: DecodeBatch | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Begin to answer. Raises LanguageModelError for a model that cannot be asked."""
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        if self._mode is None:  # tried here, not in the first client's time
            self._mode = find_batching_mode(self.model, self._filler_id)
            if self._mode == "join":
                self._reads_beside = may_read_beside(self.model, self._filler_id)
                if self.num_cache_tokens:
                    self._use_prefix_cache = supports_prefix_cache(self.model, self._filler_id)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._engine_loop, name="static engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel all and end the thread, which finishes the step that it is in."""
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
        with self._scheduler.condition:
            if not self.is_alive:
                raise ServeError("the engine does not run", status=503)
            self._scheduler.add(request)

    def cancel(self, request_id: str) -> None:
        """End an answer early; see `Engine`."""
        self._scheduler.cancel(request_id)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    @property
    def cache_usage(self) -> float:
        """The part of `max_batch_tokens` that answers hold, padding included, 0 to 1."""
        decode_batch = self._batch
        if decode_batch is None or not self.is_alive:
            return 0.0
        return len(decode_batch.requests) * decode_batch.width / self.max_batch_tokens

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    def _engine_loop(self) -> None:
        try:
            if self._mode == "stay":
                while batch := self._next_requests(None):
                    self._generate_batch(batch)
            else:
                self._batch = self._new_batch()
                with Reads() as reads:
                    self._reads = reads if self._reads_beside else None
                    self._decode_loop(self._batch)
        except Exception as error:  # noqa: BLE001 - every client must be told
            _LOG.error("the engine's thread ends", exc_info=error)
            with self._scheduler.condition:
                self._is_stopping = True  # or one could be queued behind the last that fails
            for request in self._scheduler.unfinished():
                request.fail(ServeError("the engine has failed", status=503))

    def _new_batch(self) -> DecodeBatch:
        """Of the model as it is now: nothing that was kept before is used."""
        kept = (
            PrefixCache(self.num_cache_tokens, self.prefix_stats)
            if self._use_prefix_cache
            else None
        )
        return DecodeBatch(
            self.model, self._filler_id, allow_add=self._mode == "join", prefix_cache=kept
        )

    def _generate_batch(self, batch: list[GenerationRequest]) -> None:
        """A batch to its end, in one call."""
        try:
            generate_batch(self.model, batch, self._filler_id)
        except Exception as error:  # noqa: BLE001 - one prompt must not end the others
            _LOG.error("a batch of %d failed", len(batch), exc_info=error)
            retry_individually(self.model, batch, self._filler_id, error)

    def _decode_loop(self, decode_batch: DecodeBatch) -> None:
        """Whoever comes, a token of each at a step, until the engine is stopped."""
        reads = self._reads
        while not self._is_stopping:
            if reads is not None and reads.is_ready(wait=not decode_batch.requests):
                self._merge_prefilled(decode_batch, reads)
            if reads is None or not reads.is_busy:
                self._start_prefill(decode_batch)
            try:
                decode_batch.decode_step(is_beside=reads is not None and reads.is_busy)
            except Exception as error:  # noqa: BLE001 - one prompt must not end the others
                rows = decode_batch.requests
                decode_batch.clear()
                _LOG.error("a step of %d failed", len(rows), exc_info=error)
                retry_individually(self.model, rows, self._filler_id, error)

    def _start_prefill(self, decode_batch: DecodeBatch) -> None:
        """Read the prompts of who is next: beside the steps of others, if there are any."""
        if decode_batch.requests and not decode_batch.allow_add:
            return
        rows = self._next_requests(decode_batch)
        if rows and decode_batch.requests and self._reads is not None:
            self._reads.begin(decode_batch, rows)
        else:
            self._prefill_into(decode_batch, rows)

    def _merge_prefilled(self, decode_batch: DecodeBatch, reads: Reads) -> None:
        """Answer those who have been read beside the others."""
        rows, others = reads.end()
        try:
            decode_batch.merge(others.result())
        except Exception as cause:  # noqa: BLE001 - one prompt must not end the others
            self._add_individually(decode_batch, rows, cause)

    def _prefill_into(self, decode_batch: DecodeBatch, rows: list[GenerationRequest]) -> None:
        """Begin to answer these. If that fails, it is not the fault of those that are answered."""
        try:
            decode_batch.add(rows)
        except Exception as cause:  # noqa: BLE001 - one prompt must not end the others
            if decode_batch.allow_add:
                self._add_individually(decode_batch, rows, cause)
            else:
                _LOG.error("%d prompts failed", len(rows), exc_info=cause)
                retry_individually(self.model, rows, self._filler_id, cause)

    def _add_individually(
        self, decode_batch: DecodeBatch, rows: list[GenerationRequest], cause: Exception
    ) -> None:
        """One after the other, since together they failed."""
        _LOG.error("%d prompts failed", len(rows), exc_info=cause)
        check_model_alive(self.model, cause)
        for request in rows:
            request.restart()
            try:
                decode_batch.add([request])
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                check_model_alive(self.model, error)
                fail_request(request, error)

    def _next_requests(self, decode_batch: DecodeBatch | None) -> list[GenerationRequest]:
        """Who is answered next: at once if there are rows that are being answered, else as soon as
        somebody is there; nobody if the engine is stopped.
        """
        running = [] if decode_batch is None else decode_batch.requests
        scheduler = self._scheduler
        with scheduler.condition:
            if not running:
                scheduler.condition.wait_for(lambda: scheduler.waiting or self._is_stopping)
            batch: list[GenerationRequest] = []
            for request in [] if self._is_stopping else list(scheduler.waiting):
                if len(running) + len(batch) == self.max_batch:
                    break
                if self._fits(decode_batch, running, [*batch, request]):
                    batch.append(request)
                    scheduler.waiting.remove(request)
                elif self._mode == "join":
                    break  # those behind it must not overtake it again and again
            return batch

    def _fits(
        self,
        decode_batch: DecodeBatch | None,
        running: list[GenerationRequest],
        rows: list[GenerationRequest],
    ) -> bool:
        """Whether these may be answered together, as each alone and within memory."""
        if not running and len(rows) == 1:
            return True
        lengths = [len(request.prompt.input_ids) for request in rows]
        if self._mode == "join" and len(rows) > 1 and sum(lengths) > _MAX_PREFILL_TOKENS:
            return False
        if decode_batch is None:
            longest = max(lengths) + max(request.options.max_new_tokens for request in rows)
        else:
            longest = decode_batch.width_after_adding(rows)
        if longest * (len(running) + len(rows)) > self.max_batch_tokens:
            return False
        is_equal = not running and len(set(lengths)) == 1
        return is_equal or self.model.capabilities.can_batch_lengths(longest)
