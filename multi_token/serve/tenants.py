"""TenantQueue: things that wait, of which tenants take turns. A tenant is a client's API key."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class TenantQueue(Generic[T]):
    """Queue in which tenants take turns, and each tenant's things keep their order.

    The tenant that had no turn for longest is next. So a tenant with nothing before it waits for
    one turn of each other tenant, however much these have in the queue. Not thread-safe.
    """

    def __init__(self) -> None:
        # Dictionaries as ordered sets: a thing in the middle is removed in constant time.
        self._by_tenant: dict[str, dict[T, None]] = {}
        self._tenants: dict[T, str] = {}
        self._last_turn: dict[str, int] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, thing: T, tenant: str) -> None:
        """Add a thing, as the last one of its tenant."""
        self._by_tenant.setdefault(tenant, {})[thing] = None
        self._tenants[thing] = tenant

    def discard(self, thing: T) -> None:
        """Remove a thing that waits no more, without a turn of its tenant; no effect on others."""
        tenant = self._tenants.pop(thing, None)
        if tenant is not None:
            del self._by_tenant[tenant][thing]
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]

    def take(self, thing: T) -> T:
        """Remove a thing as the turn of its tenant."""
        self._last_turn[self._tenants[thing]] = next(self._numbers)
        self.discard(thing)
        return thing

    def heads(self) -> list[T]:
        """Return the oldest thing of each tenant, in the order of turns."""
        return [next(iter(things)) for _, things in self._in_order()]

    def in_turn(self, num_running: Mapping[str, int] | None = None) -> Iterator[T]:
        """Iterate over all things in the order of turns; the queue must not change meanwhile.

        `num_running`: tenant -> number of things that run already, which count as turns it had.
        """
        counts = num_running or {}
        turns = [
            (counts.get(tenant, 0), place, iter(things))
            for place, (tenant, things) in enumerate(self._in_order())
        ]
        heapq.heapify(turns)
        while turns:
            num_before, place, things = turns[0]
            thing = next(things, None)
            if thing is None:
                heapq.heappop(turns)
            else:
                yield thing
                heapq.heapreplace(turns, (num_before + 1, place, things))

    def _in_order(self) -> list[tuple[str, dict[T, None]]]:
        return sorted(self._by_tenant.items(), key=lambda item: self._last_turn.get(item[0], -1))
