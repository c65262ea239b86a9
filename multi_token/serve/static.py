"""The engine that any language model can be served with: prompts that wait, as one padded batch.

Border: who goes into a batch and when. How a batch is answered stands in padded.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from multi_token.generate import reader_of, stop_ids
from multi_token.serve.engine import Event, Prompt, SamplingOptions
from multi_token.serve.errors import ServeError
from multi_token.serve.padded import answer_one_by_one, answer_together
from multi_token.serve.prompts import context_length, refuse, shortest
from multi_token.serve.running import Requests, Running

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


class StaticEngine:
    """Answers all that wait, up to a limit, in one padded batch; who comes then waits for the next.

    Fastest for prompts that come together, and exact for every language model that can be asked at
    all: where padding changes answers, only prompts of one length share a batch.
    """

    name = "static"

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        max_batch: int = 8,
        max_batch_tokens: int = 32768,
        max_tokens: int | None = None,
    ) -> None:
        """`max_batch`: prompts answered together. `max_batch_tokens`: padded, with the longest
        answer; bounds the memory of the key-value cache. `max_tokens`: see `Engine`; by default
        what the language model's config says.
        """
        self.model = model
        self.max_batch = max_batch
        self.max_batch_tokens = max_batch_tokens
        self.max_tokens = shortest(max_tokens, context_length(model), max_batch_tokens)
        self._filler_id = reader_of(model).chat.filler_id
        self._end_ids = frozenset(stop_ids(model))
        self._requests = Requests()
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Begin to answer. Raises LanguageModelError for a model that cannot be asked."""
        if self.is_alive:
            return
        if self._thread is not None:
            self._thread.join()
        _ = self.model.capabilities  # tried here, not in the first client's time
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
    def num_running(self) -> int:
        return self._requests.num_running

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    def _run(self) -> None:
        try:
            while batch := self._take():
                try:
                    answer_together(self.model, batch, self._filler_id)
                except Exception as error:  # noqa: BLE001 - one prompt must not end the others
                    _LOG.error("a batch of %d failed", len(batch), exc_info=error)
                    answer_one_by_one(self.model, batch, self._filler_id, error)
        except Exception as error:  # noqa: BLE001 - every client must be told
            _LOG.error("the engine's thread ends", exc_info=error)
            with self._requests.changed:
                self._is_stopping = True  # or one could be queued behind the last that fails
            for row in self._requests.all():
                row.fail(ServeError("the engine has failed", status=503))

    def _take(self) -> list[Running]:
        """The next batch, when there is one; empty when there will be none."""
        with self._requests.changed:
            self._requests.changed.wait_for(lambda: self._requests.waiting or self._is_stopping)
            if self._is_stopping:
                return []
            batch: list[Running] = []
            for row in list(self._requests.waiting):
                if len(batch) < self.max_batch and self._fits([*batch, row]):
                    batch.append(row)
                    self._requests.waiting.remove(row)
            return batch

    def _fits(self, rows: list[Running]) -> bool:
        """Whether these may be answered together, as each alone and within memory."""
        if len(rows) == 1:
            return True
        lengths = [len(row.prompt.input_ids) for row in rows]
        longest = max(lengths) + max(row.options.max_new_tokens for row in rows)
        if longest * len(rows) > self.max_batch_tokens:
            return False
        return len(set(lengths)) == 1 or self.model.capabilities.answers_together(longest)
