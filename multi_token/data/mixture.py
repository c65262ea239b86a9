"""Weighted mixture of sources, shuffled in windows: each position by arithmetic, without state."""

from __future__ import annotations

from collections.abc import Sequence
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
        return [RowRef(int(drawn[i]), int(numbers[i])) for i in order]

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
