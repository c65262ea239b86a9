"""data/parallel.py: rows are spread and read in order, and a log shows how far a pass is."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from torch.utils.data import Dataset

from multi_token.data import parallel
from multi_token.data.parallel import progress_bar, read_parallel, spread_rows


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> int:
        return 10 * index


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_are_read_in_order_with_any_number_of_workers(num_workers: int) -> None:
    quiet = Console(quiet=True)
    read = read_parallel(
        Numbers(), num_workers=num_workers, console=quiet, description="Reading", total=7
    )
    assert list(read) == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize("num_rows", [1, 2, 5, 64, 1000])
def test_every_row_has_one_place_of_the_order(num_rows: int) -> None:
    order = spread_rows(num_rows, 0, 2 * num_rows + 1)
    assert sorted(order.tolist()) == list(range(num_rows))
    parts = [spread_rows(num_rows, start, start + 3) for start in range(0, 2 * num_rows + 1, 3)]
    assert np.concatenate(parts).tolist() == order.tolist()


@pytest.mark.parametrize("num_wanted", [10, 100, 333])
def test_every_beginning_of_the_order_is_spread_over_all_rows(num_wanted: int) -> None:
    beginning = sorted(spread_rows(1000, 0, 2048)[:num_wanted].tolist())
    gaps = np.diff([0, *beginning, 1000])
    assert gaps.max() <= 2.1 * 1000 / num_wanted + 1


def test_a_pass_whose_output_is_no_terminal_prints_lines_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(parallel.time, "monotonic", lambda: float(next(clock)))
    console = Console(file=io.StringIO(), width=200)
    with progress_bar(console, "Reading rows", 600) as advance:
        for _ in range(4):
            advance(50)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().split("\n")
    assert "Reading rows: 100 of 600, 2/s, 200 s left" in lines
    assert len(lines) <= 1 + 2, "a line for every 30 seconds, not for every item"
