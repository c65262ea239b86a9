"""serve/media/pool.py with many clients: turns, slow hosts, memory, and clients that leave."""

from __future__ import annotations

import asyncio
import gc
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from multi_token.media.safe_http import UrlPolicy
from multi_token.serve.errors import ServeError
from multi_token.serve.media.memory import MediaMemory, Stage
from multi_token.serve.media.pool import MediaPool
from multi_token.types import Media
from tests.serve.untrusted import MIB, TIMEOUT_S, text_of

pytestmark = pytest.mark.slow


def test_a_waiting_item_of_a_disconnected_client_is_not_decoded(pool: MediaPool) -> None:
    async def leave() -> int:
        before = int(text_of(await pool.prepare(Media("trial", b"count"))))
        busy = asyncio.ensure_future(pool.prepare(Media("trial", b"sleep 0.3")))
        left = [asyncio.ensure_future(pool.prepare(Media("trial", b"count"))) for _ in range(5)]
        while pool.num_waiting < 5:  # the only worker is busy, and five items wait
            await asyncio.sleep(0.001)
        for future in left:
            future.cancel()
        await busy
        return int(text_of(await pool.prepare(Media("trial", b"count")))) - before

    assert asyncio.run(leave()) == 1


def test_an_item_of_a_disconnected_client_leaves_its_bytes_at_once(pool: MediaPool) -> None:
    source = b"hello, " + bytes(1_000)
    num_references = sys.getrefcount(source)

    async def leave() -> None:
        busy = asyncio.ensure_future(pool.prepare(Media("trial", b"sleep 0.5")))
        while not pool._running:
            await asyncio.sleep(0.001)
        left = asyncio.ensure_future(pool.prepare(Media("trial", source)))
        while pool.num_waiting < 1:
            await asyncio.sleep(0.001)
        assert sys.getrefcount(source) > num_references
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        del left
        await asyncio.sleep(0)  # callbacks of the cancelled futures
        gc.collect()
        assert pool.num_waiting == 0 and not busy.done()
        assert sys.getrefcount(source) == num_references
        await busy

    asyncio.run(leave())


def test_tenants_take_turns_at_the_workers(pool: MediaPool) -> None:
    async def turns() -> list[int]:
        before = int(text_of(await pool.prepare(Media("trial", b"count"))))
        busy = asyncio.ensure_future(pool.prepare(Media("trial", b"sleep 0.3")))
        tenants = ["a"] * 5 + ["b"]
        counts = [
            asyncio.ensure_future(pool.prepare(Media("trial", b"count"), tenant=tenant))
            for tenant in tenants
        ]
        while pool.num_waiting < len(counts):
            await asyncio.sleep(0.001)
        await busy
        return [int(text_of(prepared)) - before for prepared in await asyncio.gather(*counts)]

    assert asyncio.run(turns()) == [1, 3, 4, 5, 6, 2]


@contextmanager
def slow_host() -> Iterator[tuple[socket.socket, str, UrlPolicy]]:
    """A host that accepts connections and never answers; its name; a policy that allows it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"slow.example:{silent.getsockname()[1]}"
        yield (
            silent,
            host,
            UrlPolicy(
                allowed_hosts=(host,),
                timeout_s=60,
                resolve=lambda name, port: ["127.0.0.1"],
                is_allowed_address=lambda address: True,
            ),
        )


def test_hosts_that_never_answer_delay_no_item_without_a_web_address(
    modalities: dict[str, Any],
) -> None:
    with slow_host() as (silent, host, policy):
        pool = MediaPool(modalities, num_workers=1, urls=policy)
        pool.start()

        async def others_while_hosts_are_silent() -> list[str]:
            slow = [
                asyncio.ensure_future(pool.prepare(Media("trial", f"http://{host}/{i}")))
                for i in range(20)
            ]
            connections = [(await asyncio.to_thread(silent.accept))[0] for _ in range(8)]
            sources = (b"hello", "data:,hello", "do hello")
            texts = [text_of(await pool.prepare(Media("trial", s))) for s in sources]
            assert not any(each.done() for each in slow)
            for each in slow:
                each.cancel()
            for connection in connections:
                connection.close()
            return texts

        try:
            assert asyncio.run(others_while_hosts_are_silent()) == ["hello"] * 3
        finally:
            pool.stop()


def test_a_download_counts_until_its_thread_is_done(modalities: dict[str, Any]) -> None:
    with slow_host() as (silent, host, policy):
        memory = MediaMemory(2048 * MIB)
        pool = MediaPool(modalities, num_workers=1, urls=policy, memory=memory)
        pool.start()

        async def leave() -> None:
            item = asyncio.ensure_future(pool.prepare(Media("trial", f"http://{host}/1")))
            connection, _ = await asyncio.to_thread(silent.accept)
            item.cancel()
            await asyncio.gather(item, return_exceptions=True)
            assert memory.num_bytes == pool.limits.max_bytes
            connection.close()
            while memory.num_bytes:
                await asyncio.sleep(0.001)

        try:
            asyncio.run(leave())
        finally:
            pool.stop()


def test_the_result_for_a_disconnected_client_is_dropped(pool: MediaPool) -> None:
    async def leave() -> str:
        busy = asyncio.ensure_future(pool.prepare(Media("trial", b"sleep 0.2")))
        await asyncio.sleep(0.1)
        busy.cancel()
        return text_of(await pool.prepare(Media("trial", b"hello")))

    assert asyncio.run(leave()) == "hello"


def test_a_result_is_read_once_there_is_memory_for_it(modalities: dict[str, Any]) -> None:
    memory = MediaMemory(8 * 2 * MIB)
    pool = MediaPool(modalities, num_workers=2, timeout_s=TIMEOUT_S, memory=memory)
    pool.start()

    async def many() -> list[str]:
        """Results of 1 MiB each, 8 of which fill the memory."""
        leases = [memory.lease(Stage.PREPARED) for _ in range(20)]
        items = [
            asyncio.ensure_future(
                pool.prepare(Media("trial", f"letters {MIB - 1000}".encode()), memory=lease)
            )
            for lease in leases
        ]
        while not memory.num_waiting:
            await asyncio.sleep(0.001)
        assert sum(item.done() for item in items) <= 8
        # a client that leaves while its result waits: the worker goes on
        waiting = next(i for i, lease in enumerate(leases) if lease.num_wanted > lease.num_bytes)
        items[waiting].cancel()
        leases[waiting].release()
        for number, (item, lease) in enumerate(zip(items, leases, strict=True)):
            if number != waiting:
                assert (await item).num_features == MIB - 1000
                assert memory.num_bytes <= memory.capacity
                lease.release()
        return [text_of(await pool.prepare(Media("trial", b"hello"))) for _ in range(4)]

    try:
        assert asyncio.run(many()) == ["hello"] * 4
        assert memory.num_bytes == 0 and memory.num_waiting == 0
    finally:
        pool.stop()


def test_a_pool_stops_while_a_result_waits_for_memory(modalities: dict[str, Any]) -> None:
    memory = MediaMemory(8 * MIB)
    pool = MediaPool(modalities, num_workers=1, memory=memory)
    pool.start()

    async def stop() -> list[Any]:
        full = memory.lease(Stage.PREPARED)
        full.acquire(2 * MIB)
        others = [memory.lease(Stage.PREPARED) for _ in range(3)]
        for lease in others:
            lease.acquire(2 * MIB)
        item = asyncio.ensure_future(pool.prepare(Media("trial", b"letters 900000")))
        while not memory.num_waiting:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(pool.stop)
        return list(await asyncio.gather(item, return_exceptions=True))

    (error,) = asyncio.run(stop())
    assert isinstance(error, ServeError) and error.status == 503
