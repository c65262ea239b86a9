"""The answer of one request while it grows: events of the engine become pieces of text.

Border: it gets tokens and makes text of them; it does not know HTTP, nor how prompts are made.
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
from multi_token.serve.openai.responses import FinishReason, TokenText, Usage


@dataclass(frozen=True)
class TextDelta:
    """What one choice has more than before."""

    index: int
    text: str
    logprobs: dict[str, Any] | None = None
    finish: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """One choice, complete."""

    text: str
    finish: FinishReason
    logprobs: dict[str, Any] | None


@dataclass
class _ChoiceState:
    text: IncrementalDetokenizer
    num_tokens: int = 0
    pending_tokens: list[TokenEvent] = field(default_factory=list)
    """Tokens whose text is held back."""
    finish: FinishReason | None = None


class RequestOutput:
    """All choices of one request. Filled from the engine's thread, read on the event loop."""

    def __init__(
        self,
        texts: Sequence[IncrementalDetokenizer],
        usage: Usage,
        deadline: Deadline,
        *,
        end_ids: frozenset[int],
        cancel: Callable[[int], None],
        token_text: TokenText | None,
    ) -> None:
        """`end_ids`: ids that end an answer and are no text of it. `cancel`: ends a choice early.

        `spelling`: how tokens are told, if log-probabilities were asked for.
        """
        self.num_choices = len(texts)
        self.first_token_time: float | None = None
        self.failure: str | None = None
        """The code of the error that ended it."""
        self._choices = [_ChoiceState(text) for text in texts]
        self._usage = usage
        self._num_cached = 0  # of the choice that began first: the others may find what it left
        self._deadline = deadline
        self._end_ids = end_ids
        self._cancel = cancel
        self._token_text = token_text
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, EngineEvent]] = asyncio.Queue()
        self._peeked: tuple[int, EngineEvent] | None = None
        late = ErrorEvent(deadline.error())
        self._timer = self._loop.call_later(
            deadline.remaining_s, self._events.put_nowait, (0, late)
        )

    def emit(self, index: int) -> Callable[[EngineEvent], None]:
        """Where the engine tells of one choice; a queue of at most `max_new_tokens` events."""

        def put(event: EngineEvent) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return put

    def fail(self, error: ServeError) -> None:
        """End it with an error, on the event loop."""
        self._events.put_nowait((0, ErrorEvent(error)))

    def close(self) -> None:
        """Nobody waits for it any more."""
        self._timer.cancel()

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices so far."""
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def is_complete(self) -> bool:
        """Whether every choice has ended by itself."""
        return all(choice.finish is not None for choice in self._choices)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return self._usage.as_json(self.num_tokens, self._num_cached)

    def log_fields(self) -> dict[str, Any]:
        """What the log says of it."""
        return {
            "prompt_tokens": self._usage.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "media": dict(self._usage.media),
        }

    async def first_event(self) -> None:
        """Until something has come of it. Raises ServeError if that is an error."""
        index, event = await self._events.get()
        if isinstance(event, ErrorEvent):
            self._delta_of(index, event)
        self._peeked = (index, event)

    async def deltas(self) -> AsyncIterator[TextDelta]:
        """Pieces as they come, until every choice has ended. Raises ServeError."""
        while not self.is_complete:
            index, event = self._peeked or await self._events.get()
            self._peeked = None
            piece = self._delta_of(index, event)
            if piece is not None:
                yield piece

    async def completions(self) -> list[Completion]:
        """All choices, complete. Raises ServeError."""
        texts: list[list[str]] = [[] for _ in self._choices]
        told: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for piece in self.deltas():
            texts[piece.index].append(piece.text)
            if piece.logprobs is not None:
                told[piece.index] += piece.logprobs["content"]
        wholes = []
        for choice, text, content in zip(self._choices, texts, told, strict=True):
            assert choice.finish is not None, "pieces() ends with every choice"
            logprobs = None if self._token_text is None else {"content": content, "refusal": None}
            wholes.append(Completion("".join(text), choice.finish, logprobs))
        return wholes

    def _delta_of(self, index: int, event: EngineEvent) -> TextDelta | None:
        choice = self._choices[index]
        if isinstance(event, ErrorEvent):
            error = _as_serve_error(event.error)
            self.failure = error.code or error.type
            raise error
        if choice.finish is not None:
            return None  # it ended at a stop string, and the engine did not know yet
        if isinstance(event, FinishEvent):
            if event.reason == "cancelled":
                raise ServeError("the answer was cancelled", status=503, code="cancelled")
            choice.finish = event.reason
            return self._delta(index, choice.text.flush(), choice.finish)
        if self.first_token_time is None:
            self.first_token_time = time.monotonic()
            self._num_cached = event.num_cached
        choice.num_tokens += 1
        if event.id not in self._end_ids:
            choice.pending_tokens.append(event)
        text = choice.text.add(event.id)
        if choice.text.is_stopped:
            choice.finish = "stop"
            self._cancel(index)
        if not text and choice.finish is None:
            return None
        return self._delta(index, text, choice.finish)

    def _delta(self, index: int, text: str, finish: FinishReason | None) -> TextDelta:
        held, self._choices[index].pending_tokens = self._choices[index].pending_tokens, []
        logprobs = None
        if self._token_text is not None and held:
            logprobs = self._token_text.logprobs(held)
        return TextDelta(index, text, logprobs, finish)


def _as_serve_error(error: Exception) -> ServeError:
    if isinstance(error, ServeError):
        return error
    return ServeError("the answer could not be completed", status=500, code="engine_failed")
