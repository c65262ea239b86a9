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

from multi_token.serve.engines.base import End, Event, Failure, Prompt, SamplingOptions, Token
from multi_token.serve.engines.sampler import COLDEST, draw, likeliest, with_logprobs
from multi_token.serve.errors import ServeError

_LOG = logging.getLogger(__name__)


class Running:
    """One prompt and its answer so far. Every method may be called from any thread."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingOptions,
        emit: Callable[[Event], None],
        end_ids: frozenset[int],
        on_end: Callable[[Running], None] | None = None,
    ) -> None:
        """`end_ids`: the ids that end an answer. `on_end`: told once, when it has ended."""
        self.id = request_id
        self.prompt = prompt
        self.options = options
        self.end_ids = frozenset() if options.ignore_end else end_ids
        self.number = ""
        """What an engine calls it, unlike `id` for no two alike."""
        self.is_done = False
        self.num_cached: int | None = None
        """Of its prompt's tokens, how many were computed before it was read; None: not read yet."""
        self._emit = emit
        self._on_end = on_end
        self._lock = threading.RLock()
        # kept even where no seed was asked for: an answer that is begun anew must say the same
        self._seed = secrets.randbits(63) if options.seed is None else options.seed % 2**63
        self._said: list[int] = []
        self.begin()

    @property
    def num_tokens(self) -> int:
        """Of the prompt and the longest answer together."""
        return len(self.prompt.input_ids) + self.options.max_new_tokens

    def begin(self) -> None:
        """Answer from the first token; what has been said already is not said again."""
        with self._lock:
            self._position = 0
            self.generator = torch.Generator().manual_seed(self._seed)

    def say(self, token: Token) -> None:
        """Hand on the next token, and End behind the last one."""
        with self._lock:
            if self.is_done:
                return
            self._position += 1
            if self._position <= len(self._said):
                if self._said[self._position - 1] != token.id:
                    self.fail(
                        ServeError("the answer could not be taken up again; ask anew", status=500)
                    )
                return
            self._said.append(token.id)
            is_first = len(self._said) == 1
            self._emit(replace(token, num_cached=self.num_cached or 0) if is_first else token)
            if token.id in self.end_ids:
                self._end(End("stop"))
            elif self._position >= self.options.max_new_tokens:
                self._end(End("length"))

    def end(self, reason: Literal["stop", "length"]) -> None:
        """End it because whoever answers it says so."""
        self._end(End(reason))

    def cancel(self) -> None:
        """End it here; nothing follows."""
        self._end(End("cancelled"))

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._end(Failure(error))

    def _end(self, event: End | Failure) -> None:
        with self._lock:
            if self.is_done:
                return
            self.is_done = True
            if self._on_end is not None:
                self._on_end(self)  # first, so that who hears of the end finds the id free again
            self._emit(event)


def choose(rows: Sequence[Running | None], scores: Tensor) -> tuple[list[int], list[Running], bool]:
    """scores float32 [rows, vocabulary] of one step -> the id of each row, said to its client.

    Also the rows whose scores are no numbers, to whom nothing is said, and whether all ids are the
    likeliest. None stands for a row that has ended.
    """
    ids, are_numbers = likeliest(scores)
    bad: list[Running] = []
    all_likeliest = True
    for i, row in enumerate(rows):
        if row is None or row.is_done:
            continue
        if not are_numbers[i]:
            bad.append(row)
            continue
        options = row.options
        if options.temperature > COLDEST:
            ids[i] = draw(scores[i], options, row.generator)
            all_likeliest = False
        if options.num_logprobs is None:
            row.say(Token(ids[i]))
        else:
            row.say(with_logprobs(scores[i], ids[i], options.num_logprobs))
    return ids, bad, all_likeliest


def forced(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """scores [rows, vocabulary] -> the same shape, of which a greedy choice is `ids`."""
    chosen = torch.tensor(ids, device=scores.device)[:, None]
    return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def failed(row: Running, error: Exception) -> None:
    """End a row whose own fault an error is. Its text goes to the log, not to the client."""
    _LOG.error("request %s failed", row.id, exc_info=error)
    row.fail(
        error
        if isinstance(error, ServeError)
        else ServeError("the model cannot answer this prompt", status=500, retry=False)
    )


class Requests:
    """All prompts of an engine. `changed` is its lock, notified when one is added."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.waiting: deque[Running] = deque()
        self._all: dict[str, Running] = {}

    def add(self, row: Running) -> None:
        """Let a prompt wait. Raises ServeError if its id is in use."""
        with self.changed:
            if row.id in self._all:
                raise ServeError("a request with this id is being answered", param="request_id")
            self._all[row.id] = row
            self.waiting.append(row)
            self.changed.notify_all()

    def forget(self, row: Running) -> None:
        """It has ended."""
        with self.changed:
            if self._all.get(row.id) is row:
                del self._all[row.id]
            if row in self.waiting:
                self.waiting.remove(row)

    def cancel(self, request_id: str) -> Running | None:
        """End one early, if it is there."""
        with self.changed:
            row = self._all.get(request_id)
        if row is not None:
            row.cancel()
        return row

    def all(self) -> list[Running]:
        """Those that wait and those that are being answered."""
        with self.changed:
            return list(self._all.values())

    def running(self) -> list[Running]:
        """Those that are being answered."""
        with self.changed:
            waiting = {id(row) for row in self.waiting}
            return [row for row in self._all.values() if id(row) not in waiting]

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        with self.changed:
            return len(self._all) - len(self.waiting)
