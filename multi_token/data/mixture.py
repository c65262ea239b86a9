"""Weighted mixture of sources, shuffled in windows: each position by arithmetic, without state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DRAW, _ORDER = 0, 1
"""Purposes of random numbers; each has its own sequence."""
_KEPT = 4
"""Windows whose plan is kept in memory."""


@dataclass(frozen=True)
class RowRef:
    """A row as the index of its source, and its number in that source, from 0."""

    source: int
    number: int


class Mixture:
    """Endless map from position to RowRef.

    1. The source of a position is drawn by weight.
    2. The n-th draw of a source is its n-th row, so no row is left out.
    3. Each window of `window` positions is put in random order.

    Steps 1 and 3 depend on the seed and the number of the window alone (Philox, a counter-based
    generator: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011). A jump to a
    position costs one draw for each position before it, and reads no row.
    """

    def __init__(self, weights: Sequence[float], *, seed: int, window: int) -> None:
        """`weights`: one for each source, above 0, in any unit."""
        self.window = window
        self.seed = seed
        self.num_sources = len(weights)
        shares = np.cumsum(np.asarray(weights, dtype=np.float64)) / sum(weights)
        # integers, not floats: 64 random bits below the first bound are source 0, and so on
        bounds = [min(int(share * 2.0**64), 2**64 - 1) for share in shares[:-1]]
        self._bounds = np.array(bounds, dtype=np.uint64)
        self._counted = (0, np.zeros(self.num_sources, dtype=np.int64))
        self._planned: dict[int, list[RowRef]] = {}
        self._num_lanes = [1] * self.num_sources
        self._lane_of: Callable[[NDArray[np.int64]], NDArray[np.int64]] = np.zeros_like
        self._counted_lanes: tuple[int, list[NDArray[np.int64]]] = (0, [])

    def with_lanes(
        self,
        num_lanes: Sequence[int],
        lane_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> Mixture:
        """Return a copy in which the positions of a reader take rows of few lanes (RowStream).

        Args:
            num_lanes: Lanes of each source.
            lane_of: Positions -> numbers; a number modulo `num_lanes` is the lane of a position.
        """
        found = copy(self)
        found._planned, found._counted_lanes = {}, (0, [])
        found._num_lanes, found._lane_of = list(num_lanes), lane_of
        return found

    def row_ref(self, position: int) -> RowRef:
        """Return the source and row number of a position."""
        number, offset = divmod(position, self.window)
        return self.row_refs(number)[offset]

    def row_refs(self, number: int) -> list[RowRef]:
        """Return the rows of a window, in the order in which they are read."""
        if number not in self._planned:
            if len(self._planned) == _KEPT:
                del self._planned[next(iter(self._planned))]
            self._planned[number] = self._plan(number)
        return self._planned[number]

    def _plan(self, number: int) -> list[RowRef]:
        drawn = self._drawn(number)
        numbers = np.empty(self.window, dtype=np.int64)
        for source, before in enumerate(self._before(number)):
            own = drawn == source
            numbers[own] = before + np.arange(own.sum())
        # within the window alone: its rows can then be read ahead, in the order of the files
        order = permutation(self.window, self.seed, _ORDER, number)
        drawn, numbers = drawn[order], numbers[order]
        before = self._before_in_lanes(number)
        for source, num_lanes in enumerate(self._num_lanes):
            if num_lanes > 1:
                at, lanes = self._lanes(source, number, drawn)
                numbers[at] = (before[source][lanes] + _ranks(lanes)) * num_lanes + lanes
        return [RowRef(int(s), int(n)) for s, n in zip(drawn, numbers, strict=True)]

    def _lanes(
        self, source: int, number: int, drawn: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the places of a source in a window, whose sources are `drawn`, and their lanes."""
        at = np.flatnonzero(drawn == source)
        return at, self._lane_of(number * self.window + at) % self._num_lanes[source]

    def _before_in_lanes(self, number: int) -> list[NDArray[np.int64]]:
        """Count the rows of each lane of each source before a window."""
        if max(self._num_lanes) == 1:
            return []
        known, counts = self._counted_lanes
        if known > number or not counts:
            known, counts = 0, [np.zeros(n, np.int64) for n in self._num_lanes]
        for passed in range(known, number):
            order = permutation(self.window, self.seed, _ORDER, passed)
            drawn = self._drawn(passed)[order]
            counts = [
                count + np.bincount(self._lanes(source, passed, drawn)[1], minlength=len(count))
                for source, count in enumerate(counts)
            ]
        self._counted_lanes = (number, counts)
        return counts

    def _drawn(self, number: int) -> NDArray[np.int64]:
        """Draw the sources of a window's positions, before the shuffle."""
        words = random_integers(self.window, self.seed, _DRAW, number)
        return np.searchsorted(self._bounds, words, side="right")

    def _before(self, number: int) -> NDArray[np.int64]:
        """Count the rows of each source before a window."""
        if self.num_sources == 1:
            return np.array([number * self.window])
        # counts of the window before are kept: the usual next window costs one draw of a window
        known, counts = self._counted
        if known > number:
            known, counts = 0, np.zeros(self.num_sources, dtype=np.int64)
        for passed in range(known, number):
            counts = counts + np.bincount(self._drawn(passed), minlength=self.num_sources)
        self._counted = (number, counts)
        return counts


def _ranks(lanes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each item the number of equal ones before it."""
    order = np.argsort(lanes, kind="stable")
    in_order = lanes[order]
    ranks = np.empty_like(lanes)
    ranks[order] = np.arange(len(lanes)) - np.searchsorted(in_order, in_order)
    return ranks


def random_integers(size: int, seed: int, purpose: int, number: int) -> NDArray[np.uint64]:
    """Return uint64 [size], the same for the same arguments on every machine."""
    # Philox is defined by its key and counter; numpy keeps `random_raw` stable across versions
    key = np.array([seed % 2**64, purpose], dtype=np.uint64)
    counter = np.array([0, 0, 0, number], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(size)


def permutation(size: int, seed: int, purpose: int, number: int) -> list[int]:
    """Return the numbers below `size` in random order."""
    # stable: should two words be equal, every machine still sorts alike
    words = random_integers(size, seed, purpose, number)
    return np.argsort(words, kind="stable").tolist()
