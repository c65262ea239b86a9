"""Generation requests: state, emitted tokens and the end of one request.

    waiting --prefill()--> prefill --first token--> decoding --> finished
       ^----------------------- restart() -----------------'

A request that is restarted generates from its first token again. Tokens that were emitted before
are compared with the new ones and not emitted twice, so the client sees one stream.
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
        """`end_ids`: ids that end generation. `on_finish`: called once, before the last event."""
        self.id = request_id
        self.prompt = prompt
        self.options = options
        self.end_ids = frozenset() if options.ignore_eos else end_ids
        self.state: RequestState = "waiting"
        self.num_cached: int | None = None
        """Prompt tokens that the prefix cache held at the first prefill; None before it."""
        self._emit = emit
        self._on_finish = on_finish
        # reentrant: `emit` may cancel this very request from inside of an event
        self._lock = threading.RLock()
        # drawn even where the client sent no seed: a restart must sample the same tokens again
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
        """Set `num_cached` and return True at the first prefill.

        A later prefill (after a restart) finds entries that this request stored itself, which would
        count as hits of other prompts.
        """
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
        """End generation regularly."""
        self._finish(FinishEvent(reason))

    def cancel(self) -> None:
        """End generation early."""
        self._finish(FinishEvent("cancelled"))

    def fail(self, error: Exception) -> None:
        """End generation with an error."""
        self._finish(ErrorEvent(error))

    def _finish(self, event: FinishEvent | ErrorEvent) -> None:
        with self._lock:
            if self.is_finished:
                return
            self.state = "finished"
            # before the event: a client that reacts to the end may use the request id again
            if self._on_finish is not None:
                self._on_finish(self)
            self._emit(event)


def sample_batch(
    requests: Sequence[GenerationRequest | None], scores: Tensor
) -> tuple[list[int], list[GenerationRequest], bool]:
    """scores float32 [rows, vocabulary] of one step -> the token id of each row, emitted.

    Also returns the requests whose scores are NaN or inf, which receive no token, and whether all
    ids are the greedy ones. None stands for a row without a running request.
    """
    ids, finite = greedy(scores)
    bad: list[GenerationRequest] = []
    all_greedy = True
    for i, request in enumerate(requests):
        if request is None or request.is_finished:
            continue
        if not finite[i]:
            bad.append(request)
            continue
        options = request.options
        if options.temperature > MIN_TEMPERATURE:
            ids[i] = sample(scores[i], options, request.generator)
            all_greedy = False
        if options.num_logprobs is None:
            request.emit_token(TokenEvent(ids[i]))
        else:
            request.emit_token(token_event(scores[i], ids[i], options.num_logprobs))
    return ids, bad, all_greedy


def nan_error() -> ServeError:
    """Error for requests whose logits are NaN or inf."""
    return ServeError(
        "the model produced NaN or inf for the media in this prompt; send other media",
        status=400,
        retry=False,
    )


def fail_request(request: GenerationRequest, error: Exception) -> None:
    """Fail a request by its own fault. The error's text goes to the log, not to the client."""
    _LOG.error("request %s failed in state %s", request.id, request.state, exc_info=error)
    request.fail(
        error
        if isinstance(error, ServeError)
        else ServeError("the model cannot answer this prompt", status=500, retry=False)
    )
