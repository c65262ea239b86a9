"""Router: health checks of the vLLM replicas, and dispatch of each prompt to one of them.

    down --health check and golden request pass--> up --fails--> down
      '--other tokens than the golden ones--> mismatch --health check fails--> down

A prompt goes to the replica that is up and has the fewest prompts in flight. If that replica fails
before the first token, a second one is tried. After the first token the request ends with an error,
since two replicas need not sample alike. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from multi_token.errors import LanguageModelError
from multi_token.serve.admission import ServiceTime
from multi_token.serve.engines.vllm.client import EngineError, FaultReason, VllmClient
from multi_token.serve.errors import ServeError

LOG = logging.getLogger("multi_token.serve")
_MAX_FAILED_CHECKS = 2
"""Failed health checks in a row, after which the prompts in flight are cancelled."""
_MAX_ATTEMPTS = 2
"""Replicas that may fail at one prompt: the prompt itself may be the cause."""
_VERIFY_TIMEOUT_S = 120.0
"""Limit of the golden requests: a server's first prompts compile its kernels."""

ReplicaState = Literal["up", "down", "mismatch"]


class EngineMismatch(LanguageModelError):
    """A vLLM server gives other tokens than the golden ones."""


@dataclass(eq=False)
class Replica:
    """One vLLM server and its state."""

    client: VllmClient
    state: ReplicaState = "down"
    """`mismatch`: healthy, but with other tokens than the golden ones."""
    reason_down: str = "was not checked yet"
    verified: Any = None
    """Result of the verification."""
    num_in_flight: int = 0
    """Prompts sent to the replica and not ended."""
    checked_once: bool = False
    failed_checks: int = 0
    """Failed health checks in a row."""
    attempts: set[asyncio.Task[None]] = field(default_factory=set)


class Router:
    """Checks replicas, and dispatches each prompt to the least loaded one."""

    def __init__(
        self,
        clients: Sequence[VllmClient],
        verify: Callable[[VllmClient], Awaitable[Any]],
        *,
        health_interval_s: float,
        retries: Counter[str],
    ) -> None:
        """Prepare the router; `start` runs its checks.

        `verify` raises EngineMismatch or EngineError; its result becomes `Replica.verified`.
        `retries` counts second attempts by reason.
        """
        self.replicas = [Replica(client) for client in clients]
        self.retries = retries
        self._verify = verify
        self._health_interval_s = health_interval_s
        self._service_time = ServiceTime()
        self._changed = asyncio.Condition()
        self._health_tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._health_tasks = [
            asyncio.create_task(self._health_loop(replica)) for replica in self.replicas
        ]

    async def close(self) -> None:
        """End the health checks, and close all connections."""
        for task in self._health_tasks:
            task.cancel()
        await asyncio.gather(*self._health_tasks, return_exceptions=True)
        for replica in self.replicas:
            await replica.client.close()

    @property
    def num_alive(self) -> int:
        return sum(replica.state == "up" for replica in self.replicas)

    @property
    def all_mismatched(self) -> bool:
        return all(replica.state == "mismatch" for replica in self.replicas)

    @property
    def all_checked(self) -> bool:
        return all(replica.checked_once for replica in self.replicas)

    def report(self) -> str:
        """Return why replicas are not up."""
        return "; ".join(
            f"{replica.client.url} {replica.reason_down}"
            for replica in self.replicas
            if replica.state != "up"
        )

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(condition)

    async def dispatch(
        self,
        attempt: Callable[[Replica], Coroutine[Any, Any, None]],
        has_begun: Callable[[], bool],
    ) -> None:
        """Run `attempt` on one replica, or on a second one if nothing has begun when it fails.

        Raises ServeError: 429 if all replicas are full, 503 if none is up or the stream broke off,
        400 for a prompt that a replica rejects.
        """
        tried: set[Replica] = set()
        num_failures, is_full = 0, False
        reason: FaultReason | None = None
        while True:
            replica = self._least_loaded(tried)
            if replica is None or num_failures >= _MAX_ATTEMPTS:
                raise self._unavailable_error(is_full)
            tried.add(replica)
            if reason is not None:
                self.retries[reason] += 1
            began = time.monotonic()
            try:
                await self._attempt_on(replica, attempt)
                self._service_time.record(time.monotonic() - began)
                return
            except EngineError as error:
                LOG.warning("engine %s: %s: %s", replica.client.url, error.reason, error)
                # Another replica would reject the prompt as well.
                if error.reason == "rejected":
                    raise ServeError(
                        f"the engine does not take this prompt: {error}", param="messages"
                    ) from error
                if error.reason == "full":
                    is_full = True
                else:
                    await self._mark_down(replica, f"failed: {error}")
                    # Without a connection the prompt was never seen, so it cannot be the cause.
                    num_failures += error.reason != "unreachable"
                if has_begun():
                    raise ServeError(
                        "the engine failed before the response was complete; send it again",
                        status=503,
                        code="engine_lost",
                        retry=True,
                    ) from error
                reason = error.reason

    def _least_loaded(self, tried: set[Replica]) -> Replica | None:
        free = [r for r in self.replicas if r.state == "up" and r not in tried]
        return min(free, key=lambda replica: replica.num_in_flight, default=None)

    def _unavailable_error(self, is_full: bool) -> ServeError:
        if not is_full:
            return no_engine_error()
        # Capacity is free as soon as any one of the prompts in flight has ended.
        num_in_flight = sum(replica.num_in_flight for replica in self.replicas)
        return ServeError(
            "rate limit: all engines are full; try again later",
            status=429,
            code="queue_full",
            retry_after=self._service_time.retry_after_s(1 / max(1, num_in_flight)),
        )

    async def _attempt_on(
        self, replica: Replica, attempt: Callable[[Replica], Coroutine[Any, Any, None]]
    ) -> None:
        """Run one attempt; it ends with EngineError when the health check gives the replica up."""
        # A task of its own: a connection to a hung server may stay silent forever, and the health
        # check must be able to cancel the attempt without cancelling the request.
        task = asyncio.create_task(attempt(replica))
        replica.attempts.add(task)
        replica.num_in_flight += 1
        try:
            await asyncio.wait((task,))
        finally:
            replica.num_in_flight -= 1
            replica.attempts.discard(task)
            if not task.done():  # the request itself was cancelled
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise EngineError("it does not answer health checks any more", "lost")
        task.result()

    async def _health_loop(self, replica: Replica) -> None:
        while True:
            try:
                await self._health_check(replica)
            # A defect of ours must not end the checks: the state of the replica would be final.
            except Exception as error:
                LOG.error("the check of engine %s failed", replica.client.url, exc_info=error)
                await self._mark_down(replica, f"cannot be checked: {type(error).__name__}")
            async with self._changed:
                replica.checked_once = True
                self._changed.notify_all()
            await asyncio.sleep(self._health_interval_s)

    async def _health_check(self, replica: Replica) -> None:
        if not await replica.client.is_healthy():
            replica.failed_checks += 1
            await self._mark_down(replica, "does not answer /health")
            # Not at the first: a busy server may miss one check and still complete its prompts.
            if replica.failed_checks >= _MAX_FAILED_CHECKS:
                for task in replica.attempts:
                    task.cancel()
            return
        replica.failed_checks = 0
        # A replica that mismatched is verified again only after it was down: the weights of a
        # server do not change while it runs.
        if replica.state != "down":
            return
        url = replica.client.url
        try:
            replica.verified = await asyncio.wait_for(
                self._verify(replica.client), _VERIFY_TIMEOUT_S
            )
        except EngineMismatch as error:
            LOG.error("engine %s is refused: %s", url, error)
            replica.state, replica.reason_down = "mismatch", f"is refused: {error}"
        except EngineError as error:
            replica.reason_down = f"does not answer the golden request ({error})"
        except asyncio.TimeoutError:
            replica.reason_down = (
                f"does not answer the golden request within {_VERIFY_TIMEOUT_S:g} s"
            )
        else:
            LOG.info("engine %s is up", url)
            replica.state, replica.reason_down = "up", ""

    async def _mark_down(self, replica: Replica, reason: str) -> None:
        if replica.state == "up":
            LOG.warning("engine %s is down: it %s", replica.client.url, reason)
        async with self._changed:
            replica.state, replica.reason_down = "down", reason
            self._changed.notify_all()


def no_engine_error() -> ServeError:
    """Return the error of prompts while no replica is up."""
    return ServeError("no engine is up; try again later", status=503, code="no_engine", retry=True)
