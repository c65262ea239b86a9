"""Pool of media workers: media items of requests -> encoder input, decoded under limits.

    item -> reader threads (download, data: URLs) -> queue -> one thread per worker process

Workers never get a path or a URL, only bytes. An item that kills its worker fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.fetch import Fetch
from multi_token.media.safe_http import UrlPolicy
from multi_token.modalities.base import Modality
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits, MediaSize, RequestMediaBudget
from multi_token.serve.media.protocol import encode_frame, serialize_source
from multi_token.serve.media.sandbox import CAN_FORK
from multi_token.serve.media.worker import warm_up
from multi_token.serve.media.worker_process import (
    DecodeRequest,
    DecodeResult,
    WorkerProcess,
    media_error,
    stopped_error,
)
from multi_token.types import Media, Prepared

GIB = 1024**3
_MAX_WAITING_PER_WORKER = 16
"""Items of the largest size that may wait for each worker."""
_JSON_BYTES_PER_NUMBER = 32
"""Upper bound of a number's length in JSON."""
_MAX_READERS = 8
"""Concurrent downloads."""
_SOURCES = frozenset(("path", "bytes", "array", "image", "audio", "video"))
"""Keys of an object whose values are sources; a string under another key is plain text."""
_MAX_DEPTH = 16
_ADDRESS = re.compile("data:|https?://", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass
class _DecodeJob:
    item: DecodeRequest
    result: Future[DecodeResult] = field(default_factory=Future)


class MediaPool:
    """Worker processes that load and prepare items, each with its own memory and time limit.

    `timeout_s`: time limit of one item in a worker. `memory_bytes`: memory limit of one item,
    libraries not counted (Linux; not enforced elsewhere). `urls`: hosts that may be fetched from.
    `fork`: decode in a fork of each worker; None: where the system supports it. Starts once.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        num_workers: int = 2,
        timeout_s: float = 20.0,
        memory_bytes: int = 2 * GIB,
        limits: MediaLimits | None = None,
        urls: UrlPolicy | None = None,
        fork: bool | None = None,
    ) -> None:
        self.limits = limits or MediaLimits()
        limits_by_name = self.limits.model_dump()
        self.modalities = {name: m.with_limits(limits_by_name) for name, m in modalities.items()}
        self.timeout_s = timeout_s
        self._fetch = Fetch(
            max_bytes=self.limits.max_bytes, allow_paths=False, url_policy=urls or UrlPolicy()
        )
        self._setup = {
            "modalities": {n: m.model_dump(mode="json") for n, m in self.modalities.items()},
            "classes": _unregistered_classes(self.modalities.values()),
            "path": [os.path.abspath(entry) for entry in sys.path],
            "readable": _readable_folders(self.modalities.values()),
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "max_bytes": self.limits.max_bytes,
            "max_request_bytes": 2 * self.limits.max_bytes
            + _JSON_BYTES_PER_NUMBER * self.limits.max_numbers,
            "max_prepared_bytes": self.limits.max_prepared_bytes,
            "fork": CAN_FORK if fork is None else fork,
        }
        self._lock = threading.Lock()
        self._num_queued_bytes = 0
        self._max_queued_bytes = _MAX_WAITING_PER_WORKER * self.limits.max_bytes
        self._jobs: queue.Queue[_DecodeJob | None] = queue.Queue()
        self._workers = [WorkerProcess(self._setup) for _ in range(num_workers)]
        self._threads: list[threading.Thread] = []
        self._reader_pool: ThreadPoolExecutor | None = None

    @property
    def num_waiting(self) -> int:
        """Items waiting for a worker."""
        return self._jobs.qsize()

    def start(self) -> None:
        """Start the workers and wait until the first is ready. Raises MultiTokenError."""
        if not CAN_FORK:
            _log.warning("memory of media workers is not limited on %s", sys.platform)
        # The others start in their threads once the first is ready: loading libraries in all of
        # them at once would take the cores from the engine, which starts at the same time.
        self._workers[0].launch()
        for modality in self.modalities.values():
            encoder = getattr(modality, "encoder", None)
            if isinstance(encoder, str) and not os.path.isdir(encoder):
                # Downloads the processor of a hub name here: workers run offline.
                warm_up(modality)
        try:
            self._workers[0].wait_ready()
        except MultiTokenError:
            self.stop()
            raise
        self._reader_pool = ThreadPoolExecutor(_MAX_READERS, thread_name_prefix="media-reader")
        self._threads = [
            threading.Thread(
                target=self._worker_loop, args=(worker,), name="media-worker", daemon=True
            )
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the workers; waiting and running items fail with 503."""
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._workers:
            worker.stop()
        for thread in self._threads:
            thread.join()
        self._threads = []
        with suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None and job.result.set_running_or_notify_cancel():
                    job.result.set_exception(stopped_error())
        if self._reader_pool is not None:
            self._reader_pool.shutdown(wait=False, cancel_futures=True)
            self._reader_pool = None

    async def prepare(self, item: Media, totals: RequestMediaBudget | None = None) -> Prepared:
        """One item -> encoder input. `totals`: budget of its request, sent bytes counted already.

        Raises ServeError: 400 for media that cannot be read or decoded, 413 if the request's items
        exceed their budget, 422 for an item that exceeds time or memory or crashes its decoder, 429
        if the queue is full, 503 if the pool is stopped. Cancelling takes a waiting item out of the
        queue; the result of a running one is dropped.
        """
        if self._reader_pool is None or not self._threads:
            raise stopped_error()
        if item.modality not in self.modalities:
            raise ServeError(f"this model has no modality named {item.modality!r}", status=400)
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(self._reader_pool, self._build_job, item)
        # Bytes that came in the body were counted before; a download is known only now.
        if totals is not None and not isinstance(item.source, bytes):
            totals.add(MediaSize(bytes=len(job.item.data)))
        self._reserve(job)
        self._jobs.put(job)
        # stop() empties the queue once: a job put after it would wait for ever.
        if not self._threads:
            job.result.cancel()
            raise stopped_error()
        decoded = await asyncio.wrap_future(job.result)
        if totals is not None:
            totals.add(decoded.size)
        return decoded.prepared

    def _reserve(self, job: _DecodeJob) -> None:
        """Count the job's bytes until it ends. Raises ServeError (429) when too many wait."""
        num_bytes = len(job.item.data)
        with self._lock:
            # An empty queue takes any item: one item may be larger than the queue's share.
            if (
                self._num_queued_bytes
                and self._num_queued_bytes + num_bytes > self._max_queued_bytes
            ):
                raise ServeError(
                    "too many media items wait for decoding; try again later",
                    status=429,
                    code="busy",
                    retry_after=1.0,
                )
            self._num_queued_bytes += num_bytes

        def release(_: Future[DecodeResult]) -> None:
            with self._lock:
                self._num_queued_bytes -= num_bytes

        job.result.add_done_callback(release)

    def _build_job(self, item: Media) -> _DecodeJob:
        """Resolve the item's URLs to bytes and build its frame. Raises ServeError (400)."""
        try:
            source = self._resolve_source(item.source, self.modalities[item.modality])
            tree, blobs = serialize_source(source, max_numbers=self.limits.max_numbers)
            if sum(map(len, blobs)) > self.limits.max_bytes:
                raise MediaError(
                    f"the item has {sum(map(len, blobs)):,} bytes, and the limit is "
                    f"{self.limits.max_bytes:,}; send a smaller one",
                    kind="undecodable",
                )
            data = encode_frame({"modality": item.modality, "source": tree}, blobs)
            return _DecodeJob(DecodeRequest(item.modality, data))
        except (MediaError, ValueError, RecursionError) as error:
            raise media_error(item.modality, str(error)) from None

    def _resolve_source(
        self, source: Any, modality: Modality, *, depth: int = 0, text: bool = False
    ) -> Any:
        """Replace every URL in a source by its bytes; files of this machine are refused.

        `text`: strings at this level are plain text, not addresses.
        """
        # Some modalities (documents) take a bare string as text, not as the name of a file.
        if isinstance(source, str) and depth == 0:
            text = modality.named_file(source) is None
        if isinstance(source, (str, os.PathLike)):
            return source if text and isinstance(source, str) else self._fetch_address(source)
        if depth > _MAX_DEPTH:
            return source  # `serialize_source` refuses it with an error
        if isinstance(source, Mapping):
            return {
                key: self._resolve_source(
                    value, modality, depth=depth + 1, text=key not in _SOURCES
                )
                for key, value in source.items()
            }
        if isinstance(source, (list, tuple)) and not all(
            isinstance(value, (int, float)) for value in source
        ):
            return [self._resolve_source(value, modality, depth=depth + 1) for value in source]
        return source

    def _fetch_address(self, address: Any) -> bytes:
        if not isinstance(address, str) or not _ADDRESS.match(address):
            raise MediaError(
                "expected bytes or a data: URL; the server never reads its own files",
                kind="missing_file",
            )
        return self._fetch.read(address)

    def _worker_loop(self, worker: WorkerProcess) -> None:
        if not worker.is_ready:
            worker.try_start()
        while (job := self._jobs.get()) is not None:
            if not job.result.set_running_or_notify_cancel():
                continue  # cancelled: the client has disconnected
            try:
                job.result.set_result(worker.prepare(job.item))
            except ServeError as error:
                job.result.set_exception(error)
            # An error here must not end the thread: its worker would never be used again.
            except Exception as error:  # noqa: BLE001
                _log.exception("the reply of a media worker could not be parsed")
                job.result.set_exception(media_error(job.item.modality, type(error).__name__))


def _unregistered_classes(modalities: Any) -> list[tuple[str, str, str]]:
    """(kind, name, module:class) of each class, for those registered by a call in this process."""
    found: list[tuple[str, str, str]] = []
    for modality in modalities:
        for kind, thing in (("modality", modality), ("projector", modality.projector)):
            cls = type(thing)
            found.append((kind, thing.type, f"{cls.__module__}:{cls.__qualname__}"))
    return found


def _readable_folders(modalities: Any) -> list[str]:
    """Folders a worker may read: Python, imported packages, the hub's cache, local encoders."""
    from huggingface_hub.constants import HF_HUB_CACHE

    # Not sys.path: it may contain the folder in which the server was started, with a user's files.
    found = [sys.prefix, sys.base_prefix, HF_HUB_CACHE]
    for name in {name.partition(".")[0] for name in sys.modules}:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        found += [*getattr(module, "__path__", ()), *([file] if file else [])]
    for modality in modalities:
        fields = modality.model_dump(mode="json").values()
        found += [f for f in fields if isinstance(f, str) and f and os.path.isdir(f)]
    return sorted({os.path.abspath(path) for path in found})
