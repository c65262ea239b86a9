"""Output of one request: engine events of its choices -> text deltas and completions.

The engine's thread puts events into a queue. The event loop turns token ids into text, and applies
stop strings and the deadline. It yields deltas at once, or completions at the end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from multi_token.serve.admission import Deadline
from multi_token.serve.detokenizer import IncrementalDetokenizer
from multi_token.serve.engines.base import EngineEvent, ErrorEvent, FinishEvent, TokenEvent
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.responses import Completion, FinishReason, TokenText, Usage


@dataclass(frozen=True)
class TextDelta:
    """New text of one choice."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish: FinishReason | None = None


@dataclass
class _ChoiceState:
    detokenizer: IncrementalDetokenizer
    num_tokens: int = 0
    pending_tokens: list[TokenEvent] = field(default_factory=list)
    """Tokens whose text the detokenizer still holds back."""
    finish: FinishReason | None = None


class RequestOutput:
    """All choices of one request; the engine's thread fills it, the event loop reads it."""

    def __init__(
        self,
        detokenizers: Sequence[IncrementalDetokenizer],
        usage: Usage,
        deadline: Deadline,
        *,
        end_ids: frozenset[int],
        cancel: Callable[[int], None],
        token_text: TokenText | None,
    ) -> None:
        """`detokenizers`: one per choice. `end_ids`: ids that end a choice and are not text.

        `cancel`: ends a choice in the engine. `token_text`: set if log-probabilities were asked
        for.
        """
        self.num_choices = len(detokenizers)
        self.first_token_time: float | None = None
        """`time.monotonic` at the first token of any choice."""
        self.failure: str | None = None
        """Code of the error that ended the request."""
        self._choices = [_ChoiceState(detokenizer) for detokenizer in detokenizers]
        self._usage = usage
        # Of the first choice to start: the other choices of the request find its prefix cached.
        self._num_cached = 0
        self._end_ids = end_ids
        self._cancel = cancel
        self._token_text = token_text
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, EngineEvent]] = asyncio.Queue()
        self._peeked: tuple[int, EngineEvent] | None = None
        # The deadline is an event in the same queue, so a reader waits in one place only.
        late = ErrorEvent(deadline.error())
        self._timer = self._loop.call_later(
            deadline.remaining_s, self._events.put_nowait, (0, late)
        )

    def emit(self, index: int) -> Callable[[EngineEvent], None]:
        """Return the callback by which the engine emits events of one choice."""

        def put(event: EngineEvent) -> None:
            # The engine outlives the loop while the server stops.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return put

    def fail(self, error: ServeError) -> None:
        """End the request with an error. Call it on the event loop."""
        self._events.put_nowait((0, ErrorEvent(error)))

    def close(self) -> None:
        """Stop the deadline's timer; no reader waits any more."""
        self._timer.cancel()

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def is_complete(self) -> bool:
        """True if every choice has finished without an error."""
        return all(choice.finish is not None for choice in self._choices)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage` object."""
        return self._usage.as_json(self.num_tokens, self._num_cached)

    def log_fields(self) -> dict[str, Any]:
        """Fields for the access log."""
        return {
            "prompt_tokens": self._usage.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "media": dict(self._usage.media),
        }

    async def first_event(self) -> None:
        """Wait for the first event and keep it for `deltas`. Raises ServeError for an error."""
        index, event = await self._events.get()
        if isinstance(event, ErrorEvent):
            self._delta_of(index, event)
        self._peeked = (index, event)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Yield deltas as they come, until every choice has finished. Raises ServeError."""
        while not self.is_complete:
            index, event = self._peeked or await self._events.get()
            self._peeked = None
            delta = self._delta_of(index, event)
            if delta is not None:
                yield delta

    async def completions(self) -> list[Completion]:
        """Wait for all choices. Raises ServeError."""
        texts: list[list[str]] = [[] for _ in self._choices]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for delta in self.deltas():
            texts[delta.index].append(delta.text)
            if delta.logprobs is not None:
                logprobs[delta.index] += delta.logprobs["content"]
        completions = []
        for choice, text, content in zip(self._choices, texts, logprobs, strict=True):
            assert choice.finish is not None, "deltas() ends after every choice has finished"
            given = None if self._token_text is None else {"content": content, "refusal": None}
            completions.append(Completion("".join(text), choice.finish, given))
        return completions

    def _delta_of(self, index: int, event: EngineEvent) -> TextDelta | None:
        choice = self._choices[index]
        if isinstance(event, ErrorEvent):
            error = event.error
            if not isinstance(error, ServeError):
                # The engine has logged the error; its text may hold paths or prompts.
                error = ServeError(
                    "generation failed in the engine", status=500, code="engine_failed"
                )
            self.failure = error.code or error.type
            raise error
        # After a stop string the engine may emit tokens until it sees the cancellation.
        if choice.finish is not None:
            return None
        if isinstance(event, FinishEvent):
            if event.reason == "cancelled":
                raise ServeError("the request was cancelled", status=503, code="cancelled")
            choice.finish = event.reason
            return self._delta(index, choice.detokenizer.flush(), choice.finish)
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
            self._num_cached = event.num_cached
        choice.num_tokens += 1
        if event.id not in self._end_ids:
            choice.pending_tokens.append(event)
        text = choice.detokenizer.add(event.id)
        if choice.detokenizer.is_stopped:
            choice.finish = "stop"
            self._cancel(index)
        if not text and choice.finish is None:
            return None
        return self._delta(index, text, choice.finish)

    def _delta(self, index: int, text: str, finish: FinishReason | None) -> TextDelta:
        # Several tokens may make one character: their log-probabilities go out with its text.
        tokens, self._choices[index].pending_tokens = self._choices[index].pending_tokens, []
        logprobs = None
        if self._token_text is not None and tokens:
            logprobs = self._token_text.logprobs(tokens)
        return TextDelta(index, text, logprobs, finish)
