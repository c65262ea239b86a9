"""Several engines behind one gateway: which of them live and are right, and which is asked next.

Border: health, choice and second tries. What a prompt is and what an engine says is vllm.py's and
vllm_wire.py's. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from multi_token.errors import LanguageModelError
from multi_token.serve.engines.vllm.client import EngineFault, Reason, VllmClient
from multi_token.serve.errors import ServeError

LOG = logging.getLogger("multi_token.serve")
_NUM_MISSES = 2
"""Looks in a row without an answer after which what an engine was asked is given up."""
_MAX_TRIES = 2
"""Engines that may fail at one prompt: it could be the prompt that kills them."""
_PROOF_S = 120.0
"""The longest that an engine may take for the proof; the first prompts may be slow."""
_MAX_RETRY_AFTER_S = 60
_NEW_WEIGHT = 0.2

State = Literal["out", "in", "refused"]


class EngineRefused(LanguageModelError):
    """An engine that answers, but not as it should."""


@dataclass(eq=False)
class PooledEngine:
    """One engine, and what is known of it."""

    client: VllmClient
    state: State = "out"
    """`out`: does not answer, or has not been asked yet; `refused`: answers what is wrong."""
    why: str = "was not asked yet"
    proof: Any = None
    """What the proof found out about it."""
    num_asked: int = 0
    """Prompts that it is at."""
    has_been_seen: bool = False
    """Whether it has been looked at once."""
    num_misses: int = 0
    attempts: set[asyncio.Task[None]] = field(default_factory=set)


class EnginePool:
    """Looks after engines, and hands each prompt to the one with the fewest.

    An engine is used once `prove` has found nothing wrong with it, until it fails; then it is
    proved again. One that is found wrong is left alone until it has died and come back.
    """

    def __init__(
        self,
        clients: Sequence[VllmClient],
        prove: Callable[[VllmClient], Awaitable[Any]],
        *,
        look_s: float = 1.0,
        retries: Counter[str] | None = None,
    ) -> None:
        """`prove`: raises EngineRefused, or EngineFault; its result is kept as `proof`. `look_s`:
        between two looks at an engine. `retries`: where second tries are counted by reason.
        """
        self.engines = [PooledEngine(client) for client in clients]
        self.retries: Counter[str] = Counter() if retries is None else retries
        self._prove = prove
        self._look_s = look_s
        self._mean_s = 2.0
        self._changed = asyncio.Condition()
        self._watching: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look after them."""
        self._watching = [asyncio.create_task(self._watch(engine)) for engine in self.engines]

    async def close(self) -> None:
        """Look no more, and close all connections."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for engine in self.engines:
            await engine.client.close()

    @property
    def num_alive(self) -> int:
        """Engines that are used."""
        return sum(engine.state == "in" for engine in self.engines)

    @property
    def are_all_refused(self) -> bool:
        """Whether each of them answers, and what is wrong."""
        return all(engine.state == "refused" for engine in self.engines)

    def report(self) -> str:
        """What is wrong with those that are not used."""
        return "; ".join(
            f"{engine.client.url} {engine.why}" for engine in self.engines if engine.state != "in"
        )

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Until something of the pool holds."""
        async with self._changed:
            await self._changed.wait_for(holds)

    @property
    def are_all_seen(self) -> bool:
        """Whether each of them has been looked at."""
        return all(engine.has_been_seen for engine in self.engines)

    async def run(
        self,
        attempt: Callable[[PooledEngine], Coroutine[Any, Any, None]],
        has_begun: Callable[[], bool],
    ) -> None:
        """Have one engine do `attempt`; another one, where it fails before anything has begun.

        Raises ServeError: 429 if all are full, 503 if none is there or the answer broke off, 400
        for a prompt that an engine does not take.
        """
        tried: set[PooledEngine] = set()
        num_failures, is_full = 0, False
        why: Reason | None = None
        while True:
            engine = self._choose(tried)
            if engine is None or num_failures >= _MAX_TRIES:
                raise self._no_engine(is_full)
            tried.add(engine)
            if why is not None:
                self.retries[why] += 1
            began = time.monotonic()
            try:
                await self._attempted(engine, attempt)
                self._mean_s += _NEW_WEIGHT * (time.monotonic() - began - self._mean_s)
                return
            except EngineFault as fault:
                LOG.warning("engine %s: %s: %s", engine.client.url, fault.reason, fault)
                if fault.reason == "rejected":
                    raise ServeError(
                        f"the engine does not take this prompt: {fault}", param="messages"
                    ) from fault
                if fault.reason == "full":
                    is_full = True
                else:
                    await self._put_out(engine, f"failed: {fault}")
                    num_failures += fault.reason != "unreachable"
                if has_begun():
                    raise ServeError(
                        "the engine was lost before the answer was complete; ask again",
                        status=503,
                        code="engine_lost",
                        retry=True,
                    ) from fault
                why = fault.reason

    def _choose(self, tried: set[PooledEngine]) -> PooledEngine | None:
        free = [e for e in self.engines if e.state == "in" and e not in tried]
        return min(free, key=lambda engine: engine.num_asked, default=None)

    def _no_engine(self, is_full: bool) -> ServeError:
        if not is_full:
            return ServeError("no engine can answer now", status=503, code="no_engine", retry=True)
        # one of those that are being answered must end first
        seconds = self._mean_s / max(1, sum(engine.num_asked for engine in self.engines))
        return ServeError(
            "rate limit: all engines are full; try again later",
            status=429,
            code="queue_full",
            retry_after=max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds))),
        )

    async def _attempted(
        self, engine: PooledEngine, attempt: Callable[[PooledEngine], Coroutine[Any, Any, None]]
    ) -> None:
        """One attempt, which ends with an EngineFault when its engine is given up."""
        task = asyncio.create_task(attempt(engine))
        engine.attempts.add(task)
        engine.num_asked += 1
        try:
            await asyncio.wait((task,))
        finally:
            engine.num_asked -= 1
            engine.attempts.discard(task)
            if not task.done():  # whoever asked has left
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise EngineFault("it does not answer any more", "lost")
        task.result()

    async def _watch(self, engine: PooledEngine) -> None:
        while True:
            try:
                await self._look(engine)
            except Exception as error:
                LOG.error("looking at engine %s failed", engine.client.url, exc_info=error)
                await self._put_out(engine, f"cannot be looked at: {type(error).__name__}")
            async with self._changed:
                engine.has_been_seen = True
                self._changed.notify_all()
            await asyncio.sleep(self._look_s)

    async def _look(self, engine: PooledEngine) -> None:
        if not await engine.client.is_healthy():
            engine.num_misses += 1
            await self._put_out(engine, "does not answer /health")
            if engine.num_misses >= _NUM_MISSES:
                for task in engine.attempts:
                    task.cancel()
            return
        engine.num_misses = 0
        if engine.state != "out":
            return
        try:
            engine.proof = await asyncio.wait_for(self._prove(engine.client), _PROOF_S)
        except EngineRefused as error:
            LOG.error("engine %s is refused: %s", engine.client.url, error)
            engine.state, engine.why = "refused", f"is refused: {error}"
        except EngineFault as fault:
            engine.why = f"does not answer the golden request ({fault})"
        except asyncio.TimeoutError:
            engine.why = f"does not answer the golden request within {_PROOF_S:g} s"
        else:
            LOG.info("engine %s is used", engine.client.url)
            engine.state, engine.why = "in", ""

    async def _put_out(self, engine: PooledEngine, why: str) -> None:
        if engine.state == "in":
            LOG.warning("engine %s is put out: it %s", engine.client.url, why)
        async with self._changed:
            engine.state, engine.why = "out", why
            self._changed.notify_all()
