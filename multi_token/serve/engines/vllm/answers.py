"""Answers of vLLM engines to many rows: media are embedded here, and the engines are kept busy.

    batch -> media embedded -> prompt -> engine -> token events -> text
                               ^ waits, longer each time <- 429, 503, connection lost

A prompt is sent until it is answered, whichever engines fail meanwhile. A row that an engine or
encoder refuses is a bad row. The work ends with an error once no engine has answered for a while,
or at a fault that is not the row's.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from torch import Tensor

from multi_token.errors import LanguageModelError, RowError
from multi_token.evaluate.predict import PromptRow
from multi_token.evaluate.row_job import RowResult
from multi_token.media.fetch import MIB
from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.errors import ServeError
from multi_token.serve.media_embeddings import MediaEmbedder, content_key
from multi_token.types import MediaSpan, Prepared, Sample

if TYPE_CHECKING:
    from multi_token.serve.engines.vllm.engine import VllmEngine

_CACHE_BYTES = 256 * MIB
"""Embeddings of media that are kept, since many rows may share an image."""
_LONGEST_WAIT_S = 30.0
_MAX_FAILURES = 5
"""Failures of a prompt while engines are up, after which the work ends."""
_POLL_S = 0.5


class _Request:
    """One row, from its first attempt to its answer."""

    def __init__(self, row: PromptRow, prompt: Prompt, ended: SimpleQueue[_Request]) -> None:
        # not the row: its media are embedded, and their encoder inputs are large
        self.index, self.row_id = row.index, row.row_id
        self.prompt = prompt
        self.num_attempts = 0
        self.num_failures = 0
        self.ids: list[int] = []
        self.error: Exception | None = None
        self._ended = ended

    def begin(self) -> None:
        """Forget the tokens of an attempt that failed."""
        self.num_attempts += 1
        self.ids, self.error = [], None

    def emit(self, event: EngineEvent) -> None:
        """Take an event; called in the engine's thread."""
        if isinstance(event, TokenEvent):
            self.ids.append(event.id)
            return
        if isinstance(event, ErrorEvent):
            self.error = event.error
        elif isinstance(event, FinishEvent) and event.reason == "cancelled":
            self.error = ServeError("the engine was stopped", status=503)
        self._ended.put(self)


class EngineAnswers:
    """The work that generates an `answer` to each row with vLLM engines; see `Work`.

    The engine must have been started. Rows of later batches are sent while earlier ones are
    generated, so results come in any order.
    """

    def __init__(
        self,
        engine: VllmEngine,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        max_in_flight: int = 64,
        timeout_s: float = 60.0,
        backoff_s: float = 0.5,
    ) -> None:
        """`max_in_flight`: prompts sent to each engine. `timeout_s`: wait while none is up.

        `backoff_s`: wait before the second attempt; doubles with each further one.
        """
        self.engine = engine
        self.max_in_flight = max_in_flight
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._embedder = MediaEmbedder(engine.model, cache_bytes=_CACHE_BYTES)
        self._ended: SimpleQueue[_Request] = SimpleQueue()
        self._down_since: float | None = None

    def __call__(self, batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        """Yield results as they arrive.

        Raises LanguageModelError if no engine is up for `timeout_s`, and for a fault of an engine
        or an encoder.
        """
        try:
            yield from self._answer(batches)
        finally:
            self._embedder.stop()

    def _answer(self, batches: Iterator[list[PromptRow]]) -> Iterator[list[RowResult]]:
        rows = itertools.chain.from_iterable(map(self._requests, batches))
        waiting: list[tuple[float, int, _Request]] = []
        numbers = itertools.count()
        num_in_flight, all_read = 0, False
        while True:
            results: list[RowResult] = []
            limit = self.max_in_flight * max(1, self.engine.num_replicas)
            # those that wait count too: memory holds this number of prompts
            while num_in_flight < limit:
                if waiting and waiting[0][0] <= time.monotonic():
                    request = heapq.heappop(waiting)[2]
                elif all_read or num_in_flight + len(waiting) >= limit:
                    break
                else:
                    following = next(rows, None)
                    all_read = following is None
                    if isinstance(following, RowResult):
                        results.append(following)
                    if not isinstance(following, _Request):
                        continue
                    request = following
                self._submit(request)
                num_in_flight += 1
            if all_read and not num_in_flight and not waiting:
                if results:
                    yield results
                return
            self._check_engines()
            for request in self._collect(waiting):
                num_in_flight -= 1
                found = self._result(request)
                if found is not None:
                    results.append(found)
                else:
                    wait = self._backoff_s * 2 ** min(request.num_attempts - 1, 16)
                    due = time.monotonic() + min(wait, _LONGEST_WAIT_S)
                    heapq.heappush(waiting, (due, next(numbers), request))
            if results:
                yield results

    def _requests(self, batch: list[PromptRow]) -> list[_Request | RowResult]:
        """Embed the media of a batch together; a row whose media give NaN is its result."""
        jobs = [
            [self._embed(span.modality, item) for span, item in _media(row.sample)] for row in batch
        ]
        found: list[_Request | RowResult] = []
        for row, items in zip(batch, jobs, strict=True):
            try:
                embeds = tuple(future.result() for _, future in items)
            except ServeError as error:
                found.append(row.result(self._row_error(row.row_id, error)))
                continue
            sample, keys = row.sample, tuple(key for key, _ in items)
            prompt = Prompt(sample.input_ids, tuple(sample.media_spans), embeds, keys)
            found.append(_Request(row, prompt, self._ended))
        return found

    def _embed(self, modality: str, item: Prepared) -> tuple[str, Future[Tensor]]:
        key = content_key(modality, item, "")
        try:
            return key, self._embedder.embed(modality, item, key)
        # its thread has ended with an earlier item
        except ServeError as error:
            failed: Future[Tensor] = Future()
            failed.set_exception(error)
            return key, failed

    def _submit(self, request: _Request) -> None:
        request.begin()
        sampling = SamplingParams(
            self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed + request.index if self._temperature > 0 else None,
        )
        name = f"row {request.index} attempt {request.num_attempts}"
        try:
            self.engine.submit(name, request.prompt, sampling, request.emit)
        except ServeError as error:
            request.emit(ErrorEvent(error))

    def _collect(self, waiting: list[tuple[float, int, _Request]]) -> Iterator[_Request]:
        """Yield requests that have ended; waits for the first until another one is due."""
        wait = _POLL_S
        if waiting:
            wait = min(wait, max(0.0, waiting[0][0] - time.monotonic()))
        with suppress(Empty):
            yield self._ended.get(timeout=wait)
            while True:
                yield self._ended.get_nowait()

    def _result(self, request: _Request) -> RowResult | None:
        """Return the result of a request that has ended, or None if it is sent again."""
        error = request.error
        if error is None:
            chat = self.engine.model.require_processor().chat
            answer = {"answer": chat.decode(request.ids).strip()}
            return RowResult(request.index, request.row_id, answer)
        is_full = isinstance(error, ServeError) and error.status == 429
        is_lost = isinstance(error, ServeError) and error.status == 503
        # without an engine, nothing is wrong with the prompt
        request.num_failures += not is_full and self.engine.num_replicas > 0
        if (is_full or is_lost) and request.num_failures < _MAX_FAILURES:
            return None
        return RowResult(request.index, request.row_id, self._row_error(request.row_id, error))

    def _row_error(self, row_id: str, error: Exception) -> RowError:
        """Return the error of a row that was refused.

        Raises LanguageModelError for any other fault: as a result it would stay, and the row may be
        good.
        """
        if not isinstance(error, ServeError) or error.status >= 500:
            failure = self._embedder.failure
            cause = "" if failure is None else f" ({failure})"
            raise LanguageModelError(
                f"row {row_id}: {error}{cause}. Results so far are kept: remove the cause, which "
                "the log here or of the engine names, and the same command continues"
            ) from error
        return RowError(
            f"the engine does not answer it: {error}",
            kind="too_long" if error.code == "context_length_exceeded" else "undecodable",
            row_id=row_id,
        )

    def _check_engines(self) -> None:
        if self.engine.num_replicas:
            self._down_since = None
            return
        now = time.monotonic()
        self._down_since = now if self._down_since is None else self._down_since
        if now - self._down_since >= self._timeout_s:
            raise LanguageModelError(
                f"no engine is left ({self.engine.report()}). Results so far are kept: start an "
                "engine, and the same command continues"
            )


def _media(sample: Sample) -> Iterator[tuple[MediaSpan, Prepared]]:
    return zip(sample.media_spans, sample.media, strict=True)
