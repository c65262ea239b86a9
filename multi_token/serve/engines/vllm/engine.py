"""The engine that has prompts answered elsewhere: by vLLM, on as many machines as there are.

Border: prompts become requests and events become tokens here. HTTP is vllm_wire.py's, which engine
is asked engine_pool.py's. The language model's layers are not needed, its embeddings are.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from multi_token.errors import LanguageModelError, MultiTokenError
from multi_token.generate import stop_ids
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.loading import EmbeddingsOnly
from multi_token.serve.engines.base import Event, Prompt, SamplingOptions, Token
from multi_token.serve.engines.prompts import context_length, refuse, shortest
from multi_token.serve.engines.scheduler import Requests, Running, failed
from multi_token.serve.engines.vllm.client import EngineFault, Served, VllmClient, completion_body
from multi_token.serve.engines.vllm.embeddings import Form, PromptEmbeddings
from multi_token.serve.engines.vllm.golden import Golden, read_golden, tolerance_of
from multi_token.serve.engines.vllm.router import EnginePool, EngineRefused, PooledEngine
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)
_NUM_WRITERS = 2
"""Threads that write bodies: looking up and base64 of a long prompt take tens of milliseconds."""


@dataclass(frozen=True)
class Proof:
    """What was found out about an engine that is right."""

    served: Served
    form: Form
    """Of the embeddings that it takes."""


class VllmEngine:
    """Hands prompts to vLLM's completions: text as ids, prompts with media as embeddings.

    The whole prompt is made here, so template, tokens and places of media are ours alone. Every
    engine must give the golden answer of the run's export, by ids and by embeddings, before it is
    used.
    """

    name = "vllm"

    def __init__(
        self,
        model: MultiTokenForConditionalGeneration,
        golden: Golden,
        urls: Sequence[str],
        *,
        key: str | None = None,
        max_tokens: int | None = None,
        wait_s: float = 0.0,
        look_s: float = 1.0,
    ) -> None:
        """`urls`: of the engines, without `/v1`. `key`: of all of them. `max_tokens`: see `Engine`;
        by default what the language model's config says, and never more than an engine takes.
        `wait_s`: how long the start waits for the first engine. `look_s`: between looks at each.
        """
        self.model = model
        self.golden = golden
        self.urls = tuple(urls)
        self.retries: Counter[str] = Counter()
        """Prompts that were handed to another engine, by why."""
        self._key = key
        self._own_length = shortest(max_tokens, context_length(model))
        self._lengths: dict[str, int | None] = {}
        self.max_tokens = self._own_length
        self._wait_s = wait_s
        self._look_s = look_s
        self._end_ids = frozenset(stop_ids(model))
        self._requests = Requests()
        self._futures: dict[Running, Future[None]] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: EnginePool | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Find the engines, and begin to answer; where all have died, wait until one is back.

        Raises LanguageModelError if none can be used.
        """
        if self._thread is not None and self._thread.is_alive():
            self._waited(self._first_alive())
            return
        if self.model.capabilities.needs_ids:
            raise LanguageModelError(
                f"{self.model.capabilities.name} looks ids up in its layers, which prompts of "
                "embeddings do not have; serve it with --backend static"
            )
        self._embeddings = PromptEmbeddings.of(self.model)
        self._is_stopping = False
        has_begun = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(has_begun)), name="vllm engine", daemon=True
        )
        self._thread.start()
        has_begun.wait()
        assert self._pool is not None
        self._waited(self._settled(self._pool))
        if not self._pool.num_alive and not self._is_stopping:
            why = self._pool.report()
            self.stop()
            raise LanguageModelError(f"no engine can be used: {why}")

    def _waited(self, work: Any) -> None:
        """Do something on the loop; ends early when the engine is stopped."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(self._or_stopped(work), self._loop)
        with suppress(CancelledError):  # the loop ends
            future.result()

    async def _or_stopped(self, work: Any) -> None:
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _settled(self, pool: EnginePool) -> None:
        """Until each engine was looked at, and one is there or the time to wait is over."""
        await pool.wait_until(lambda: pool.are_all_seen)
        if pool.num_alive or pool.are_all_refused or not self._wait_s:
            return
        _LOG.warning("waiting up to %g s for an engine: %s", self._wait_s, pool.report())
        waiting = pool.wait_until(lambda: pool.num_alive > 0 or pool.are_all_refused)
        try:
            await asyncio.wait_for(waiting, self._wait_s)
        except asyncio.TimeoutError:
            _LOG.error("no engine came within %g s", self._wait_s)

    async def _first_alive(self) -> None:
        pool = self._pool
        assert pool is not None
        await pool.wait_until(lambda: pool.num_alive > 0)

    async def _run(self, has_begun: threading.Event) -> None:
        """The thread: looks after the engines until it is stopped."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        clients = [VllmClient(url, self._key) for url in self.urls]
        pool = EnginePool(clients, self._prove, look_s=self._look_s, retries=self.retries)
        self._pool = pool
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, thread_name_prefix="vllm bodies")
        pool.start()
        has_begun.set()
        try:
            await self._stopped.wait()
        finally:
            answering = [t for t in asyncio.all_tasks() if t.get_name() == self.name]
            for task in answering:
                task.cancel()
            await asyncio.gather(*answering, return_exceptions=True)
            await pool.close()
            self._writers.shutdown(wait=False, cancel_futures=True)
            for row in self._requests.all():
                row.fail(ServeError("the engine has failed", status=503))

    def stop(self) -> None:
        """Cancel all, which frees the engines' places, and end the thread."""
        with self._requests.changed:
            self._is_stopping = True
        for row in self._requests.all():
            row.cancel()
        if self._thread is not None and self._thread.is_alive():
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingOptions,
        emit: Callable[[Event], None],
    ) -> None:
        """Hand a prompt on; see `Engine`."""
        if not self.is_alive:
            raise ServeError("no engine can answer now", status=503, code="no_engine", retry=True)
        refuse(self.model, prompt, options, self.max_tokens)
        row = Running(request_id, prompt, options, emit, self._end_ids, self._requests.forget)
        with self._requests.changed:
            if self._is_stopping or self._loop is None:
                raise ServeError("the engine does not run", status=503)
            self._requests.add(row)
            self._futures[row] = asyncio.run_coroutine_threadsafe(self._answered(row), self._loop)

    def cancel(self, request_id: str) -> None:
        """End an answer early; see `Engine`. Its connection is closed, which frees its place."""
        row = self._requests.cancel(request_id)
        if row is not None:
            with self._requests.changed:
                future = self._futures.pop(row, None)
            if future is not None:
                future.cancel()

    @property
    def is_alive(self) -> bool:
        """Whether an engine is there."""
        is_running = self._thread is not None and self._thread.is_alive()
        return is_running and not self._is_stopping and self.num_engines > 0

    @property
    def num_engines(self) -> int:
        """Engines that are used."""
        return 0 if self._pool is None or self._is_stopping else self._pool.num_alive

    @property
    def num_running(self) -> int:
        """Answers that have begun."""
        return self._requests.num_running

    @property
    def num_waiting(self) -> int:
        """Prompts of which no token has come."""
        return self._requests.num_waiting

    async def _answered(self, row: Running) -> None:
        """A prompt, until it has ended in one way or another."""
        task = asyncio.current_task()
        assert task is not None and self._pool is not None
        task.set_name(self.name)
        try:
            await self._pool.run(
                lambda engine: self._attempt(engine, row), lambda: self._has_begun(row)
            )
        except MultiTokenError as error:
            row.fail(error)
        except asyncio.CancelledError:
            row.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whoever asked must be told
            failed(row, error)
        finally:
            with self._requests.changed:  # not before it has been put there
                self._futures.pop(row, None)

    def _has_begun(self, row: Running) -> bool:
        with self._requests.changed:
            return row.is_done or row not in self._requests.waiting

    async def _attempt(self, engine: PooledEngine, row: Running) -> None:
        """Ask one engine. Raises EngineFault where it does not answer to the end."""
        assert self._loop is not None
        body = await self._loop.run_in_executor(self._writers, self._body, engine.proof, row)
        last: int | None = None
        deltas = engine.client.complete(body, row.options.num_logprobs or 0)
        try:
            async for delta in deltas:
                if row.is_done and delta.finish is None:
                    return  # it goes on behind what we take for the end
                for token in delta.tokens:
                    self._begin(row)
                    row.say(token)
                    last = token.id
                if delta.finish is None or row.is_done:
                    continue
                if delta.stop_id is not None and delta.stop_id != last:
                    row.say(Token(delta.stop_id))  # a release that leaves it out of the ids
                row.end("stop" if delta.finish == "stop" else "length")
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]
        if not row.is_done:
            raise EngineFault("the answer ended without a reason", "failed")

    def _begin(self, row: Running) -> None:
        with self._requests.changed:
            if row in self._requests.waiting:
                self._requests.waiting.remove(row)

    def _body(self, proof: Proof, row: Running) -> bytes:
        prompt, tenant = row.prompt, row.prompt.tenant
        return completion_body(
            self._embeddings(prompt, proof.form) if prompt.places else prompt.input_ids.tolist(),
            row.options,
            model=proof.served.name,
            end_ids=row.end_ids,
            salt=hashlib.sha256(tenant.encode()).hexdigest() if tenant else None,
        )

    async def _prove(self, client: VllmClient) -> Proof:
        """The golden request by ids, and by embeddings in each form until one is right.

        Raises EngineRefused, or EngineFault if it does not answer now.
        """
        served = await client.served()
        golden, start = self.golden, f"`vllm serve {self.golden.folder} --enable-prompt-embeds`"
        wrong = await self._disagreement(client, served, list(golden.input_ids))
        if wrong is not None:
            raise EngineRefused(
                f"asked the golden request by ids, {served.name!r} gives another answer ({wrong}): "
                f"it has other weights, or in another precision; start it with {start}"
            )
        faults = []
        for form in self._embeddings.forms:
            embeds = self._embeddings(golden.prompt, form)
            wrong = await self._disagreement(client, served, embeds)
            if wrong is None:
                self._lengths[client.url] = served.max_tokens
                self.max_tokens = shortest(self._own_length, *self._lengths.values())
                return Proof(served, form)
            faults.append(wrong)
        raise EngineRefused(
            f"asked the golden request by embeddings, {served.name!r} gives another answer "
            f"({'; '.join(faults)}), though the right one by ids; start it with {start}, or serve "
            "with --backend static if this language model takes no embeddings there"
        )

    async def _disagreement(self, client: VllmClient, served: Served, prompt: Any) -> str | None:
        body = completion_body(prompt, self.golden.options, model=served.name, end_ids=())
        tokens: list[Token] = []
        try:
            async for delta in client.complete(body, self.golden.options.num_logprobs or 0):
                tokens += delta.tokens
        except EngineFault as fault:
            if fault.reason == "rejected":
                return str(fault)
            raise
        weight: Any = self.model.get_input_embeddings().weight
        return self.golden.disagreement(tokens, tolerance_of(weight.dtype))


def build_vllm_engine(
    model: MultiTokenForConditionalGeneration, settings: ServeSettings
) -> VllmEngine:
    """The engine of an exported run, whose language model may have been loaded without layers.

    Raises CheckpointError for a folder that is no export.
    """
    if settings.run_folder is None:
        raise LanguageModelError("the backend vllm needs the folder of an exported run")
    golden = read_golden(settings.run_folder)
    language_model = model.language_model
    if isinstance(language_model, EmbeddingsOnly):
        model.capabilities = Capabilities(
            name=type(language_model).__name__,
            embedding_scale=golden.embedding_scale,
            needs_ids=golden.needs_ids,
            starts_from="embeddings",
            pads_left=True,
            selects_logits=True,
            num_exact_tokens=None,
            trials={},
        )
    return VllmEngine(
        model,
        golden,
        [url.rstrip("/") for url in settings.engine_urls],
        key=settings.engine_key,
        wait_s=settings.engine_wait_s,
    )
