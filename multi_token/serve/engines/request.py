"""Generation request: state, emitted tokens and end of one request.

    waiting --prefill--> prefill --first token--> decoding --> finished
       ^----------------------- restart() -----------------'

A restarted request generates from its first token again. Tokens that were emitted before are
compared with the new ones and not emitted twice, so the client sees one stream.
"""

from __future__ import annotations

import logging
import secrets
import threading
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

RequestState = Literal["waiting", "prefill", "decoding", "finished"]


class GenerationRequest:
    """One prompt and the tokens generated so far. Every method is thread-safe."""

    def __init__(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
        end_ids: frozenset[int],
        on_finish: Callable[[GenerationRequest], None] | None = None,
    ) -> None:
        """`end_ids` end generation. `on_finish` is called once, before the last event."""
        self.id = request_id
        self.prompt = prompt
        self.options = options
        self.end_ids = frozenset() if options.ignore_eos else end_ids
        self.state: RequestState = "waiting"
        self.num_cached: int | None = None
        """Prompt tokens that the prefix cache held at the first prefill; None before that."""
        self._emit = emit
        self._on_finish = on_finish
        # Reentrant: `emit` may cancel this very request from inside of an event.
        self._lock = threading.RLock()
        # Drawn even where the client sent no seed: a restart must sample the same tokens again.
        self._seed = secrets.randbits(63) if options.seed is None else options.seed % 2**63
        self._emitted: list[int] = []
        self.restart()

    @property
    def is_finished(self) -> bool:
        return self.state == "finished"

    def restart(self) -> None:
        """Generate from the first token again, after a fault of the batch."""
        with self._lock:
            self._position = 0
            self.generator = torch.Generator().manual_seed(self._seed)
            if not self.is_finished:
                self.state = "waiting"

    def start_prefill(self) -> None:
        with self._lock:
            if not self.is_finished:
                self.state = "prefill"

    def mark_prefilled(self, num_cached: int) -> bool:
        """Set `num_cached` and return True at the first prefill."""
        # Only then: a prefill after a restart finds entries that this request stored itself, which
        # would count as hits of other prompts.
        with self._lock:
            if self.num_cached is not None:
                return False
            self.num_cached = num_cached
            return True

    def emit_token(self, token: TokenEvent) -> None:
        """Emit the next token, and FinishEvent after the last one."""
        with self._lock:
            if self.is_finished:
                return
            self.state = "decoding"
            self._position += 1
            # After a restart, tokens that the client has are compared and not emitted again.
            if self._position <= len(self._emitted):
                if self._emitted[self._position - 1] != token.id:
                    self.fail(
                        ServeError(
                            "the request was restarted after a fault and generated other tokens; "
                            "send it again",
                            status=500,
                        )
                    )
                return
            self._emitted.append(token.id)
            is_first = len(self._emitted) == 1
            self._emit(replace(token, num_cached=self.num_cached or 0) if is_first else token)
            if token.id in self.end_ids:
                self.finish("stop")
            elif self._position >= self.options.max_new_tokens:
                self.finish("length")

    def finish(self, reason: Literal["stop", "length"]) -> None:
        self._finish(FinishEvent(reason))

    def cancel(self) -> None:
        self._finish(FinishEvent("cancelled"))

    def fail(self, error: Exception) -> None:
        self._finish(ErrorEvent(error))

    def _finish(self, event: FinishEvent | ErrorEvent) -> None:
        with self._lock:
            if self.is_finished:
                return
            self.state = "finished"
            # Before the event: a client that reacts to the end may use the request id again.
            if self._on_finish is not None:
                self._on_finish(self)
            self._emit(event)


def sample_batch(
    requests: Sequence[GenerationRequest], scores: Tensor
) -> tuple[list[int], list[GenerationRequest], bool]:
    """Sample and emit one token of each unfinished request.

    `scores`: logits float32 [rows, vocabulary] of one step. Returns the token id of each row, the
    requests that fail here because of NaN or inf, and whether all ids are the greedy ones.
    """
    # The only transfer of a greedy step: ids and finiteness of all rows together.
    ids, finite = greedy(scores)
    failed: list[GenerationRequest] = []
    all_greedy = True
    for i, request in enumerate(requests):
        if request.is_finished:
            continue
        if not finite[i]:
            request.fail(
                ServeError(
                    "the model produced NaN or inf for the media in this prompt; send other media",
                    status=400,
                    retry=False,
                )
            )
            failed.append(request)
            continue
        options = request.options
        if options.temperature > MIN_TEMPERATURE:
            ids[i] = sample(scores[i], options, request.generator)
            all_greedy = False
        # Without log-probabilities the row's scores stay on the device: no host sync for them.
        if options.num_logprobs is None:
            request.emit_token(TokenEvent(ids[i]))
        else:
            request.emit_token(token_event(scores[i], ids[i], options.num_logprobs))
    return ids, failed, all_greedy


def fail_request(request: GenerationRequest, error: Exception) -> None:
    """Fail a request by its own fault. The error's text goes to the log, not to the client."""
    _LOG.error("request %s failed in state %s", request.id, request.state, exc_info=error)
    request.fail(
        error
        if isinstance(error, ServeError)
        else ServeError("the model cannot answer this prompt", status=500, retry=False)
    )
