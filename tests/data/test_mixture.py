"""data/mixture.py: the row of each position is known without reading any row."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from multi_token.data.mixture import Mixture, RowRef, permutation


def first(mixture: Mixture, num: int) -> list[RowRef]:
    return [mixture.row_ref(position) for position in range(num)]


def test_sources_are_drawn_by_their_weights() -> None:
    places = first(Mixture([1, 3, 6], seed=0, window=128), 20 * 128)
    shares = Counter(place.source for place in places)
    for source, share in enumerate((0.1, 0.3, 0.6)):
        assert shares[source] / len(places) == pytest.approx(share, abs=0.03)


def test_every_row_of_every_source_comes_once_and_within_its_window() -> None:
    window = 16
    mixture = Mixture([2, 1], seed=3, window=window)
    given = [0, 0]
    for number in range(30):
        places = mixture.row_refs(number)
        for source in (0, 1):
            numbers = sorted(p.number for p in places if p.source == source)
            assert numbers == list(range(given[source], given[source] + len(numbers)))
            given[source] += len(numbers)
    assert sum(given) == 30 * window and min(given) > 0


def test_windows_are_shuffled_each_in_its_own_way_and_a_window_of_one_is_not() -> None:
    mixture = Mixture([1.0], seed=0, window=32)
    orders = [[p.number - 32 * w for p in mixture.row_refs(w)] for w in range(3)]
    assert all(sorted(order) == list(range(32)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(32))
    alone = first(Mixture([1.0], seed=0, window=1), 50)
    assert [place.number for place in alone] == list(range(50))


def test_a_jump_forward_or_back_finds_the_same_rows_as_walking() -> None:
    walked = first(Mixture([1, 2, 5], seed=7, window=8), 400)
    jumping = Mixture([1, 2, 5], seed=7, window=8)
    for position in (399, 0, 250, 3, 251, 120):
        assert jumping.row_ref(position) == walked[position]


def test_another_seed_is_another_mixture_and_another_order() -> None:
    one, other = (first(Mixture([1, 1], seed=seed, window=64), 64) for seed in (0, 1))
    assert [p.source for p in one] != [p.source for p in other]
    assert permutation(50, 0, 0, 0) != permutation(50, 1, 0, 0)


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    # of raw words of Philox, whose stream numpy does not change
    assert permutation(8, 5, 1, 2) == [2, 7, 3, 0, 4, 1, 5, 6]
    assert permutation(8, 2**64 + 5, 1, 2) == permutation(8, 5, 1, 2)
    assert permutation(8, -1, 1, 2) == permutation(8, 2**64 - 1, 1, 2) == [1, 2, 7, 3, 5, 4, 0, 6]


def test_the_mixture_is_the_same_on_every_machine_and_version() -> None:
    places = first(Mixture([1, 3, 6], seed=5, window=8), 16)
    sources = [2, 1, 2, 2, 2, 2, 1, 2, 2, 0, 1, 2, 2, 2, 2, 2]
    numbers = [5, 1, 3, 1, 4, 0, 0, 2, 11, 0, 2, 9, 7, 10, 6, 8]
    assert [place.source for place in places] == sources
    assert [place.number for place in places] == numbers
    assert len(set(places)) == 16, "no row comes twice"


def test_a_source_may_have_a_tiny_weight() -> None:
    places = first(Mixture([1.0, 1e-30], seed=5, window=4), 8)
    assert {place.source for place in places} == {0}


def test_each_lane_of_a_source_is_read_in_order_from_its_first_row() -> None:
    window, num_windows = 512, 3
    positions = np.arange(window * num_windows)
    mixture = Mixture([1.0], seed=3, window=window).with_lanes([2], lambda at: at // 4)
    numbers = np.array([ref.number for n in range(num_windows) for ref in mixture.row_refs(n)])
    for lane in range(2):
        found = numbers[positions // 4 % 2 == lane]
        assert found.tolist() == list(range(lane, 2 * len(found), 2))
