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
from multi_token.serve.engines.vllm.client import EngineError, FaultReason, VllmClient
from multi_token.serve.errors import ServeError

LOG = logging.getLogger("multi_token.serve")
_MAX_FAILED_CHECKS = 2
"""Looks in a row without an answer after which what an engine was asked is given up."""
_MAX_ATTEMPTS = 2
"""Engines that may fail at one prompt: it could be the prompt that kills them."""
_VERIFY_TIMEOUT_S = 120.0
"""The longest that an engine may take for the proof; the first prompts may be slow."""
_MAX_RETRY_AFTER_S = 60
_EMA_WEIGHT = 0.2

ReplicaState = Literal["out", "in", "refused"]


class EngineMismatch(LanguageModelError):
    """An engine that answers, but not as it should."""


@dataclass(eq=False)
class Replica:
    """One engine, and what is known of it."""

    client: VllmClient
    state: ReplicaState = "out"
    """`out`: does not answer, or has not been asked yet; `refused`: answers what is wrong."""
    reason_down: str = "was not asked yet"
    verified: Any = None
    """What the proof found out about it."""
    num_in_flight: int = 0
    """Prompts that it is at."""
    checked_once: bool = False
    """Whether it has been looked at once."""
    failed_checks: int = 0
    attempts: set[asyncio.Task[None]] = field(default_factory=set)


class Router:
    """Looks after engines, and hands each prompt to the one with the fewest.

    An engine is used once `prove` has found nothing wrong with it, until it fails; then it is
    proved again. One that is found wrong is left alone until it has died and come back.
    """

    def __init__(
        self,
        clients: Sequence[VllmClient],
        verify: Callable[[VllmClient], Awaitable[Any]],
        *,
        health_interval_s: float = 1.0,
        retries: Counter[str] | None = None,
    ) -> None:
        """`prove`: raises EngineRefused, or EngineFault; its result is kept as `proof`. `look_s`:
        between two looks at an engine. `retries`: where second tries are counted by reason.
        """
        self.replicas = [Replica(client) for client in clients]
        self.retries: Counter[str] = Counter() if retries is None else retries
        self._verify = verify
        self._health_interval_s = health_interval_s
        self._mean_service_s = 2.0
        self._changed = asyncio.Condition()
        self._health_tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to look after them."""
        self._health_tasks = [
            asyncio.create_task(self._health_loop(engine)) for engine in self.replicas
        ]

    async def close(self) -> None:
        """Look no more, and close all connections."""
        for task in self._health_tasks:
            task.cancel()
        await asyncio.gather(*self._health_tasks, return_exceptions=True)
        for engine in self.replicas:
            await engine.client.close()

    @property
    def num_alive(self) -> int:
        """Engines that are used."""
        return sum(engine.state == "in" for engine in self.replicas)

    @property
    def all_mismatched(self) -> bool:
        """Whether each of them answers, and what is wrong."""
        return all(engine.state == "refused" for engine in self.replicas)

    def report(self) -> str:
        """What is wrong with those that are not used."""
        return "; ".join(
            f"{engine.client.url} {engine.reason_down}"
            for engine in self.replicas
            if engine.state != "in"
        )

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until something of the pool holds."""
        async with self._changed:
            await self._changed.wait_for(condition)

    @property
    def all_checked(self) -> bool:
        """Whether each of them has been looked at."""
        return all(engine.checked_once for engine in self.replicas)

    async def dispatch(
        self,
        attempt: Callable[[Replica], Coroutine[Any, Any, None]],
        has_begun: Callable[[], bool],
    ) -> None:
        """Have one engine do `attempt`; another one, where it fails before anything has begun.

        Raises ServeError: 429 if all are full, 503 if none is there or the answer broke off, 400
        for a prompt that an engine does not take.
        """
        tried: set[Replica] = set()
        num_failures, is_full = 0, False
        why: FaultReason | None = None
        while True:
            engine = self._least_loaded(tried)
            if engine is None or num_failures >= _MAX_ATTEMPTS:
                raise self._unavailable_error(is_full)
            tried.add(engine)
            if why is not None:
                self.retries[why] += 1
            began = time.monotonic()
            try:
                await self._attempt_on(engine, attempt)
                self._mean_service_s += _EMA_WEIGHT * (
                    time.monotonic() - began - self._mean_service_s
                )
                return
            except EngineError as fault:
                LOG.warning("engine %s: %s: %s", engine.client.url, fault.reason, fault)
                if fault.reason == "rejected":
                    raise ServeError(
                        f"the engine does not take this prompt: {fault}", param="messages"
                    ) from fault
                if fault.reason == "full":
                    is_full = True
                else:
                    await self._mark_down(engine, f"failed: {fault}")
                    num_failures += fault.reason != "unreachable"
                if has_begun():
                    raise ServeError(
                        "the engine was lost before the answer was complete; ask again",
                        status=503,
                        code="engine_lost",
                        retry=True,
                    ) from fault
                why = fault.reason

    def _least_loaded(self, tried: set[Replica]) -> Replica | None:
        free = [e for e in self.replicas if e.state == "in" and e not in tried]
        return min(free, key=lambda engine: engine.num_in_flight, default=None)

    def _unavailable_error(self, is_full: bool) -> ServeError:
        if not is_full:
            return ServeError("no engine can answer now", status=503, code="no_engine", retry=True)
        # one of those that are being answered must end first
        seconds = self._mean_service_s / max(
            1, sum(engine.num_in_flight for engine in self.replicas)
        )
        return ServeError(
            "rate limit: all engines are full; try again later",
            status=429,
            code="queue_full",
            retry_after=max(1, min(_MAX_RETRY_AFTER_S, math.ceil(seconds))),
        )

    async def _attempt_on(
        self, engine: Replica, attempt: Callable[[Replica], Coroutine[Any, Any, None]]
    ) -> None:
        """One attempt, which ends with an EngineFault when its engine is given up."""
        task = asyncio.create_task(attempt(engine))
        engine.attempts.add(task)
        engine.num_in_flight += 1
        try:
            await asyncio.wait((task,))
        finally:
            engine.num_in_flight -= 1
            engine.attempts.discard(task)
            if not task.done():  # whoever asked has left
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise EngineError("it does not answer any more", "lost")
        task.result()

    async def _health_loop(self, engine: Replica) -> None:
        while True:
            try:
                await self._health_check(engine)
            except Exception as error:
                LOG.error("looking at engine %s failed", engine.client.url, exc_info=error)
                await self._mark_down(engine, f"cannot be looked at: {type(error).__name__}")
            async with self._changed:
                engine.checked_once = True
                self._changed.notify_all()
            await asyncio.sleep(self._health_interval_s)

    async def _health_check(self, engine: Replica) -> None:
        if not await engine.client.is_healthy():
            engine.failed_checks += 1
            await self._mark_down(engine, "does not answer /health")
            if engine.failed_checks >= _MAX_FAILED_CHECKS:
                for task in engine.attempts:
                    task.cancel()
            return
        engine.failed_checks = 0
        if engine.state != "out":
            return
        try:
            engine.verified = await asyncio.wait_for(self._verify(engine.client), _VERIFY_TIMEOUT_S)
        except EngineMismatch as error:
            LOG.error("engine %s is refused: %s", engine.client.url, error)
            engine.state, engine.reason_down = "refused", f"is refused: {error}"
        except EngineError as fault:
            engine.reason_down = f"does not answer the golden request ({fault})"
        except asyncio.TimeoutError:
            engine.reason_down = (
                f"does not answer the golden request within {_VERIFY_TIMEOUT_S:g} s"
            )
        else:
            LOG.info("engine %s is used", engine.client.url)
            engine.state, engine.reason_down = "in", ""

    async def _mark_down(self, engine: Replica, why: str) -> None:
        if engine.state == "in":
            LOG.warning("engine %s is put out: it %s", engine.client.url, why)
        async with self._changed:
            engine.state, engine.reason_down = "out", why
            self._changed.notify_all()
