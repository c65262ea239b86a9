"""Prompts that wait or are being answered: who is told what, when an answer ends, who is left.

Border: no model; padded.py and paged.py hand in logits, the engines decide who is answered when.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from multi_token.serve.engines.base import (
    EngineEvent,
    ErrorEvent,
    FinishEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
)
from multi_token.serve.engines.sampler import MIN_TEMPERATURE, greedy, sample, token_event
from multi_token.serve.errors import ServeError

_LOG = logging.getLogger(__name__)


class GenerationRequest:
    """One prompt and its answer so far. Every method may be called from any thread."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
        end_ids: frozenset[int],
        on_finish: Callable[[GenerationRequest], None] | None = None,
    ) -> None:
        """`end_ids`: the ids that end an answer. `on_end`: told once, when it has ended."""
        self.id = request_id
        self.prompt = prompt
        self.options = options
        self.end_ids = frozenset() if options.ignore_eos else end_ids
        self.engine_key = ""
        """What an engine calls it, unlike `id` for no two alike."""
        self.is_finished = False
        self.num_cached: int | None = None
        """Of its prompt's tokens, how many were computed before it was read; None: not read yet."""
        self._emit = emit
        self._on_finish = on_finish
        self._lock = threading.RLock()
        # kept even where no seed was asked for: an answer that is begun anew must say the same
        self._seed = secrets.randbits(63) if options.seed is None else options.seed % 2**63
        self._emitted: list[int] = []
        self.restart()

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the longest answer together."""
        return len(self.prompt.input_ids) + self.options.max_new_tokens

    def restart(self) -> None:
        """Answer from the first token; what has been said already is not said again."""
        with self._lock:
            self._position = 0
            self.generator = torch.Generator().manual_seed(self._seed)

    def emit_token(self, token: TokenEvent) -> None:
        """Hand on the next token, and End behind the last one."""
        with self._lock:
            if self.is_finished:
                return
            self._position += 1
            if self._position <= len(self._emitted):
                if self._emitted[self._position - 1] != token.id:
                    self.fail(
                        ServeError("the answer could not be taken up again; ask anew", status=500)
                    )
                return
            self._emitted.append(token.id)
            is_first = len(self._emitted) == 1
            self._emit(replace(token, num_cached=self.num_cached or 0) if is_first else token)
            if token.id in self.end_ids:
                self._finish(FinishEvent("stop"))
            elif self._position >= self.options.max_new_tokens:
                self._finish(FinishEvent("length"))

    def finish(self, reason: Literal["stop", "length"]) -> None:
        """End it because whoever answers it says so."""
        self._finish(FinishEvent(reason))

    def cancel(self) -> None:
        """End it here; nothing follows."""
        self._finish(FinishEvent("cancelled"))

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._finish(ErrorEvent(error))

    def _finish(self, event: FinishEvent | ErrorEvent) -> None:
        with self._lock:
            if self.is_finished:
                return
            self.is_finished = True
            if self._on_finish is not None:
                self._on_finish(self)  # first, so that who hears of the end finds the id free again
            self._emit(event)


def sample_batch(
    requests: Sequence[GenerationRequest | None], scores: Tensor
) -> tuple[list[int], list[GenerationRequest], bool]:
    """scores float32 [rows, vocabulary] of one step -> the id of each row, said to its client.

    Also the rows whose scores are no numbers, to whom nothing is said, and whether all ids are the
    likeliest. None stands for a row that has ended.
    """
    ids, are_numbers = greedy(scores)
    bad: list[GenerationRequest] = []
    all_likeliest = True
    for i, request in enumerate(requests):
        if request is None or request.is_finished:
            continue
        if not are_numbers[i]:
            bad.append(request)
            continue
        options = request.options
        if options.temperature > MIN_TEMPERATURE:
            ids[i] = sample(scores[i], options, request.generator)
            all_likeliest = False
        if options.num_logprobs is None:
            request.emit_token(TokenEvent(ids[i]))
        else:
            request.emit_token(token_event(scores[i], ids[i], options.num_logprobs))
    return ids, bad, all_likeliest


def force_tokens(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """scores [rows, vocabulary] -> the same shape, of which a greedy choice is `ids`."""
    chosen = torch.tensor(ids, device=scores.device)[:, None]
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def fail_request(request: GenerationRequest, error: Exception) -> None:
    """End a row whose own fault an error is. Its text goes to the log, not to the client."""
    _LOG.error("request %s failed", request.id, exc_info=error)
    request.fail(
        error
        if isinstance(error, ServeError)
        else ServeError("the model cannot answer this prompt", status=500, retry=False)
    )


class Scheduler:
    """All prompts of an engine. `condition` is its lock, notified when one is added."""

    def __init__(self) -> None:
        self.condition = threading.Condition(threading.RLock())
        self.waiting: deque[GenerationRequest] = deque()
        self._by_id: dict[str, GenerationRequest] = {}

    def add(self, request: GenerationRequest) -> None:
        """Let a prompt wait. Raises ServeError if its id is in use."""
        with self.condition:
            if request.id in self._by_id:
                raise ServeError("a request with this id is being answered", param="request_id")
            self._by_id[request.id] = request
            self.waiting.append(request)
            self.condition.notify_all()

    def remove(self, request: GenerationRequest) -> None:
        """It has ended."""
        with self.condition:
            if self._by_id.get(request.id) is request:
                del self._by_id[request.id]
            if request in self.waiting:
                self.waiting.remove(request)

    def cancel(self, request_id: str) -> GenerationRequest | None:
        """End one early, if it is there."""
        with self.condition:
            request = self._by_id.get(request_id)
        if request is not None:
            request.cancel()
        return request

    def unfinished(self) -> list[GenerationRequest]:
        """Those that wait and those that are being answered."""
        with self.condition:
            return list(self._by_id.values())

    def running(self) -> list[GenerationRequest]:
        """Those that are being answered."""
        with self.condition:
            waiting = {id(request) for request in self.waiting}
            return [request for request in self._by_id.values() if id(request) not in waiting]

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        with self.condition:
            return len(self._by_id) - len(self.waiting)
