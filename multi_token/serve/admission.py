"""Admission: a bounded number of requests, shared by API keys, each with a deadline.

No tenant can take all places, and those that wait get their turns by tenant (`TenantQueue`), not
by arrival alone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from multi_token.serve.errors import ServeError

T = TypeVar("T")

_MAX_RETRY_AFTER_S = 60
_EMA_WEIGHT = 0.2
"""Weight of the last request in the mean service time."""
_INITIAL_SERVICE_S = 2.0
_SHARE_OF_FREE = 3
"""A tenant may hold this many times the places that stay free, so a quarter is left for others."""


class ServiceTime:
    """Moving average of the service time of a request, and the Retry-After computed from it."""

    def __init__(self) -> None:
        self.mean_s = _INITIAL_SERVICE_S

    def record(self, seconds: float) -> None:
        self.mean_s += _EMA_WEIGHT * (seconds - self.mean_s)

    def retry_after_s(self, num_rounds: float) -> int:
        """Return whole seconds, 1 to 60, in which `num_rounds` requests complete in turn."""
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(num_rounds * self.mean_s)))


class Admission:
    """At most `max_batch` requests run and `max_queue` wait; further ones are refused.

    Lives on one event loop, so it needs no locks.
    """

    def __init__(self, max_batch: int, max_queue: int, *, is_shared: bool = False) -> None:
        """`is_shared`: several tenants send requests, so none of them may take all places."""
        self.is_shared = is_shared
        self._num_by_tenant: Counter[str] = Counter()
        self.max_batch = max_batch
        self.capacity = max_batch + max_queue
        self.num_admitted = 0
        self.is_draining = False
        self._service_time = ServiceTime()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextmanager
    def admit(self, num_choices: int = 1, tenant: str = "") -> Iterator[None]:
        """Admit one request with `num_choices` choices, until the context ends.

        Raises ServeError: 503 while draining, 429 if the server is full or the tenant has its
        share, 400 if the capacity is smaller than `num_choices`.
        """
        self.check_capacity(num_choices, tenant)
        self.num_admitted += num_choices
        self._num_by_tenant[tenant] += num_choices
        self._empty.clear()
        started = time.monotonic()
        try:
            yield
            # Not in `finally`: a request that fails early would shorten the mean.
            self._service_time.record(time.monotonic() - started)
        finally:
            self.num_admitted -= num_choices
            self._num_by_tenant[tenant] -= num_choices
            if not self._num_by_tenant[tenant]:
                del self._num_by_tenant[tenant]
            if not self.num_admitted:
                self._empty.set()

    def check_capacity(self, num_choices: int = 1, tenant: str = "") -> None:
        """Raise what `admit` would raise now. Cheap, so a body need not be parsed first."""
        if self.is_draining:
            raise ServeError(
                "the server is shutting down and takes no new requests",
                status=503,
                code="shutting_down",
                retry=True,
            )
        if num_choices > self.capacity:
            raise ServeError(
                f"n is {num_choices}, but this server allows at most {self.capacity}; lower n",
                param="n",
                code="invalid_value",
            )
        num_left = self.capacity - self.num_admitted - num_choices
        own = self._num_by_tenant[tenant]
        # Dynamic thresholds, as in shared buffers of switches: one tenant alone may take three
        # quarters, two of them three sevenths each, and so on. No share is kept for a tenant that
        # sends nothing, and one that has nothing is refused only if the server is full.
        has_share = self.is_shared and own > 0 and own + num_choices > _SHARE_OF_FREE * num_left
        if num_left < 0 or has_share:
            is_full = num_left < 0
            whose = f"{self.capacity} requests" if is_full else f"{own} requests of this API key"
            raise ServeError(
                f"rate limit: {whose} run or wait already; try again later",
                status=429,
                code="queue_full",
                retry_after=self.estimated_wait_s(),
            )

    def estimated_wait_s(self) -> int:
        """Return whole seconds until a request should be admitted, 1 to 60."""
        num_waiting = max(0, self.num_admitted - self.max_batch)
        return self._service_time.retry_after_s(1 + num_waiting / self.max_batch)

    def drain(self) -> None:
        self.is_draining = True

    async def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until all admitted requests have ended; False after `timeout_s`."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return self._empty.is_set()


class Deadline:
    """A point in time, and the error for requests that pass it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._expires_at = time.monotonic() + seconds

    @classmethod
    def of(cls, header: str | None, longest_s: float) -> Deadline:
        """`X-Request-Timeout` in seconds lowers the server's own limit. Raises ServeError."""
        if header is None:
            return cls(longest_s)
        try:
            seconds = float(header)
        except ValueError:
            seconds = math.nan
        # A comparison with NaN is false, so NaN is refused too.
        if not 0 < seconds < math.inf:
            raise ServeError(
                "X-Request-Timeout should be a number of seconds over 0",
                param="X-Request-Timeout",
                code="invalid_value",
            )
        return cls(min(seconds, longest_s))

    @property
    def remaining_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self._expires_at - time.monotonic())

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Return the result of `work`. Raises ServeError (504) if the deadline passes first."""
        try:
            return await asyncio.wait_for(work, self.remaining_s)
        except asyncio.TimeoutError:
            raise self.error() from None

    def error(self) -> ServeError:
        """Return a 504; clients should not send the request again, as it would take as long."""
        return ServeError(
            f"the request took longer than {self.seconds:g} s",
            status=504,
            code="deadline_exceeded",
            retry=False,
        )
