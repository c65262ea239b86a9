"""Media embeddings: encode and project items of many requests, batched, each content once.

    embed(item) --cached---> result at once
                --in flight> the same future as the first request for it
                --new------> queue -> one thread takes all items of a modality as a batch

Nothing is decoded here, and spans in the prompt are fixed already.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from multi_token.errors import MultiTokenError
from multi_token.media.hashing import digest
from multi_token.serve.engines.base import Prompt
from multi_token.serve.errors import ServeError
from multi_token.types import Prepared, Sample

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
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
        """Start without a thread; the first item starts it.

        Args:
            model: its weights must not change, since the cache does not know them.
            cache_bytes: limit of the cached embeddings; 0 disables the cache.
            max_items: largest batch.
        """
        self.model = model
        self.cache_bytes = cache_bytes
        self.max_items = max_items
        self.num_queries = 0
        """Items requested."""
        self.num_hits = 0
        """Items of these that were cached or in flight."""
        self.num_bytes = 0
        """Size of the cached embeddings."""
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._in_flight: dict[str, Future[Tensor]] = {}
        self._waiting: deque[_EmbedJob] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_stopping = False

    async def build_prompt(self, sample: Sample, *, tenant: str = "") -> Prompt:
        """Sample with prepared media -> prompt with their embeddings.

        Tenants share no cached embeddings. Raises ServeError for an item that cannot be embedded.
        """
        keys = await asyncio.to_thread(self.content_keys, sample, tenant) if sample.media else ()
        asked = [
            asyncio.wrap_future(self.embed(place.modality, item, key))
            for place, item, key in zip(sample.media_spans, sample.media, keys, strict=True)
        ]
        tokens = await asyncio.gather(*asked)
        places = tuple(sample.media_spans)
        return Prompt(sample.input_ids, places, tuple(tokens), tuple(keys), tenant)

    def content_keys(self, sample: Sample, tenant: str = "") -> tuple[str, ...]:
        """Return the `content_key` of each item."""
        return tuple(
            content_key(place.modality, item, tenant)
            for place, item in zip(sample.media_spans, sample.media, strict=True)
        )

    def embed(self, modality: str, prepared: Prepared, key: str) -> Future[Tensor]:
        """Item -> future of its embeddings [num_tokens, dim]."""
        with self._changed:
            self.num_queries += 1
            kept = self._cache.get(key)
            if kept is not None:
                self._cache.move_to_end(key)
                self.num_hits += 1
                here: Future[Tensor] = Future()
                here.set_result(kept)
                return here
            on_its_way = self._in_flight.get(key)
            if on_its_way is not None:
                self.num_hits += 1
                return on_its_way
            if self._is_stopping:
                raise ServeError("the server is shutting down", status=503)
            result: Future[Tensor] = Future()
            # a running future cannot be cancelled: a client that leaves must not take the result
            # from other requests that wait for the same item
            result.set_running_or_notify_cancel()
            self._in_flight[key] = result
            self._waiting.append(_EmbedJob(modality, prepared, key, result))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="projection", daemon=True)
                self._thread.start()
            self._changed.notify()
            return result

    def stop(self) -> None:
        """Refuse queued items and end the thread after its current batch."""
        with self._changed:
            self._is_stopping = True
            refused = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in refused:
            self._resolve(job, ServeError("the server is shutting down", status=503))
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_stopping)
                if self._is_stopping:
                    return
                name = self._waiting[0].modality
                batch = [job for job in self._waiting if job.modality == name][: self.max_items]
                taken = {job.key for job in batch}
                self._waiting = deque(job for job in self._waiting if job.key not in taken)
            try:
                self._embed_jobs(batch)
            # whatever it is, every waiting request must receive its end
            except Exception as error:  # noqa: BLE001
                _LOG.error("%d items of %s failed", len(batch), name, exc_info=error)
                for job in batch:
                    if not job.result.done():
                        self._resolve(job, _public_error(error, name))

    def _embed_jobs(self, jobs: Sequence[_EmbedJob]) -> None:
        """Embed a batch; if it raises, or for items with NaN or inf, each item alone."""
        again: list[_EmbedJob] = []
        try:
            for job, rows in zip(jobs, self._embed_batch(jobs), strict=True):
                if rows is None:
                    again.append(job)
                else:
                    self._resolve(job, rows)
        # one item must not fail the others, whatever it makes an encoder raise
        except Exception as error:  # noqa: BLE001
            again = [job for job in jobs if not job.result.done()]
            if len(jobs) == 1:
                _LOG.error("an item of %s failed", jobs[0].modality, exc_info=error)
                self._resolve(jobs[0], _public_error(error, jobs[0].modality))
                return
        if len(jobs) == 1 and again:
            self._resolve(
                jobs[0],
                ServeError(
                    f"an item of {jobs[0].modality!r} gives media embeddings with NaN or inf; send "
                    "another item",
                    param="messages",
                ),
            )
            return
        for job in again:
            self._embed_jobs([job])

    @torch.no_grad()
    def _embed_batch(self, jobs: Sequence[_EmbedJob]) -> list[Tensor | None]:
        """Return embeddings [num_tokens, dim] of each item; None where they contain NaN or inf."""
        name = jobs[0].modality
        modality = self.model.modalities[name]
        lengths = [modality.num_tokens(job.prepared.num_features) for job in jobs]
        inputs = send_to_device(modality.collate([job.prepared for job in jobs]), self.model.device)
        weight: Any = self.model.get_input_embeddings().weight
        tokens = self.model.projector(name)(self.model.encode(name, inputs))
        tokens = tokens.to(weight.device, weight.dtype)
        if tokens.shape != (sum(lengths), weight.shape[1]):
            raise MultiTokenError(
                f"{len(jobs)} items of {name!r} gave embeddings of shape {tuple(tokens.shape)}, "
                f"expected {(sum(lengths), weight.shape[1])}"
            )
        # one transfer for the batch: each read of a value waits for the device
        finite = tokens.isfinite().all(-1).cpu()
        return [
            # a clone: a view would keep the complete batch in memory
            rows.clone() if bool(good.all()) else None
            for rows, good in zip(tokens.split(lengths), finite.split(lengths), strict=True)
        ]

    def _resolve(self, job: _EmbedJob, result: Tensor | ServeError) -> None:
        with self._changed:
            self._in_flight.pop(job.key, None)
            if isinstance(result, Tensor):
                self._store(job.key, result)
        if isinstance(result, Tensor):
            job.result.set_result(result)
        else:
            job.result.set_exception(result)

    def _store(self, key: str, rows: Tensor) -> None:
        if rows.nbytes > self.cache_bytes:
            return
        self._cache[key] = rows
        self.num_bytes += rows.nbytes
        while self.num_bytes > self.cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self.num_bytes -= oldest.nbytes


def content_key(modality: str, prepared: Prepared, tenant: str) -> str:
    """Return 32 hexadecimal digits: a digest of the encoder's inputs, the modality and the tenant.

    Names, dtypes, shapes and all bytes of the inputs enter, so no file is read again and no name
    from a client is trusted. The modality's name stands for encoder and projector: both are fixed
    for the life of the cache.
    """
    parts = [modality.encode(), tenant.encode(), str(prepared.num_features).encode()]
    for name, tensor in sorted(prepared.inputs.items()):
        values = tensor.detach().cpu().contiguous()
        parts.append(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        parts.append(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest(*parts)


def _public_error(error: Exception, modality: str) -> ServeError:
    """Return the error for clients: our own errors with their text, others without."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, MultiTokenError):
        return ServeError(f"an item of {modality!r}: {error}", param="messages")
    return ServeError(f"an item of {modality!r} cannot be encoded", status=500, retry=False)
