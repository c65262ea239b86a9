"""Scheduler: the queue of waiting requests, and the set of running ones.

First come, first served: `take_next` removes requests from the head of the queue as long as the
engine's `fits` admits them together. A request that does not fit blocks the later ones unless
`allow_overtaking`, so a large prompt is not starved by a stream of small ones.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from multi_token.serve.engines.request import GenerationRequest
from multi_token.serve.errors import ServeError


class Scheduler:
    """All requests of an engine. `condition` is its lock, notified when a request is added."""

    def __init__(self) -> None:
        # reentrant: a request that finishes inside of a locked section removes itself
        self.condition = threading.Condition(threading.RLock())
        self.waiting: deque[GenerationRequest] = deque()
        self._by_id: dict[str, GenerationRequest] = {}

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ServeError if its id is in use."""
        with self.condition:
            if request.id in self._by_id:
                raise ServeError("a request with this id is running", param="request_id")
            self._by_id[request.id] = request
            self.waiting.append(request)
            self.condition.notify_all()

    def take_next(
        self,
        fits: Callable[[list[GenerationRequest]], bool],
        *,
        max_requests: int,
        allow_overtaking: bool,
    ) -> list[GenerationRequest]:
        """Move the next requests from waiting to running, and return them.

        `fits`: whether a list of requests may start together.
        """
        taken: list[GenerationRequest] = []
        with self.condition:
            for request in list(self.waiting):
                if len(taken) == max_requests:
                    break
                if fits([*taken, request]):
                    taken.append(request)
                    self.waiting.remove(request)
                elif not allow_overtaking:
                    break
        return taken

    def mark_running(self, request: GenerationRequest) -> None:
        """Move one request from waiting to running."""
        with self.condition:
            if request in self.waiting:
                self.waiting.remove(request)

    def is_waiting(self, request: GenerationRequest) -> bool:
        with self.condition:
            return request in self.waiting

    def remove(self, request: GenerationRequest) -> None:
        """Forget a finished request."""
        with self.condition:
            # the id may already belong to a later request
            if self._by_id.get(request.id) is request:
                del self._by_id[request.id]
            if request in self.waiting:
                self.waiting.remove(request)

    def cancel(self, request_id: str) -> GenerationRequest | None:
        """End a request early; return it, or None for an unknown id."""
        with self.condition:
            request = self._by_id.get(request_id)
        # outside of the lock: `cancel` calls the client, which may submit to this scheduler
        if request is not None:
            request.cancel()
        return request

    def unfinished(self) -> list[GenerationRequest]:
        """Return waiting and running requests."""
        with self.condition:
            return list(self._by_id.values())

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        with self.condition:
            return len(self._by_id) - len(self.waiting)
