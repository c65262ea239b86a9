"""Work in a thread that ends with it, and takes its pool of OpenMP threads along.

Border: one function. Which work has to be done so is the caller's to know.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_short_thread(work: Callable[[], T]) -> T:
    """The result of `work`, or what it raises.

    Each thread that lets torch compute keeps threads that help it, as long as it lives. If those
    of all are more than the cores, libgomp's helpers stop waiting actively for work, and a prompt
    is read as if there were none (docs/log.md, "The server on two cores"). So a server loads and
    tries in threads that end, and only the engine's own thread keeps helpers.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(work).result()
