"""Watchdog: restarts the engine or the embedder of media that died, and gives up one that hangs.

dies     an exception ends its thread, which fails its requests; a new thread is started, at
         most three times without a success between them
hangs    no progress within the step timeout: not healthy; within three of them: given up,
         since a thread in a kernel cannot be ended
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from multi_token.errors import LanguageModelError
from multi_token.serve.engines.engine import Engine
from multi_token.serve.media_embeddings import MediaEmbedder
from multi_token.serve.metrics import Metrics

_LOG = logging.getLogger("multi_token.serve")
_INTERVAL_S = 0.5
MAX_RESTARTS = 3
"""Restarts without a complete response, or an embedded item, after which one stays dead."""
_MAX_STEP_TIMEOUTS = 3
"""Step timeouts without progress after which the process is given up."""


class Watchdog:
    """State of the two threads that compute, and their restarts.

    Attributes:
        error: Set once the process is given up; the server then exits.
        num_restarts: Restarts of the engine since the last complete response.
    """

    def __init__(
        self,
        engine: Engine,
        embedder: MediaEmbedder,
        metrics: Metrics,
        *,
        step_timeout_s: float,
        on_give_up: Callable[[], object],
    ) -> None:
        """`step_timeout_s`: time of a step after which it counts as stalled."""
        self.error: LanguageModelError | None = None
        self.num_restarts = 0
        self._engine = engine
        self._embedder = embedder
        self._metrics = metrics
        self._step_timeout_s = step_timeout_s
        self._on_give_up = on_give_up

    @property
    def is_healthy(self) -> bool:
        return self._engine.is_alive and self._embedder.is_alive and not self.is_stalled

    @property
    def is_stalled(self) -> bool:
        """True if a step takes too long: a kernel that never ends, say."""
        return self._longest_step()[0] > self._step_timeout_s

    def _longest_step(self) -> tuple[float, str]:
        engine, embedder = self._engine.stalled_s, self._embedder.stalled_s
        return (engine, "the engine") if engine >= embedder else (embedder, "the media encoder")

    async def watch(self) -> None:
        """Watch until the process is given up."""
        longest_s = _MAX_STEP_TIMEOUTS * self._step_timeout_s
        reason = "it died after each restart"
        was_stalled = False
        while True:
            await asyncio.sleep(_INTERVAL_S)
            stalled_s, part = self._longest_step()
            if self.is_stalled and not was_stalled:
                _LOG.error("%s makes no progress", part)
            was_stalled = self.is_stalled
            if stalled_s > longest_s:
                self._give_up(f"{part} has made no progress for {longest_s:g} s")
                return
            if not self._embedder.is_alive and not self._restart_embedder():
                return
            if self._engine.is_alive:
                continue
            # A process whose device context is lost cannot recover: it has to be replaced. A
            # gateway waits instead, since its engines come back without it.
            if self.num_restarts == MAX_RESTARTS and not self._engine.is_remote:
                self._give_up(
                    f"the engine was restarted {MAX_RESTARTS} times without a complete response "
                    f"({reason})"
                )
                return
            _LOG.error("the engine %s died; restarting it", self._engine.name)
            self.num_restarts += 1
            self._metrics.engine_restarts.inc()
            starting = asyncio.to_thread(self._engine.start)
            try:
                # A restart may hang as well; a gateway's waits for its engines.
                await asyncio.wait_for(starting, None if self._engine.is_remote else longest_s)
            # Any error of a restart is logged and tried again; /health reports 503 meanwhile.
            except Exception as error:  # noqa: BLE001
                reason = str(error)
                _LOG.error("the engine did not restart", exc_info=error)

    def _restart_embedder(self) -> bool:
        """Return False if the process is given up instead."""
        if self._embedder.num_restarts == MAX_RESTARTS:
            self._give_up(
                f"the media encoder was restarted {MAX_RESTARTS} times and encoded no item "
                f"({self._embedder.failure})"
            )
            return False
        _LOG.error("the media encoder died; restarting it")
        self._embedder.restart()
        return True

    def _give_up(self, reason: str) -> None:
        """Let the server exit."""
        self.error = LanguageModelError(f"{reason}, so this server ends; start it again")
        _LOG.error("%s", self.error)
        self._on_give_up()
