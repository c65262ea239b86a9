"""Pool of media workers: media items of requests -> encoder input, decoded under limits.

    item -> reader threads (data: URLs, bytes) -+-> queue -> decoder threads -> worker processes
         -> download threads (web addresses) ---'

Downloads and results wait for `MediaMemory` before they take memory of the server.

Tenants take turns in the queue. Workers never get a path or a URL, only bytes. An item that kills
its worker fails alone.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from multi_token.errors import MediaError, MultiTokenError
from multi_token.media.errors import missing_file, undecodable
from multi_token.media.fetch import MIB, Fetch
from multi_token.media.safe_http import UrlPolicy
from multi_token.modalities.base import Modality
from multi_token.serve.errors import ServeError
from multi_token.serve.media.limits import MediaLimits, RequestMediaBudget
from multi_token.serve.media.memory import MediaMemory, MemoryLease, Stage
from multi_token.serve.media.protocol import Buffer, frame_parts, serialize_source
from multi_token.serve.media.sandbox import CAN_FORK
from multi_token.serve.media.worker import warm_up
from multi_token.serve.media.worker_process import (
    DecodedItem,
    Unwanted,
    WorkerProcess,
    media_error,
    stopped_error,
)
from multi_token.serve.tenants import TenantQueue
from multi_token.types import Media, Prepared

_JSON_BYTES_PER_NUMBER = 32
"""Upper bound of a number's length in JSON."""
_NUM_READERS = 2
_MAX_DOWNLOADS = 8
"""Concurrent downloads, in threads of their own: a slow host delays no other item."""
_SOURCES = frozenset(("path", "bytes", "array", "image", "audio", "video"))
"""Keys of an object whose values are sources; a string under another key is plain text."""
_MAX_DEPTH = 16
_ADDRESS = re.compile("data:|https?://", re.IGNORECASE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _DecodeJob:
    modality: str
    frame: Sequence[Buffer]
    memory: MemoryLease
    """Takes the bytes of the result."""
    result: Future[DecodedItem]


class MediaPool:
    """Worker processes that load and prepare items, with a memory and a time limit for each item.

    `timeout_s`: time limit of one item in a worker. `memory_bytes`: memory limit of one item,
    without libraries (Linux only). `urls`: hosts that media may be fetched from. `memory`: the
    server's budget; None: one of the default size. `fork`: decode in a fork of each worker; None:
    if the system supports it. A pool can be started once.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        *,
        num_workers: int = 2,
        timeout_s: float = 20.0,
        memory_bytes: int = 2048 * MIB,
        limits: MediaLimits | None = None,
        urls: UrlPolicy | None = None,
        memory: MediaMemory | None = None,
        fork: bool | None = None,
    ) -> None:
        self.limits = limits or MediaLimits()
        self.memory = memory or MediaMemory()
        limits_by_name = self.limits.model_dump()
        self.modalities = {name: m.with_limits(limits_by_name) for name, m in modalities.items()}
        self._fetch = Fetch(
            max_bytes=self.limits.max_bytes, allow_paths=False, url_policy=urls or UrlPolicy()
        )
        # Sent as JSON to each worker when it starts; forks inherit it.
        self._setup = {
            "modalities": {n: m.model_dump(mode="json") for n, m in self.modalities.items()},
            # For classes that a call of this process registered: a worker finds no entry point.
            "classes": [
                (kind, thing.type, f"{type(thing).__module__}:{type(thing).__qualname__}")
                for modality in self.modalities.values()
                for kind, thing in (("modality", modality), ("projector", modality.projector))
            ],
            "path": [os.path.abspath(entry) for entry in sys.path],
            "readable": _readable_folders(self.modalities.values()),
            "timeout_s": timeout_s,
            "memory_bytes": memory_bytes,
            "max_bytes": self.limits.max_bytes,
            "max_request_bytes": 2 * self.limits.max_bytes
            + _JSON_BYTES_PER_NUMBER * self.limits.max_numbers,
            # Two copies of it have to fit the memory: the item, and the batch to encode.
            "max_prepared_bytes": min(
                self.limits.max_prepared_bytes, self.memory.largest(Stage.PREPARED) // 2
            ),
            "fork": CAN_FORK if fork is None else fork,
        }
        self._lock = threading.Lock()
        self._workers = [WorkerProcess(self._setup) for _ in range(num_workers)]
        self._idle_workers: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._waiting: TenantQueue[_DecodeJob] = TenantQueue()
        self._running: set[_DecodeJob] = set()
        # None before the start and after a stop.
        self._readers: ThreadPoolExecutor | None = None
        self._downloads: ThreadPoolExecutor | None = None
        self._decoders: ThreadPoolExecutor | None = None

    @property
    def num_waiting(self) -> int:
        """Items waiting for a worker."""
        return len(self._waiting)

    def start(self) -> None:
        """Start the workers and wait until the first is ready. Raises MultiTokenError."""
        if not CAN_FORK:
            _log.warning("memory of media workers is not limited on %s", sys.platform)
        # The others start in decoder threads once the first is ready: loading libraries in all of
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
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="media-reader")
        self._downloads = ThreadPoolExecutor(_MAX_DOWNLOADS, thread_name_prefix="media-download")
        self._decoders = ThreadPoolExecutor(len(self._workers), thread_name_prefix="media-worker")
        self._idle_workers.put(self._workers[0])
        for worker in self._workers[1:]:
            self._decoders.submit(self._start_worker, worker)

    def stop(self) -> None:
        """End the workers; waiting and running items fail with 503."""
        for worker in self._workers:
            worker.stop()
        # An item that waits for memory would hold its thread up.
        with self._lock:
            running = list(self._running)
        for job in running:
            job.memory.release()
        if self._decoders and self._readers and self._downloads:
            # Waits for all items: each one that is left fails at once, since its worker is stopped.
            self._decoders.shutdown()
            for readers in (self._readers, self._downloads):
                readers.shutdown(wait=False, cancel_futures=True)
            self._decoders = self._readers = self._downloads = None

    async def prepare(
        self,
        item: Media,
        totals: RequestMediaBudget | None = None,
        *,
        tenant: str = "",
        memory: MemoryLease | None = None,
    ) -> Prepared:
        """One item -> encoder input.

        `totals`: budget of its request, sent bytes counted already. `memory`: lease that takes the
        bytes of the result, and that the caller releases, also after an error; None: the result is
        not counted. Raises ServeError: 400 for media that cannot be read or decoded, 413 if the
        request's items exceed their budget, 422 for an item that exceeds time or memory or crashes
        its decoder, 503 if the pool is stopped. Cancelling takes a waiting item out of the queue;
        the result of a running one is dropped.
        """
        decoders, downloads, loop = self._decoders, self._downloads, asyncio.get_running_loop()
        if self._readers is None or downloads is None or decoders is None:
            raise stopped_error()
        if item.modality not in self.modalities:
            raise ServeError(f"this model has no modality named {item.modality!r}", status=400)
        download = self.memory.lease(Stage.DOWNLOAD, tenant)
        result = memory or self.memory.lease(Stage.PREPARED, tenant)
        # The call that downloads the item, then the one that decodes it.
        call: Future[Any] | None = None
        job: _DecodeJob | None = None
        try:
            try:
                frame = await loop.run_in_executor(self._readers, self._build_frame, item)
            except _NeedsDownload:
                await asyncio.wrap_future(download.acquire(self.limits.max_bytes))
                call = downloads.submit(self._build_frame, item, True)
                frame = await asyncio.wrap_future(call)
                download.shrink(sum(map(len, frame)))
            # Bytes that came in the body were counted before; a download is known only now.
            if totals is not None and not isinstance(item.source, bytes):
                totals.add(bytes=sum(map(len, frame)))
            job = _DecodeJob(item.modality, frame, result, Future())
            call = job.result
            del frame
            self._submit(decoders, job, tenant)
            decoded = await asyncio.wrap_future(job.result)
            if totals is not None:
                totals.add(**decoded.sizes)
            return decoded.prepared
        finally:
            if job is not None:
                # The bytes of an item whose client has left must not wait for a worker.
                with self._lock:
                    self._waiting.discard(job)
            if call is None:
                download.release()
            else:
                # A call that runs cannot be cancelled: until it is done, its thread holds the bytes
                # of a client that has left.
                call.cancel()
                call.add_done_callback(lambda _: download.release())
            if memory is None:
                result.release()

    def _submit(self, decoders: ThreadPoolExecutor, job: _DecodeJob, tenant: str) -> None:
        """Queue an item. Raises ServeError (503)."""
        with self._lock:
            try:
                # A call for each item, which takes whichever item is next when a worker is free.
                decoders.submit(self._decode_next)
            except RuntimeError:  # shut down since `prepare` began
                raise stopped_error() from None
            self._waiting.add(job, tenant)

    def _build_frame(self, item: Media, may_download: bool = False) -> list[Buffer]:
        """Resolve the item's URLs to bytes and build its frame.

        Raises ServeError (400), and _NeedsDownload for a web address if `may_download` is False.
        """
        try:
            fetch = self._fetch_address if may_download else self._fetch_data
            source = self._resolve_source(item.source, self.modalities[item.modality], fetch)
            tree, blobs = serialize_source(source, max_numbers=self.limits.max_numbers)
            if sum(map(len, blobs)) > self.limits.max_bytes:
                raise undecodable(
                    f"the item has {sum(map(len, blobs)):,} bytes, and the limit is "
                    f"{self.limits.max_bytes:,}; send a smaller one"
                )
            return frame_parts({"modality": item.modality, "source": tree}, blobs)
        except (MediaError, ValueError, RecursionError) as error:
            raise media_error(item.modality, str(error)) from None

    def _resolve_source(
        self,
        source: Any,
        modality: Modality,
        fetch: Callable[[Any], bytes],
        *,
        depth: int = 0,
        text: bool = False,
    ) -> Any:
        """Replace every URL in a source by the bytes that `fetch` returns for it.

        `text`: strings at this level are plain text, not addresses.
        """
        # Some modalities (documents) take a bare string as text, not as the name of a file.
        if isinstance(source, str) and depth == 0:
            text = modality.named_file(source) is None
        if isinstance(source, (str, os.PathLike)):
            return source if text and isinstance(source, str) else fetch(source)
        if depth > _MAX_DEPTH:
            return source  # `serialize_source` refuses it with an error
        if isinstance(source, Mapping):
            return {
                key: self._resolve_source(
                    value, modality, fetch, depth=depth + 1, text=key not in _SOURCES
                )
                for key, value in source.items()
            }
        if isinstance(source, (list, tuple)) and not all(
            isinstance(value, (int, float)) for value in source
        ):
            return [
                self._resolve_source(value, modality, fetch, depth=depth + 1) for value in source
            ]
        return source

    def _fetch_data(self, address: Any) -> bytes:
        """Return the bytes of a data: URL. Raises _NeedsDownload for a web address."""
        if isinstance(address, str) and address[:4].lower() == "http":
            raise _NeedsDownload
        return self._fetch_address(address)

    def _fetch_address(self, address: Any) -> bytes:
        """Return the bytes of a URL; files of this machine are refused."""
        if not isinstance(address, str) or not _ADDRESS.match(address):
            raise missing_file(
                "expected bytes or a data: URL; the server never reads its own files"
            )
        return self._fetch.read(address)

    def _start_worker(self, worker: WorkerProcess) -> None:
        try:
            worker.try_start()
        # the future of this call is never read, so the fault would be lost
        except Exception:  # noqa: BLE001
            _log.exception("a media worker could not be started")
        finally:
            self._idle_workers.put(worker)

    def _decode_next(self) -> None:
        """Decode one item of the tenant whose turn it is."""
        with self._lock:
            heads = self._waiting.heads()
            if not heads:  # clients have left meanwhile
                return
            job = self._waiting.take(heads[0])
        if not job.result.set_running_or_notify_cancel():
            return
        with self._lock:
            self._running.add(job)
        try:
            job.result.set_result(self._decode(job))
        except ServeError as error:
            job.result.set_exception(error)
        except Unwanted:
            job.result.set_exception(stopped_error())
        finally:
            with self._lock:
                self._running.discard(job)

    def _decode(self, job: _DecodeJob) -> DecodedItem:
        """Decode one item in an idle worker. Raises ServeError, and Unwanted if its client left."""

        def reserve(num_bytes: int) -> None:
            # The result, and its copy in the batch to encode.
            try:
                job.memory.acquire(2 * num_bytes).result()
            except CancelledError:
                raise Unwanted from None

        worker = self._idle_workers.get()
        try:
            return worker.prepare(job.modality, job.frame, reserve)
        except (ServeError, Unwanted):
            raise
        # A decoder that was taken over may send any reply.
        except Exception as error:  # noqa: BLE001
            _log.exception("the reply of a media worker could not be parsed")
            raise media_error(job.modality, type(error).__name__) from None
        finally:
            self._idle_workers.put(worker)


class _NeedsDownload(Exception):
    """The source names a web address."""


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
