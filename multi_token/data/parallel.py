"""Parallel passes over rows: data workers of every process read, the main process shows a bar.

all rows -> spread_rows, share_of (processes) -> read_parallel (data workers) -> results in order
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.utils.data import Dataset, get_worker_info

from multi_token.data.dataset import worker_loader
from multi_token.distributed import is_main_process, num_processes, rank

T = TypeVar("T")

_LINE_INTERVAL_S = 30.0
"""Time between two lines of a pass whose output is no terminal."""


def read_parallel(
    dataset: Dataset[T],
    *,
    num_workers: int,
    console: Console,
    description: str,
    total: int,
    size: Callable[[T], int] = lambda _: 1,
) -> Iterator[T]:
    """Yield the items of a dataset in order, as data workers return them, with a bar.

    A dataset returns an error of a row as its item: one that it raises would arrive inside the
    traceback of a worker.

    Args:
        dataset: Items by number, with a length. Must be picklable if `num_workers` is not 0.
        num_workers: Processes that read; 0 reads in this one.
        console: Console of the bar; a quiet one shows nothing.
        description: Label of the bar.
        total: Sum of all sizes, the end of the bar.
        size: Progress that an item makes.
    """
    with progress_bar(console, description, total) as advance:
        for item in worker_loader(dataset, num_workers):
            yield item
            # after the yield: the work on an item is a part of its time
            advance(size(item))


def pass_console(*, quiet: bool = False) -> Console:
    """Return the console of a bar: the terminal's in the main process, else one that is quiet."""
    is_reader = get_worker_info() is not None
    return Console(stderr=True, quiet=quiet or is_reader or not is_main_process())


@contextmanager
def progress_bar(console: Console, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left; yields the function that moves it on.

    Where the console is no terminal, a line is printed every 30 seconds instead.
    """
    began = printed = time.monotonic()
    done = 0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total)

        def advance(num: int = 1) -> None:
            nonlocal done, printed
            done += num
            progress.advance(task, num)
            now = time.monotonic()
            if not console.is_terminal and now - printed > _LINE_INTERVAL_S:
                printed = now
                rate = done / (now - began)
                console.print(
                    f"{description}: {done:,} of {total:,}, {rate:,.0f}/s, "
                    f"{max(0, total - done) / rate:,.0f} s left",
                    highlight=False,
                )

        yield advance


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """`57/s`, or nothing before there is a rate."""
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


def share_of(items: Sequence[Any]) -> Sequence[Any]:
    """Return the items of this process: every n-th, since neighbours often cost alike."""
    return items[rank() :: num_processes()]


def spread_rows(num_rows: int, start: int, stop: int) -> NDArray[np.int64]:
    """Return a part of an order of all rows in which every beginning is spread evenly.

    A pass that needs some rows of many reads the order from its beginning until it has enough.

    Args:
        num_rows: Number of all rows.
        start: First place of the part.
        stop: Place after the part; the order has up to twice as many places as rows.

    Returns:
        The rows at these places; a place may be empty.
    """
    # the places of the van der Corput sequence: the binary digits of a place, reversed
    num_bits = max(1, (num_rows - 1).bit_length())
    places = np.arange(start, min(stop, 1 << num_bits), dtype=np.int64)
    rows = np.zeros_like(places)
    for bit in range(num_bits):
        rows |= ((places >> bit) & 1) << (num_bits - 1 - bit)
    return rows[rows < num_rows]
