"""Memory of media: one budget for the bytes of all requests, from a body's arrival to its release.

    body arrives -> parsed -> items downloaded -> encoder input, until embedded -> released

Each stage has its part of the budget, takes a lease of its bytes, and waits for it while that part
is used up. So requests cannot block each other: a lease waits only for leases of its own stage,
whose requests go on to the next stage, and those of the last stage end without waiting.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from enum import IntEnum
from typing import Any

from multi_token.media.fetch import MIB
from multi_token.serve.errors import ServeError
from multi_token.serve.tenants import TenantQueue
from multi_token.types import Conversation

DEFAULT_CAPACITY = 2048 * MIB
_NUM_EIGHTHS = (4, 1, 1, 2)
"""Eighths of the budget by stage."""
_BYTES_PER_NUMBER = 64
"""Memory of a number in a list, and of its letters in the frame to a worker."""


class Stage(IntEnum):
    """Stages of media in the order in which a request passes them."""

    BODY = 0
    """The body as received, then the items in it, until they are embedded."""
    PARSE = 1
    """Texts, items and numbers while a body is parsed, beside the body itself."""
    DOWNLOAD = 2
    """An item that is downloaded, until it is decoded."""
    PREPARED = 3
    """An item's encoder input, until it is embedded."""


class MediaMemory:
    """Budget of bytes. Every method is thread-safe.

    Tenants take turns among the leases that wait, and with `is_shared` the bodies of one tenant may
    fill a half of their stage only.
    """

    def __init__(self, capacity: int = DEFAULT_CAPACITY, *, is_shared: bool = False) -> None:
        """`capacity`: bytes. `is_shared`: several tenants send requests."""
        self.capacity = capacity
        self.is_shared = is_shared
        self._lock = threading.Lock()
        self._num_bytes = Counter(dict.fromkeys(Stage, 0))
        self._num_by_tenant: Counter[str] = Counter()
        """Bytes of bodies by tenant."""
        self._waiting: dict[Stage, TenantQueue[MemoryLease]] = {
            stage: TenantQueue() for stage in Stage
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all leases."""
        return sum(self._num_bytes.values())

    @property
    def num_waiting(self) -> int:
        """Number of leases that wait."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    def largest(self, stage: Stage) -> int:
        """Return the bytes of a stage's part, and so of its largest lease."""
        return self.capacity * _NUM_EIGHTHS[stage] // 8

    def lease(self, stage: Stage, tenant: str = "") -> MemoryLease:
        """Return a lease of no bytes yet."""
        return MemoryLease(self, stage, tenant)

    def _acquire(self, lease: MemoryLease, num_bytes: int) -> None:
        with self._lock:
            if lease.granted.cancelled():
                return
            # More than the largest lease would wait for ever.
            lease.num_wanted = min(num_bytes, self.largest(lease.stage))
            self._waiting[lease.stage].add(lease, lease.tenant)
            granted = self._grant()
        _notify(granted)

    def _give_back(self, lease: MemoryLease, num_left: int) -> None:
        with self._lock:
            self._waiting[lease.stage].discard(lease)
            num_less = max(0, lease.num_bytes - num_left)
            self._add(lease, -num_less)
            granted = self._grant()
        _notify(granted)

    def _add(self, lease: MemoryLease, num_bytes: int) -> None:
        lease.num_bytes += num_bytes
        self._num_bytes[lease.stage] += num_bytes
        if lease.stage is Stage.BODY:
            self._num_by_tenant[lease.tenant] += num_bytes
            if not self._num_by_tenant[lease.tenant]:
                del self._num_by_tenant[lease.tenant]

    def _grant(self) -> list[MemoryLease]:
        """Grant all leases that fit now, the last stage first, and tenants in turn."""
        granted: list[MemoryLease] = []
        for stage in reversed(Stage):
            while (lease := self._next_lease(stage)) is not None:
                self._waiting[stage].take(lease)
                self._add(lease, lease.num_wanted)
                granted.append(lease)
        return granted

    def _next_lease(self, stage: Stage) -> MemoryLease | None:
        """Return the lease of a stage that is granted next; None if it has to wait.

        Of each tenant only the oldest lease. If it does not fit, leases of other tenants overtake
        it, but by no more bytes than it wants itself: then they wait until it fits.
        """
        num_left = self.largest(stage) - self._num_bytes[stage]
        overtaken: list[MemoryLease] = []
        for lease in self._waiting[stage].heads():
            # It waits for leases of its own tenant, so no other one overtakes it.
            if self._has_share(lease):
                continue
            if lease.num_wanted > num_left:
                overtaken.append(lease)
                continue
            num_more = lease.num_wanted
            if any(other.num_overtaken + num_more > other.num_wanted for other in overtaken):
                return None
            for other in overtaken:
                other.num_overtaken += num_more
            return lease
        return None

    def _has_share(self, lease: MemoryLease) -> bool:
        if not self.is_shared or lease.stage is not Stage.BODY:
            return False
        own = self._num_by_tenant[lease.tenant]
        return bool(own) and own + lease.num_wanted > self.largest(lease.stage) // 2


class MemoryLease:
    """Bytes of one thing in one stage; releasing it twice is harmless."""

    def __init__(self, memory: MediaMemory, stage: Stage, tenant: str) -> None:
        self.memory = memory
        self.stage = stage
        self.tenant = tenant
        self.num_bytes = 0
        self.num_wanted = 0
        self.num_overtaken = 0
        """Bytes of other tenants that were granted although its turn came before."""
        self.granted: Future[None] = Future()

    def acquire(self, num_bytes: int) -> Future[None]:
        """Return a future that is done once the bytes are granted, and cancelled by `release`.

        A lease is acquired once.
        """
        self.memory._acquire(self, num_bytes)
        return self.granted

    def shrink(self, num_bytes: int) -> None:
        """Keep at most this many bytes."""
        self.memory._give_back(self, num_bytes)

    def release(self) -> None:
        """Give all bytes back; one that waits does not wait any more."""
        self.granted.cancel()
        self.memory._give_back(self, 0)


def _notify(granted: Iterable[MemoryLease]) -> None:
    # Outside of the lock: callbacks of the futures run here.
    for lease in granted:
        with suppress(InvalidStateError):  # released meanwhile
            lease.granted.set_result(None)


class RequestMemory:
    """Leases of one request's body and of what was parsed from it."""

    def __init__(self, memory: MediaMemory, tenant: str = "") -> None:
        self.body = memory.lease(Stage.BODY, tenant)
        self.parse = memory.lease(Stage.PARSE, tenant)

    async def wait_for(self, lease: MemoryLease, num_bytes: int, seconds: float) -> None:
        """Acquire one of the leases. Raises ServeError (429) if that takes longer."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(lease.acquire(num_bytes)), seconds)
        except asyncio.TimeoutError:
            raise ServeError(
                "rate limit: too many large requests arrive at once; try again later",
                status=429,
                code="bodies_too_large",
                retry_after=1,
            ) from None

    def keep(self, num_bytes: int) -> None:
        """Keep only the bytes of the request's items."""
        self.body.shrink(num_bytes)
        # Lists of numbers take more memory than their letters in the body.
        self.parse.shrink(max(0, num_bytes - self.body.num_bytes))

    def release(self) -> None:
        """Give all bytes back."""
        self.body.release()
        self.parse.release()


def parse_bytes(num_bytes: int, max_values: int) -> int:
    """Return the memory that parsing a body takes beside it, if it is one item or numbers only."""
    # Its texts, the base64 of an item as text and as bytes, and the item itself.
    return 4 * num_bytes + _BYTES_PER_NUMBER * min(max_values, num_bytes // 2)


def source_bytes(conversation: Conversation) -> int:
    """Return the memory of the media items in a conversation."""
    return sum(_size_of(item.source) for item in conversation.media)


def _size_of(source: Any) -> int:
    if isinstance(source, (bytes, str)):
        return len(source)
    if isinstance(source, list):
        # Numbers, or equally long lists of them.
        rows = source if source and isinstance(source[0], list) else [source]
        return _BYTES_PER_NUMBER * sum(map(len, rows))
    return 0
