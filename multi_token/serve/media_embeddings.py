"""Media embeddings: encode and project items of many requests, batched, each content once.

embed(item) --cached---> result at once
            --in flight> the same future as the first request for it
            --new------> queue -> one thread takes the queued items of a modality as a batch

A fault of an item fails that item. A device that failed ends the thread, and with it all items;
`watchdog.py` starts another one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from multi_token.errors import MultiTokenError, first_line, machine_fault
from multi_token.media.hashing import digest
from multi_token.modalities.base import MAX_BATCH_FEATURES
from multi_token.serve.errors import ServeError
from multi_token.serve.media.memory import MemoryLease
from multi_token.serve.tenants import TenantQueue
from multi_token.types import Prepared

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


class EmbeddedItem(NamedTuple):
    """Embeddings [num_tokens, dim] of an item, and the key of its content."""

    key: str
    embeds: Tensor


@dataclass(eq=False)
class _EmbedJob:
    modality: str
    prepared: Prepared
    key: str
    result: Future[Tensor]


class MediaEmbedder:
    """Batches items by modality in one thread, and caches their embeddings (LRU by bytes).

    Embeddings are on the language model's device, in its precision. Every method is thread-safe.
    """

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        *,
        cache_bytes: int,
        max_items: int = 16,
    ) -> None:
        """`cache_bytes`: limit of the cached embeddings; 0 disables. `max_items`: largest batch.

        The model's weights must not change, since cache keys do not depend on them.
        """
        self.model = model
        self.cache_bytes = cache_bytes
        self.max_items = max_items
        self.num_queries = 0
        """Number of items requested."""
        self.num_hits = 0
        """Number of these items that were cached or in flight."""
        self.num_bytes = 0
        """Size of the cached embeddings."""
        self.failure: str | None = None
        """Reason for the end of the thread; None while items are accepted."""
        self.num_restarts = 0
        """Restarts since the last item that was embedded."""
        self._progressed_at: float | None = None
        """Last progress of the batch in flight; None between batches."""
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._in_flight: dict[str, Future[Tensor]] = {}
        self._waiting: TenantQueue[_EmbedJob] = TenantQueue()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    @property
    def is_alive(self) -> bool:
        """True unless the thread has died."""
        return self.failure is None

    @property
    def stalled_s(self) -> float:
        """Seconds since the last progress of the batch in flight; 0 between batches."""
        progressed_at = self._progressed_at
        return 0.0 if progressed_at is None else time.monotonic() - progressed_at

    def restart(self) -> None:
        """Accept items again; the next one starts a thread."""
        with self._changed:
            self.num_restarts += 1
            self.failure, self._thread = None, None

    async def embed_item(
        self,
        modality: str,
        prepared: Prepared,
        *,
        tenant: str = "",
        memory: MemoryLease | None = None,
    ) -> EmbeddedItem:
        """Embed one item. Tenants share no cached embeddings. Raises ServeError.

        `memory`: lease of the item's bytes, which is released as soon as they are gone.
        """
        try:
            # In a thread: a digest of a video's frames would hold up the event loop.
            key = await asyncio.to_thread(content_key, modality, prepared, tenant)
            future = self.embed(modality, prepared, key, tenant)
        except BaseException:
            if memory is not None:
                memory.release()
            raise
        # At the end of the item, and not of this coroutine: a client that disconnects leaves its
        # item in the queue.
        if memory is not None:
            future.add_done_callback(lambda _: memory.release())
        del prepared
        return EmbeddedItem(key, await asyncio.wrap_future(future))

    def embed(
        self, modality: str, prepared: Prepared, key: str, tenant: str = ""
    ) -> Future[Tensor]:
        """Item -> future of its embeddings [num_tokens, dim]."""
        result: Future[Tensor] = Future()
        with self._changed:
            self.num_queries += 1
            if key in self._cache:
                self.num_hits += 1
                self._cache.move_to_end(key)
                result.set_result(self._cache[key])
                return result
            if key in self._in_flight:
                self.num_hits += 1
                return self._in_flight[key]
            if self._is_stopping:
                raise ServeError("the server is shutting down", status=503)
            if self.failure is not None:
                raise _failed_error()
            # A running future cannot be cancelled: a client that disconnects must not take the
            # result from other requests that wait for the same item.
            result.set_running_or_notify_cancel()
            self._in_flight[key] = result
            self._waiting.add(_EmbedJob(modality, prepared, key, result), tenant)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="embedder", daemon=True)
                self._thread.start()
            self._changed.notify()
            return result

    def stop(self) -> None:
        """Refuse queued items and end the thread after its current batch."""
        with self._changed:
            self._is_stopping = True
            refused, self._waiting = self._waiting, TenantQueue()
            self._changed.notify()
        for job in refused.in_turn():
            self._resolve(job, ServeError("the server is shutting down", status=503))
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        batch: list[_EmbedJob] = []
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                    if self._is_stopping:
                        return
                    batch = self._next_batch()
                self._embed_jobs(batch)
                self._progressed_at = None
                # The last batch must not stay in memory until the next one comes.
                batch = []
        # Whatever ends the thread, no item may wait for ever.
        except Exception as error:  # noqa: BLE001
            _LOG.error("the embedder's thread ends", exc_info=error)
            with self._changed:
                self.failure = machine_fault(error) or first_line(error)
                queued, self._waiting = self._waiting, TenantQueue()
            for job in (*batch, *queued.in_turn()):
                if not job.result.done():
                    self._resolve(job, _failed_error())
        finally:
            self._progressed_at = None

    def _next_batch(self) -> list[_EmbedJob]:
        """Take items of one modality out of the queue, of all tenants in turn.

        At least one; further ones up to `max_items` and `MAX_BATCH_FEATURES`.
        """
        name = self._waiting.heads()[0].modality
        batch: list[_EmbedJob] = []
        num_features = 0
        for job in self._waiting.in_turn():
            if job.modality != name:
                continue
            num_features += job.prepared.num_features
            if batch and (len(batch) == self.max_items or num_features > MAX_BATCH_FEATURES):
                break
            batch.append(job)
        return [self._waiting.take(job) for job in batch]

    def _embed_jobs(self, jobs: Sequence[_EmbedJob]) -> None:
        """Embed a batch; if it raises, or for items with NaN or inf, each item alone."""
        results: Sequence[Tensor | ServeError]
        self._progressed_at = time.monotonic()
        try:
            results = self._embed_batch(jobs)
        # One item must not fail the others, whatever it makes an encoder raise.
        except Exception as error:
            # It would fail all items after this one too.
            if machine_fault(error) is not None:
                raise
            name = jobs[0].modality
            _LOG.error("%d items of %s failed", len(jobs), name, exc_info=error)
            results = [_public_error(error, name)] * len(jobs)
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, ServeError) and len(jobs) > 1:
                self._embed_jobs([job])
            else:
                self._resolve(job, result)

    @torch.no_grad()
    def _embed_batch(self, jobs: Sequence[_EmbedJob]) -> list[Tensor | ServeError]:
        """Return embeddings [num_tokens, dim] of each item; an error for NaN or inf."""
        name = jobs[0].modality
        modality = self.model.modalities[name]
        lengths = [modality.num_tokens(job.prepared.num_features) for job in jobs]
        inputs = send_to_device(modality.collate([job.prepared for job in jobs]), self.model.device)
        weight: Any = self.model.get_input_embeddings().weight
        with self._marking_progress(name):
            embeds = self.model.projector(name)(self.model.encode(name, inputs))
        embeds = embeds.to(weight.device, weight.dtype)
        if embeds.shape != (sum(lengths), weight.shape[1]):
            raise MultiTokenError(
                f"{len(jobs)} items of {name!r} gave embeddings of shape {tuple(embeds.shape)}, "
                f"expected {(sum(lengths), weight.shape[1])}"
            )
        # One transfer for the batch: each read of a value waits for the device.
        finite = embeds.isfinite().all(-1).cpu()
        error = ServeError(
            f"an item of {name!r} gives media embeddings with NaN or inf; send another item",
            param="messages",
        )
        return [
            # A clone: a view would keep the complete batch in memory.
            own.clone() if bool(good.all()) else error
            for own, good in zip(embeds.split(lengths), finite.split(lengths), strict=True)
        ]

    @contextmanager
    def _marking_progress(self, name: str) -> Iterator[None]:
        """Within, each part of the encoder and projector that ends is progress of the batch."""

        # A large batch on a slow device takes longer than a step may; one part that never ends is
        # what the watchdog looks for.
        def mark(*_: object) -> None:
            self._progressed_at = time.monotonic()

        parts = (*self.model.encoder(name).modules(), *self.model.projector(name).modules())
        hooks = [part.register_forward_hook(mark) for part in parts]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _resolve(self, job: _EmbedJob, result: Tensor | ServeError) -> None:
        with self._changed:
            del self._in_flight[job.key]
            if isinstance(result, Tensor):
                self.num_restarts = 0
            if isinstance(result, Tensor) and result.nbytes <= self.cache_bytes:
                self._cache[job.key] = result
                self.num_bytes += result.nbytes
                while self.num_bytes > self.cache_bytes:
                    _, oldest = self._cache.popitem(last=False)
                    self.num_bytes -= oldest.nbytes
        # Before its memory is released.
        del job.prepared
        # Outside of the lock: callbacks of the future run here.
        if isinstance(result, Tensor):
            job.result.set_result(result)
        else:
            job.result.set_exception(result)


def content_key(modality: str, prepared: Prepared, tenant: str) -> str:
    """Return 32 hexadecimal digits: a digest of the encoder's inputs, the modality and the tenant.

    Names, dtypes, shapes and all bytes of the inputs enter the digest.
    """
    # The modality's name means its encoder and projector: both are fixed for the life of the cache.
    # No name from a client enters, so a client cannot choose a key.
    parts: list[bytes | memoryview] = [
        modality.encode(),
        tenant.encode(),
        str(prepared.num_features).encode(),
    ]
    for name, tensor in sorted(prepared.inputs.items()):
        values = tensor.detach().cpu().contiguous()
        parts.append(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        parts.append(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest(*parts)


def _failed_error() -> ServeError:
    return ServeError("the media encoder has failed", status=503, code="encoder_failed", retry=True)


def _public_error(error: Exception, modality: str) -> ServeError:
    """Return the error for clients: our own errors with their text, others without."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, MultiTokenError):
        return ServeError(f"an item of {modality!r}: {error}", param="messages")
    return ServeError(f"an item of {modality!r} cannot be encoded", status=500, retry=False)
