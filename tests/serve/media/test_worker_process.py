"""worker_process.py: killed workers are started again, and workers end with their server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from multi_token.modalities.vector import VectorModality
from multi_token.serve.media import worker_process
from multi_token.serve.media.pool import MediaPool
from multi_token.types import Media
from tests.serve.untrusted import children, is_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]

SERVER = """
import asyncio, os, sys, time
from multi_token.modalities.vector import VectorModality
from multi_token.serve.media.pool import MediaPool
if __name__ == "__main__":
    pool = MediaPool({"vector": VectorModality(dim=2)}, num_workers=2)
    pool.start()
    while not all(worker.is_ready for worker in pool._workers):
        time.sleep(0.01)
    pids = [worker._process.pid for worker in pool._workers]
    for pid in pids:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            pids = [*pids, *map(int, file.read().split())]
    sys.stdout.write(" ".join(map(str, pids)) + "\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaPool]:
    made = MediaPool({"vector": VectorModality(dim=2)}, num_workers=1)
    made.start()
    yield made
    made.stop()


def test_workers_start_in_the_folder_that_holds_the_package() -> None:
    assert (worker_process._PACKAGE_PARENT / "multi_token" / "__init__.py").is_file()


def test_the_start_waits_for_one_worker_and_the_others_follow() -> None:
    pool = MediaPool({"vector": VectorModality(dim=2)}, num_workers=3)
    pool.start()
    try:
        first, *others = pool._workers
        assert first.is_ready and is_read(pool)
        for _ in range(3000):
            if all(worker.is_ready for worker in others):
                break
            time.sleep(0.02)
        assert [worker.is_ready for worker in others] == [True, True]
    finally:
        pool.stop()


def test_a_pool_stopped_while_workers_load_leaves_no_process() -> None:
    pool = MediaPool({"vector": VectorModality(dim=2)}, num_workers=3)
    pool.start()
    pool.stop()
    processes = [worker._process for worker in pool._workers]
    assert all(process is None or process.poll() is not None for process in processes)
    assert not any(worker.is_ready for worker in pool._workers)


def worker(pool: MediaPool) -> int:
    process = pool._workers[0]._process
    assert process is not None
    return process.pid


def is_read(pool: MediaPool) -> bool:
    return asyncio.run(pool.prepare(Media("vector", [1, 2]))).num_features == 1


def test_a_fork_killed_between_items_is_replaced(pool: MediaPool) -> None:
    assert is_read(pool)
    (fork,) = children(worker(pool))
    os.kill(fork, signal.SIGKILL)
    assert is_gone(fork)
    assert is_read(pool)
    assert children(worker(pool)) != [fork]


def test_a_process_killed_between_items_is_replaced(pool: MediaPool) -> None:
    before = worker(pool)
    os.killpg(before, signal.SIGKILL)
    assert is_gone(before)
    assert is_read(pool)
    assert worker(pool) != before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_server(number: signal.Signals) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stdin is not None
    pids = [int(word) for word in server.stdout.readline().split()]
    assert len(pids) == 4
    server.send_signal(number)
    server.wait()
    server.stdin.close()
    server.stdout.close()
    assert all(is_gone(pid) for pid in pids)
