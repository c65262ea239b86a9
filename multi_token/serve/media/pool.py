"""Media items of requests -> what their encoders take, decoded by worker processes under limits.

Border: it reads addresses, hands bytes to processes and names their faults. What bytes mean is the
modalities'; one item never takes another down.
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
from multi_token.serve.media import worker as media_worker
from multi_token.serve.media.limits import MediaLimits
from multi_token.serve.media.protocol import encode_frame, serialize_source
from multi_token.serve.media.totals import MediaSize, RequestMediaBudget
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
"""Of the largest size."""
_JSON_BYTES_PER_NUMBER = 32
"""Bytes, at most."""
_MAX_READERS = 8
"""Addresses that are downloaded at once."""
_SOURCES = frozenset(("path", "bytes", "array", "image", "audio", "video"))
"""Keys of an object whose values are sources; a text under another key is a text."""
_MAX_DEPTH = 16
_ADDRESS = re.compile("data:|https?://", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass
class _DecodeJob:
    item: DecodeRequest
    result: Future[DecodeResult] = field(default_factory=Future)


class MediaPool:
    """Worker processes that load and prepare items, each with its own memory and time.

    `timeout_s`: the longest that one item may take in a worker. `memory_bytes`: what it may take
    there beyond what the libraries take (Linux; elsewhere memory is not limited). `urls`: which
    addresses are read. `fork`: whether each worker decodes in a fork of itself, which is replaced
    at once where an item has harmed it; None: where the system can. A pool is started once.
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
            "fork": media_worker.CAN_FORK if fork is None else fork,
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
        """Items that no worker has taken yet."""
        return self._jobs.qsize()

    def start(self) -> None:
        """Start the workers, and wait until the first has loaded its libraries: the others do so
        when it has, so that they take no cores from what else starts. Raises MultiTokenError.
        """
        if not media_worker.CAN_FORK:
            _log.warning("the memory of media workers is not limited on %s", sys.platform)
        self._workers[0].launch()
        for modality in self.modalities.values():
            encoder = getattr(modality, "encoder", None)
            if isinstance(encoder, str) and not os.path.isdir(encoder):
                media_worker.warm_up(
                    modality
                )  # fetches what the hub has of its processor; workers ask nobody
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
        """End the workers; items that wait or are being decoded fail with a 503."""
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
        """One item -> what its encoder takes. `totals`: of the request that it belongs to, which
        knows already how many bytes were sent with it.

        Raises ServeError: 400 for media that cannot be read or decoded, 413 where all items of the
        request are too much, 422 for an item that takes too much time or memory or ends its
        decoder, 429 where too much waits, 503 where the pool is stopped. Cancelled, it gives up its
        place in the queue; what a worker has begun is thrown away.
        """
        if self._reader_pool is None or not self._threads:
            raise stopped_error()
        if item.modality not in self.modalities:
            raise ServeError(f"this model has no sense named {item.modality!r}", status=400)
        loop = asyncio.get_running_loop()
        job = await loop.run_in_executor(self._reader_pool, self._build_job, item)
        if totals is not None and not isinstance(item.source, bytes):  # it was downloaded
            totals.add(MediaSize(bytes=len(job.item.data)))
        self._reserve(job)
        self._jobs.put(job)
        if not self._threads:  # stopped in between: nobody would take it
            job.result.cancel()
            raise stopped_error()
        decoded = await asyncio.wrap_future(job.result)
        if totals is not None:
            totals.add(decoded.size)
        return decoded.prepared

    def _reserve(self, job: _DecodeJob) -> None:
        """What waits is in memory, so there is a limit to it. Raises ServeError (429)."""
        num_bytes = len(job.item.data)
        with self._lock:
            if (
                self._num_queued_bytes
                and self._num_queued_bytes + num_bytes > self._max_queued_bytes
            ):
                raise ServeError(
                    "too much media waits to be decoded", status=429, code="busy", retry_after=1.0
                )
            self._num_queued_bytes += num_bytes

        def release(_: Future[DecodeResult]) -> None:
            with self._lock:
                self._num_queued_bytes -= num_bytes

        job.result.add_done_callback(release)

    def _build_job(self, item: Media) -> _DecodeJob:
        """The item with bytes in place of addresses."""
        try:
            source = self._resolve_source(item.source, self.modalities[item.modality])
            tree, blobs = serialize_source(source, max_numbers=self.limits.max_numbers)
            if sum(map(len, blobs)) > self.limits.max_bytes:
                raise MediaError(
                    f"an item of {sum(map(len, blobs)):,} bytes was sent, and the limit is "
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
        """A source without addresses: what they name is read here, and no file of this machine.

        `text`: whether a text in it is only that, and names nothing.
        """
        if isinstance(source, str) and depth == 0:
            text = modality.named_file(source) is None  # a sense whose strings are texts
        if isinstance(source, (str, os.PathLike)):
            return source if text and isinstance(source, str) else self._fetch_address(source)
        if depth > _MAX_DEPTH:
            return source  # deeper than any source; `serialize_source` refuses it
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
                "expected the bytes, or a data: address; files of this machine are never read",
                kind="missing_file",
            )
        return self._fetch.read(address)

    def _worker_loop(self, worker: WorkerProcess) -> None:
        if not worker.is_ready:
            worker.try_start()
        while (job := self._jobs.get()) is not None:
            if not job.result.set_running_or_notify_cancel():
                continue  # its client has left
            try:
                job.result.set_result(worker.prepare(job.item))
            except ServeError as error:
                job.result.set_exception(error)
            except Exception as error:  # noqa: BLE001 - the thread lives on, the item hears of it
                _log.exception("a media worker's answer could not be read")
                job.result.set_exception(media_error(job.item.modality, type(error).__name__))


def _unregistered_classes(modalities: Any) -> list[tuple[str, str, str]]:
    """Kind, name and place of the classes, for those that are registered in this process alone."""
    found: list[tuple[str, str, str]] = []
    for modality in modalities:
        for kind, thing in (("modality", modality), ("projector", modality.projector)):
            cls = type(thing)
            found.append((kind, thing.type, f"{cls.__module__}:{cls.__qualname__}"))
    return found


def _readable_folders(modalities: Any) -> list[str]:
    """What a worker may open: Python's folders, those of packages here, and those of encoders.

    Not all of `sys.path`: the folder in which the server was started may be on it.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found = [sys.prefix, sys.base_prefix, HF_HUB_CACHE]
    for name in {name.partition(".")[0] for name in sys.modules}:
        module = sys.modules.get(name)
        file = getattr(module, "__file__", None)
        found += [*getattr(module, "__path__", ()), *([file] if file else [])]
    for modality in modalities:
        fields = modality.model_dump(mode="json").values()
        found += [f for f in fields if isinstance(f, str) and f and os.path.isdir(f)]
    return sorted({os.path.abspath(path) for path in found})
