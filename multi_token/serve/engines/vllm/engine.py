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
from multi_token.generate import eos_token_ids
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.loading import EmbeddingsOnly
from multi_token.serve.engines.base import EngineEvent, Prompt, SamplingParams, TokenEvent
from multi_token.serve.engines.prompts import check_prompt, context_length, min_limit
from multi_token.serve.engines.scheduler import GenerationRequest, Scheduler, fail_request
from multi_token.serve.engines.vllm.client import (
    EngineError,
    ServedModel,
    VllmClient,
    completion_body,
)
from multi_token.serve.engines.vllm.embeddings import EmbedsForm, PromptEmbedder
from multi_token.serve.engines.vllm.golden import GoldenRequest, logprob_tolerance, read_golden
from multi_token.serve.engines.vllm.router import EngineMismatch, Replica, Router
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)
_NUM_SERIALIZERS = 2
"""Threads that write bodies: looking up and base64 of a long prompt take tens of milliseconds."""


@dataclass(frozen=True)
class VerifiedServer:
    """What was found out about an engine that is right."""

    served: ServedModel
    form: EmbedsForm
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
        golden: GoldenRequest,
        urls: Sequence[str],
        *,
        key: str | None = None,
        max_tokens: int | None = None,
        startup_timeout_s: float = 0.0,
        health_interval_s: float = 1.0,
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
        self._model_max_tokens = min_limit(max_tokens, context_length(model))
        self._server_max_tokens: dict[str, int | None] = {}
        self.max_tokens = self._model_max_tokens
        self._startup_timeout_s = startup_timeout_s
        self._health_interval_s = health_interval_s
        self._end_ids = frozenset(eos_token_ids(model))
        self._scheduler = Scheduler()
        self._futures: dict[GenerationRequest, Future[None]] = {}
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._router: Router | None = None
        self._is_stopping = False

    def start(self) -> None:
        """Find the engines, and begin to answer; where all have died, wait until one is back.

        Raises LanguageModelError if none can be used.
        """
        if self._thread is not None and self._thread.is_alive():
            self._run_on_loop(self._any_alive())
            return
        if self.model.capabilities.needs_input_ids:
            raise LanguageModelError(
                f"{self.model.capabilities.name} looks ids up in its layers, which prompts of "
                "embeddings do not have; serve it with --backend static"
            )
        self._embeddings = PromptEmbedder.of(self.model)
        self._is_stopping = False
        has_begun = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._loop_main(has_begun)), name="vllm engine", daemon=True
        )
        self._thread.start()
        has_begun.wait()
        assert self._router is not None
        self._run_on_loop(self._first_check_done(self._router))
        if not self._router.num_alive and not self._is_stopping:
            why = self._router.report()
            self.stop()
            raise LanguageModelError(f"no engine can be used: {why}")

    def _run_on_loop(self, work: Any) -> None:
        """Do something on the loop; ends early when the engine is stopped."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(self._until_stopped(work), self._loop)
        with suppress(CancelledError):  # the loop ends
            future.result()

    async def _until_stopped(self, work: Any) -> None:
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _first_check_done(self, pool: Router) -> None:
        """Until each engine was looked at, and one is there or the time to wait is over."""
        await pool.wait_until(lambda: pool.all_checked)
        if pool.num_alive or pool.all_mismatched or not self._startup_timeout_s:
            return
        _LOG.warning("waiting up to %g s for an engine: %s", self._startup_timeout_s, pool.report())
        waiting = pool.wait_until(lambda: pool.num_alive > 0 or pool.all_mismatched)
        try:
            await asyncio.wait_for(waiting, self._startup_timeout_s)
        except asyncio.TimeoutError:
            _LOG.error("no engine came within %g s", self._startup_timeout_s)

    async def _any_alive(self) -> None:
        pool = self._router
        assert pool is not None
        await pool.wait_until(lambda: pool.num_alive > 0)

    async def _loop_main(self, has_begun: threading.Event) -> None:
        """The thread: looks after the engines until it is stopped."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        clients = [VllmClient(url, self._key) for url in self.urls]
        pool = Router(
            clients, self._verify, health_interval_s=self._health_interval_s, retries=self.retries
        )
        self._router = pool
        self._serializers = ThreadPoolExecutor(_NUM_SERIALIZERS, thread_name_prefix="vllm bodies")
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
            self._serializers.shutdown(wait=False, cancel_futures=True)
            for request in self._scheduler.unfinished():
                request.fail(ServeError("the engine has failed", status=503))

    def stop(self) -> None:
        """Cancel all, which frees the engines' places, and end the thread."""
        with self._scheduler.condition:
            self._is_stopping = True
        for request in self._scheduler.unfinished():
            request.cancel()
        if self._thread is not None and self._thread.is_alive():
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        options: SamplingParams,
        emit: Callable[[EngineEvent], None],
    ) -> None:
        """Hand a prompt on; see `Engine`."""
        if not self.is_alive:
            raise ServeError("no engine can answer now", status=503, code="no_engine", retry=True)
        check_prompt(self.model, prompt, options, self.max_tokens)
        request = GenerationRequest(
            request_id, prompt, options, emit, self._end_ids, self._scheduler.remove
        )
        with self._scheduler.condition:
            if self._is_stopping or self._loop is None:
                raise ServeError("the engine does not run", status=503)
            self._scheduler.add(request)
            self._futures[request] = asyncio.run_coroutine_threadsafe(
                self._run_request(request), self._loop
            )

    def cancel(self, request_id: str) -> None:
        """End an answer early; see `Engine`. Its connection is closed, which frees its place."""
        request = self._scheduler.cancel(request_id)
        if request is not None:
            with self._scheduler.condition:
                future = self._futures.pop(request, None)
            if future is not None:
                future.cancel()

    @property
    def is_alive(self) -> bool:
        """Whether an engine is there."""
        is_running = self._thread is not None and self._thread.is_alive()
        return is_running and not self._is_stopping and self.num_replicas > 0

    @property
    def num_replicas(self) -> int:
        """Engines that are used."""
        return 0 if self._router is None or self._is_stopping else self._router.num_alive

    @property
    def num_running(self) -> int:
        """Answers that have begun."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Prompts of which no token has come."""
        return self._scheduler.num_waiting

    async def _run_request(self, request: GenerationRequest) -> None:
        """A prompt, until it has ended in one way or another."""
        task = asyncio.current_task()
        assert task is not None and self._router is not None
        task.set_name(self.name)
        try:
            await self._router.dispatch(
                lambda engine: self._stream_from(engine, request), lambda: self._is_started(request)
            )
        except MultiTokenError as error:
            request.fail(error)
        except asyncio.CancelledError:
            request.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whoever asked must be told
            fail_request(request, error)
        finally:
            with self._scheduler.condition:  # not before it has been put there
                self._futures.pop(request, None)

    def _is_started(self, request: GenerationRequest) -> bool:
        with self._scheduler.condition:
            return request.is_finished or request not in self._scheduler.waiting

    async def _stream_from(self, engine: Replica, request: GenerationRequest) -> None:
        """Ask one engine. Raises EngineFault where it does not answer to the end."""
        assert self._loop is not None
        body = await self._loop.run_in_executor(
            self._serializers, self._request_body, engine.verified, request
        )
        last: int | None = None
        deltas = engine.client.complete(body, request.options.num_logprobs or 0)
        try:
            async for delta in deltas:
                if request.is_finished and delta.finish is None:
                    return  # it goes on behind what we take for the end
                for token in delta.tokens:
                    self._mark_running(request)
                    request.emit_token(token)
                    last = token.id
                if delta.finish is None or request.is_finished:
                    continue
                if delta.stop_id is not None and delta.stop_id != last:
                    request.emit_token(
                        TokenEvent(delta.stop_id)
                    )  # a release that leaves it out of the ids
                request.finish("stop" if delta.finish == "stop" else "length")
        finally:
            await deltas.aclose()  # type: ignore[attr-defined]
        if not request.is_finished:
            raise EngineError("the answer ended without a reason", "failed")

    def _mark_running(self, request: GenerationRequest) -> None:
        with self._scheduler.condition:
            if request in self._scheduler.waiting:
                self._scheduler.waiting.remove(request)

    def _request_body(self, proof: VerifiedServer, request: GenerationRequest) -> bytes:
        prompt, tenant = request.prompt, request.prompt.tenant
        return completion_body(
            self._embeddings(prompt, proof.form)
            if prompt.media_spans
            else prompt.input_ids.tolist(),
            request.options,
            model=proof.served.name,
            end_ids=request.end_ids,
            salt=hashlib.sha256(tenant.encode()).hexdigest() if tenant else None,
        )

    async def _verify(self, client: VllmClient) -> VerifiedServer:
        """The golden request by ids, and by embeddings in each form until one is right.

        Raises EngineRefused, or EngineFault if it does not answer now.
        """
        served = await client.served_model()
        golden, start = self.golden, f"`vllm serve {self.golden.folder} --enable-prompt-embeds`"
        wrong = await self._mismatch(client, served, list(golden.input_ids))
        if wrong is not None:
            raise EngineMismatch(
                f"asked the golden request by ids, {served.name!r} gives another answer ({wrong}): "
                f"it has other weights, or in another precision; start it with {start}"
            )
        faults = []
        for form in self._embeddings.forms:
            embeds = self._embeddings(golden.prompt, form)
            wrong = await self._mismatch(client, served, embeds)
            if wrong is None:
                self._server_max_tokens[client.url] = served.max_tokens
                self.max_tokens = min_limit(
                    self._model_max_tokens, *self._server_max_tokens.values()
                )
                return VerifiedServer(served, form)
            faults.append(wrong)
        raise EngineMismatch(
            f"asked the golden request by embeddings, {served.name!r} gives another answer "
            f"({'; '.join(faults)}), though the right one by ids; start it with {start}, or serve "
            "with --backend static if this language model takes no embeddings there"
        )

    async def _mismatch(self, client: VllmClient, served: ServedModel, prompt: Any) -> str | None:
        body = completion_body(prompt, self.golden.sampling_params, model=served.name, end_ids=())
        tokens: list[TokenEvent] = []
        try:
            async for delta in client.complete(body, self.golden.sampling_params.num_logprobs or 0):
                tokens += delta.tokens
        except EngineError as fault:
            if fault.reason == "rejected":
                return str(fault)
            raise
        weight: Any = self.model.get_input_embeddings().weight
        return self.golden.mismatch(tokens, logprob_tolerance(weight.dtype))


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
            needs_input_ids=golden.needs_ids,
            prefill_mode="embeds",
            supports_left_padding=True,
            supports_logits_to_keep=True,
            max_batched_length=None,
        )
    return VllmEngine(
        model,
        golden,
        [url.rstrip("/") for url in settings.engine_urls],
        key=settings.engine_key,
        startup_timeout_s=settings.engine_wait_s,
    )
