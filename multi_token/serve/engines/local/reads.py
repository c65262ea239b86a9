"""Prompts that are read in a thread of their own, while those before them are answered.

Border: the thread. Who is read is static.py's to say, and stepping.py reads.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from multi_token.serve.engines.local.decode_loop import DecodeBatch
from multi_token.serve.engines.scheduler import GenerationRequest


class Reads:
    """One reading at a time. Of the engine's thread alone."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="static engine reads")
        self._rows: list[GenerationRequest] = []
        self._others: Future[DecodeBatch] | None = None

    def __enter__(self) -> Reads:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown()

    @property
    def is_busy(self) -> bool:
        """Whether prompts are being read, or have been and nobody has asked for them yet."""
        return self._others is not None

    def begin(self, stepping: DecodeBatch, rows: list[GenerationRequest]) -> None:
        """Read prompts that are to be answered beside the rows of `stepping`."""
        self._rows = rows
        self._others = self._pool.submit(stepping.prefill, rows, is_beside=True)

    def is_ready(self, *, wait: bool) -> bool:
        """Whether `end` would not have to wait. `wait`: for what is being read."""
        if self._others is None:
            return False
        if wait:
            self._others.exception()
        return self._others.done()

    def end(self) -> tuple[list[GenerationRequest], Future[DecodeBatch]]:
        """Who was read, and what came of it."""
        rows, others = self._rows, self._others
        assert others is not None
        self._rows, self._others = [], None
        return rows, others
