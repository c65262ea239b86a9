"""Memory of media: one budget for the bytes of all requests, from a body's arrival to its release.

    body arrives -> parsed -> items downloaded -> encoder input, until embedded -> released

Each stage takes a lease of its bytes and waits for it while the budget is used up. A later stage
may fill the budget further than an earlier one, so requests that hold bodies cannot block each
other: a part is left for the last stage, and its leases end without waiting for any other.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from enum import IntEnum
from typing import Any

from multi_token.types import Conversation

_NUM_EIGHTHS = (4, 5, 6, 8)
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

    def __init__(self, capacity: int, *, is_shared: bool = False) -> None:
        """`capacity`: bytes. `is_shared`: several tenants send requests."""
        self.capacity = capacity
        self.is_shared = is_shared
        self._lock = threading.Lock()
        self._num_bytes = Counter(dict.fromkeys(Stage, 0))
        self._num_by_tenant: Counter[str] = Counter()
        """Bytes of bodies by tenant."""
        self._waiting: dict[Stage, OrderedDict[str, deque[MemoryLease]]] = {
            stage: OrderedDict() for stage in Stage
        }
        """Leases that wait, by tenant; the first tenant is next."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all leases."""
        return sum(self._num_bytes.values())

    @property
    def num_waiting(self) -> int:
        """Number of leases that wait."""
        with self._lock:
            return sum(len(queue) for stage in Stage for queue in self._waiting[stage].values())

    def largest(self, stage: Stage) -> int:
        """Return the bytes that a stage always gets in the end, and so its largest lease."""
        return self._mark(stage) - (self._mark(Stage(stage - 1)) if stage else 0)

    def lease(self, stage: Stage, tenant: str = "") -> MemoryLease:
        """Return a lease of no bytes yet."""
        return MemoryLease(self, stage, tenant)

    def _mark(self, stage: Stage) -> int:
        """Bytes that this stage and those before it may have together."""
        return self.capacity * _NUM_EIGHTHS[stage] // 8

    def _acquire(self, lease: MemoryLease, num_bytes: int) -> None:
        with self._lock:
            if lease.granted.cancelled():
                return
            # More than the largest lease would wait for ever.
            lease.num_wanted = min(num_bytes, self.largest(lease.stage))
            self._waiting[lease.stage].setdefault(lease.tenant, deque()).append(lease)
            granted = self._grant()
        _notify(granted)

    def _give_back(self, lease: MemoryLease, num_left: int) -> None:
        with self._lock:
            queue = self._waiting[lease.stage].get(lease.tenant)
            if queue is not None and lease in queue:
                queue.remove(lease)
                if not queue:
                    del self._waiting[lease.stage][lease.tenant]
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
            waiting = self._waiting[stage]
            num_blocked = 0
            while num_blocked < len(waiting):
                tenant, queue = next(iter(waiting.items()))
                waiting.move_to_end(tenant)
                # The oldest lease of a tenant only: smaller ones must not starve it.
                if not self._fits(queue[0]):
                    num_blocked += 1
                    continue
                num_blocked = 0
                lease = queue.popleft()
                if not queue:
                    del waiting[tenant]
                self._add(lease, lease.num_wanted)
                granted.append(lease)
        return granted

    def _fits(self, lease: MemoryLease) -> bool:
        mark, num_more = self._mark(lease.stage), lease.num_wanted
        if self.is_shared and lease.stage is Stage.BODY:
            own = self._num_by_tenant[lease.tenant]
            if own and own + num_more > mark // 2:
                return False
        return sum(self._num_bytes[s] for s in Stage if s <= lease.stage) + num_more <= mark


class MemoryLease:
    """Bytes of one thing in one stage; releasing it twice is harmless."""

    def __init__(self, memory: MediaMemory, stage: Stage, tenant: str) -> None:
        self.memory = memory
        self.stage = stage
        self.tenant = tenant
        self.num_bytes = 0
        self.num_wanted = 0
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
