"""The engine that any language model can be served with: prompts in one padded batch.

Border: who goes into the batch and when. How it is answered stands in stepping.py, and in padded.py
for models whose rows cannot leave.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from multi_token.generate import reader_of, stop_ids
from multi_token.serve.engines.base import Event, Prompt, SamplingOptions
from multi_token.serve.engines.fallback import answer_one_by_one, answer_together, refuse_broken
from multi_token.serve.engines.local.decode_loop import Stepping
from multi_token.serve.engines.local.prefix_cache import Beginnings
from multi_token.serve.engines.local.reads import Reads
from multi_token.serve.engines.parity import Way, find_way, may_begin_alike, may_read_beside
from multi_token.serve.engines.prefix_hits import PrefixHits
from multi_token.serve.engines.prompts import context_length, refuse, shortest
from multi_token.serve.engines.scheduler import Requests, Running, failed
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)
_MAX_READ = 512
"""Tokens of prompts that join at once, so that those who are being answered do not wait long."""


class StaticEngine:
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
        self.max_tokens = shortest(max_tokens, context_length(model), max_batch_tokens)
        self._filler_id = reader_of(model).chat.filler_id
        self._end_ids = frozenset(stop_ids(model))
        self.num_cache_tokens = num_cache_tokens
        self.prefix = PrefixHits()
        self._requests = Requests()
        self._way: Way | None = None
        self._begins_alike = False
        self._reads_beside = False
        self._reads: Reads | None = None
        self._stepping: Stepping | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Begin to answer. Raises LanguageModelError for a model that cannot be asked."""
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        if self._way is None:  # tried here, not in the first client's time
            self._way = find_way(self.model, self._filler_id)
            if self._way == "join":
                self._reads_beside = may_read_beside(self.model, self._filler_id)
                if self.num_cache_tokens:
                    self._begins_alike = may_begin_alike(self.model, self._filler_id)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="static engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel all and end the thread, which finishes the step that it is in."""
        with self._requests.changed:
            self._is_stopping = True
            self._requests.changed.notify_all()
        for row in self._requests.all():
            row.cancel()
        if self._thread is not None:
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingOptions,
        emit: Callable[[Event], None],
    ) -> None:
        """Queue a prompt; see `Engine`."""
        refuse(self.model, prompt, options, self.max_tokens)
        row = Running(request_id, prompt, options, emit, self._end_ids, self._requests.forget)
        with self._requests.changed:
            if not self.is_alive:
                raise ServeError("the engine does not run", status=503)
            self._requests.add(row)

    def cancel(self, request_id: str) -> None:
        """End an answer early; see `Engine`."""
        self._requests.cancel(request_id)

    @property
    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._is_stopping

    @property
    def cache_usage(self) -> float:
        """The part of `max_batch_tokens` that answers hold, padding included, 0 to 1."""
        stepping = self._stepping
        if stepping is None or not self.is_alive:
            return 0.0
        return len(stepping.rows) * stepping.width / self.max_batch_tokens

    @property
    def num_running(self) -> int:
        return self._requests.num_running

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    def _run(self) -> None:
        try:
            if self._way == "stay":
                while batch := self._take(None):
                    self._answer(batch)
            else:
                self._stepping = self._new_stepping()
                with Reads() as reads:
                    self._reads = reads if self._reads_beside else None
                    self._answer_step_by_step(self._stepping)
        except Exception as error:  # noqa: BLE001 - every client must be told
            _LOG.error("the engine's thread ends", exc_info=error)
            with self._requests.changed:
                self._is_stopping = True  # or one could be queued behind the last that fails
            for row in self._requests.all():
                row.fail(ServeError("the engine has failed", status=503))

    def _new_stepping(self) -> Stepping:
        """Of the model as it is now: nothing that was kept before is used."""
        kept = Beginnings(self.num_cache_tokens, self.prefix) if self._begins_alike else None
        return Stepping(self.model, self._filler_id, joins=self._way == "join", beginnings=kept)

    def _answer(self, batch: list[Running]) -> None:
        """A batch to its end, in one call."""
        try:
            answer_together(self.model, batch, self._filler_id)
        except Exception as error:  # noqa: BLE001 - one prompt must not end the others
            _LOG.error("a batch of %d failed", len(batch), exc_info=error)
            answer_one_by_one(self.model, batch, self._filler_id, error)

    def _answer_step_by_step(self, stepping: Stepping) -> None:
        """Whoever comes, a token of each at a step, until the engine is stopped."""
        reads = self._reads
        while not self._is_stopping:
            if reads is not None and reads.is_ready(wait=not stepping.rows):
                self._take_in(stepping, reads)
            if reads is None or not reads.is_busy:
                self._begin(stepping)
            try:
                stepping.step(is_beside=reads is not None and reads.is_busy)
            except Exception as error:  # noqa: BLE001 - one prompt must not end the others
                rows = stepping.rows
                stepping.clear()
                _LOG.error("a step of %d failed", len(rows), exc_info=error)
                answer_one_by_one(self.model, rows, self._filler_id, error)

    def _begin(self, stepping: Stepping) -> None:
        """Read the prompts of who is next: beside the steps of others, if there are any."""
        if stepping.rows and not stepping.joins:
            return
        rows = self._take(stepping)
        if rows and stepping.rows and self._reads is not None:
            self._reads.begin(stepping, rows)
        else:
            self._join(stepping, rows)

    def _take_in(self, stepping: Stepping, reads: Reads) -> None:
        """Answer those who have been read beside the others."""
        rows, others = reads.end()
        try:
            stepping.take_in(others.result())
        except Exception as cause:  # noqa: BLE001 - one prompt must not end the others
            self._join_each(stepping, rows, cause)

    def _join(self, stepping: Stepping, rows: list[Running]) -> None:
        """Begin to answer these. If that fails, it is not the fault of those that are answered."""
        try:
            stepping.join(rows)
        except Exception as cause:  # noqa: BLE001 - one prompt must not end the others
            if stepping.joins:
                self._join_each(stepping, rows, cause)
            else:
                _LOG.error("%d prompts failed", len(rows), exc_info=cause)
                answer_one_by_one(self.model, rows, self._filler_id, cause)

    def _join_each(self, stepping: Stepping, rows: list[Running], cause: Exception) -> None:
        """One after the other, since together they failed."""
        _LOG.error("%d prompts failed", len(rows), exc_info=cause)
        refuse_broken(self.model, cause)
        for row in rows:
            row.begin()
            try:
                stepping.join([row])
            except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
                refuse_broken(self.model, error)
                failed(row, error)

    def _take(self, stepping: Stepping | None) -> list[Running]:
        """Who is answered next: at once if there are rows that are being answered, else as soon as
        somebody is there; nobody if the engine is stopped.
        """
        running = [] if stepping is None else stepping.rows
        requests = self._requests
        with requests.changed:
            if not running:
                requests.changed.wait_for(lambda: requests.waiting or self._is_stopping)
            batch: list[Running] = []
            for row in [] if self._is_stopping else list(requests.waiting):
                if len(running) + len(batch) == self.max_batch:
                    break
                if self._fits(stepping, running, [*batch, row]):
                    batch.append(row)
                    requests.waiting.remove(row)
                elif self._way == "join":
                    break  # those behind it must not overtake it again and again
            return batch

    def _fits(self, stepping: Stepping | None, running: list[Running], rows: list[Running]) -> bool:
        """Whether these may be answered together, as each alone and within memory."""
        if not running and len(rows) == 1:
            return True
        lengths = [len(row.prompt.input_ids) for row in rows]
        if self._way == "join" and len(rows) > 1 and sum(lengths) > _MAX_READ:
            return False
        if stepping is None:
            longest = max(lengths) + max(row.options.max_new_tokens for row in rows)
        else:
            longest = stepping.width_with(rows)
        if longest * (len(running) + len(rows)) > self.max_batch_tokens:
            return False
        is_equal = not running and len(set(lengths)) == 1
        return is_equal or self.model.capabilities.answers_together(longest)
