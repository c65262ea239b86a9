"""vLLM engine: prompts go to vLLM servers, as ids or as prompt embeddings.

    submit -> prompt embeddings (text looked up, media written in) -> router -> vLLM replica
           <- token events <-------------------------------------- SSE <-

Complete prompts are built here, so chat template, tokens and media spans are those of the run. The
gateway needs the language model's embeddings, not its layers. A replica is used once it has given
the golden tokens of the run's export, by ids and by embeddings.
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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError, MultiTokenError
from multi_token.generate import eos_token_ids
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.embeddings_only import EmbeddingsOnly
from multi_token.serve.engines.base import (
    EngineEvent,
    Prompt,
    SamplingParams,
    TokenEvent,
    check_prompt,
    context_length,
    min_limit,
)
from multi_token.serve.engines.parity import logprob_tolerance
from multi_token.serve.engines.request import GenerationRequest, fail_request
from multi_token.serve.engines.scheduler import Scheduler
from multi_token.serve.engines.vllm.client import (
    EngineError,
    ServedModel,
    VllmClient,
    completion_body,
)
from multi_token.serve.engines.vllm.golden import GoldenRequest, read_golden
from multi_token.serve.engines.vllm.router import EngineMismatch, Replica, Router
from multi_token.serve.errors import ServeError
from multi_token.splice import MediaEmbeds, splice

if TYPE_CHECKING:
    from multi_token.model import MultiTokenForConditionalGeneration
    from multi_token.serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)
_NUM_SERIALIZERS = 2
"""Threads that build request bodies: a long prompt takes tens of milliseconds."""
_NUM_SCALE_IDS = 64
"""Ids from which the scale of token embeddings is measured."""

EmbedsForm = Literal["inputs", "weights"]
"""`inputs`: as transformers' `inputs_embeds`. `weights`: as rows of the embedding matrix."""


@dataclass(frozen=True)
class PromptEmbedder:
    """Builds prompt embeddings in the language model's precision.

    Some language models multiply embeddings after the look-up (by the root of the width, say). For
    some of them vLLM multiplies within its own look-up, so prompt embeddings must be scaled
    already; for others it multiplies afterwards, so they must not be. In the form `weights` all
    embeddings are divided by the scale, media too: projectors are trained for transformers' inputs.
    """

    model: MultiTokenForConditionalGeneration
    scale: float
    """Ratio of the language model's inputs to the rows of its embedding matrix."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: MultiTokenForConditionalGeneration) -> PromptEmbedder:
        """Measure the scale on some ids; 1 if the look-up is no multiple of the matrix."""
        embedding: Any = model.get_input_embeddings()
        weight = embedding.weight
        stride = max(1, len(weight) // _NUM_SCALE_IDS)
        ids = torch.arange(0, len(weight), stride, device=weight.device)
        rows, inputs = weight[ids].float(), embedding(ids).float()
        # least squares over all elements: a single quotient would be rounding in half precision
        scale = float((rows * inputs).sum() / rows.square().sum().clamp_min(1e-12))
        close = torch.allclose(rows * scale, inputs, rtol=2e-2, atol=1e-6)
        return cls(model, scale if close else 1.0)

    @property
    def forms(self) -> tuple[EmbedsForm, ...]:
        """Forms that differ, the more common one first."""
        return ("inputs",) if abs(self.scale - 1.0) < 1e-4 else ("inputs", "weights")

    @torch.no_grad()
    def __call__(self, prompt: Prompt, form: EmbedsForm) -> Tensor:
        """Return [time, hidden] on the CPU."""
        embedding: Any = self.model.get_input_embeddings()
        weight: Tensor = embedding.weight
        ids = prompt.input_ids.to(weight.device)
        if form == "inputs":
            text, divisor = embedding(ids), 1.0
        else:
            text, divisor = weight[ids], self.scale
        pieces = [
            MediaEmbeds(
                span.modality,
                # division in float32: two roundings in half precision would be visible
                embeds.to(weight.device, weight.dtype)
                if divisor == 1.0
                else (embeds.float() / divisor).to(weight.device, weight.dtype),
                torch.arange(span.start, span.start + span.length, device=weight.device),
            )
            for span, embeds in zip(prompt.media_spans, prompt.media_embeds, strict=True)
        ]
        return splice(text.to(weight.dtype)[None], pieces)[0].cpu()


@dataclass(frozen=True)
class VerifiedServer:
    """A vLLM server that has given the golden tokens."""

    served: ServedModel
    form: EmbedsForm
    """Form of prompt embeddings that it takes."""


class VllmEngine:
    """Sends prompts to vLLM's completions: text as ids, prompts with media as embeddings."""

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
        """Prepare the engine; `start` runs it.

        Args:
            model: with its processor; its language model may hold embeddings only.
            golden: request that verifies the replicas.
            urls: addresses of the replicas, without `/v1`.
            key: API key of all replicas.
            max_tokens: see `Engine`; by default the language model's context length, and never
                more than a replica takes.
            startup_timeout_s: time that `start` waits for the first replica.
            health_interval_s: time between two health checks of a replica.
        """
        self.model = model
        self.golden = golden
        self.urls = tuple(urls)
        self.retries: Counter[str] = Counter()
        """See `SupportsReplicas`."""
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
        """Find the replicas; if all are down later, wait until one is up again.

        Raises LanguageModelError if none can be used.
        """
        if self._thread is not None and self._thread.is_alive():
            self._run_on_loop(self._any_alive())
            return
        if self.model.capabilities.needs_input_ids:
            raise LanguageModelError(
                f"{self.model.capabilities.name} looks ids up in its layers, which prompts of "
                "embeddings do not have; serve it without --engine-url"
            )
        self._embedder = PromptEmbedder.of(self.model)
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
            report = self._router.report()
            self.stop()
            raise LanguageModelError(f"no engine can be used: {report}")

    def _run_on_loop(self, work: Any) -> None:
        """Run a coroutine on the loop; ends early when the engine is stopped."""
        assert self._loop is not None
        future = asyncio.run_coroutine_threadsafe(self._until_stopped(work), self._loop)
        with suppress(CancelledError):  # the loop has ended
            future.result()

    async def _until_stopped(self, work: Any) -> None:
        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(self._stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _first_check_done(self, router: Router) -> None:
        """Wait until each replica was checked, and one is up or the startup timeout has passed."""
        await router.wait_until(lambda: router.all_checked)
        # a mismatch is final: waiting cannot change a server's weights
        if router.num_alive or router.all_mismatched or not self._startup_timeout_s:
            return
        timeout = self._startup_timeout_s
        _LOG.warning("waiting up to %g s for an engine: %s", timeout, router.report())
        waiting = router.wait_until(lambda: router.num_alive > 0 or router.all_mismatched)
        try:
            await asyncio.wait_for(waiting, timeout)
        except asyncio.TimeoutError:
            _LOG.error("no engine is up after %g s", timeout)

    async def _any_alive(self) -> None:
        router = self._router
        assert router is not None
        await router.wait_until(lambda: router.num_alive > 0)

    async def _loop_main(self, has_begun: threading.Event) -> None:
        """Body of the thread: runs the router until the engine is stopped."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        clients = [VllmClient(url, self._key) for url in self.urls]
        router = Router(
            clients, self._verify, health_interval_s=self._health_interval_s, retries=self.retries
        )
        self._router = router
        self._serializers = ThreadPoolExecutor(_NUM_SERIALIZERS, thread_name_prefix="vllm bodies")
        router.start()
        has_begun.set()
        try:
            await self._stopped.wait()
        finally:
            running = [t for t in asyncio.all_tasks() if t.get_name() == self.name]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await router.close()
            self._serializers.shutdown(wait=False, cancel_futures=True)
            for request in self._scheduler.unfinished():
                request.fail(ServeError("the engine has failed", status=503))

    def stop(self) -> None:
        """Cancel all requests, which frees their places in the replicas, and end the thread."""
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
        """Send a prompt to a replica; see `Engine`."""
        if not self.is_alive:
            raise ServeError("no engine can answer now", status=503, code="no_engine", retry=True)
        check_prompt(self.model, prompt, options, self.max_tokens)
        request = GenerationRequest(
            request_id, prompt, options, emit, self._end_ids, self._scheduler.remove
        )
        # one locked section: `cancel` must find the future of every request that it finds, and
        # the loop must not end between the check and the call
        with self._scheduler.condition:
            if self._is_stopping or self._loop is None:
                raise ServeError("the engine is not running", status=503)
            self._scheduler.add(request)
            self._futures[request] = asyncio.run_coroutine_threadsafe(
                self._run_request(request), self._loop
            )

    def cancel(self, request_id: str) -> None:
        """End a request early; see `Engine`. Closes its connection, which frees its place."""
        request = self._scheduler.cancel(request_id)
        if request is not None:
            with self._scheduler.condition:
                future = self._futures.pop(request, None)
            if future is not None:
                future.cancel()

    @property
    def is_alive(self) -> bool:
        """True while a replica is up."""
        is_running = self._thread is not None and self._thread.is_alive()
        return is_running and not self._is_stopping and self.num_replicas > 0

    @property
    def num_replicas(self) -> int:
        return 0 if self._router is None or self._is_stopping else self._router.num_alive

    @property
    def num_running(self) -> int:
        """Number of requests whose first token has come."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Number of requests whose first token has not come."""
        return self._scheduler.num_waiting

    async def _run_request(self, request: GenerationRequest) -> None:
        """Run one request to its end, on one replica or on a second one."""
        task = asyncio.current_task()
        assert task is not None and self._router is not None
        task.set_name(self.name)
        try:
            await self._router.dispatch(
                lambda replica: self._stream_from(replica, request),
                lambda: request.is_finished or not self._scheduler.is_waiting(request),
            )
        except MultiTokenError as error:
            request.fail(error)
        except asyncio.CancelledError:
            request.cancel()
            raise
        # a defect of ours: the client must receive its end
        except Exception as error:  # noqa: BLE001
            fail_request(request, error)
        finally:
            # waits for `submit` to have stored the future, or it would stay forever
            with self._scheduler.condition:
                self._futures.pop(request, None)

    async def _stream_from(self, replica: Replica, request: GenerationRequest) -> None:
        """Emit the tokens of one replica. Raises EngineError if it breaks off."""
        assert self._loop is not None
        request.start_prefill()
        body = await self._loop.run_in_executor(
            self._serializers, self._request_body, replica.verified, request
        )
        last: int | None = None
        deltas = replica.client.complete(body, request.options.num_logprobs or 0)
        try:
            async for delta in deltas:
                # vLLM may stream past an id that ends generation here
                if request.is_finished and delta.finish is None:
                    return
                for token in delta.tokens:
                    self._scheduler.mark_running(request)
                    request.emit_token(token)
                    last = token.id
                if delta.finish is None or request.is_finished:
                    continue
                # some releases of vLLM leave the stop token out of the ids
                if delta.stop_id is not None and delta.stop_id != last:
                    request.emit_token(TokenEvent(delta.stop_id))
                request.finish("stop" if delta.finish == "stop" else "length")
        finally:
            # closes the connection now; garbage collection would do it at some later time
            await deltas.aclose()  # type: ignore[attr-defined]
        if not request.is_finished:
            raise EngineError("the answer ended without a reason", "failed")

    def _request_body(self, verified: VerifiedServer, request: GenerationRequest) -> bytes:
        prompt, tenant = request.prompt, request.prompt.tenant
        return completion_body(
            self._embedder(prompt, verified.form)
            if prompt.media_spans
            else prompt.input_ids.tolist(),
            request.options,
            model=verified.served.name,
            end_ids=request.end_ids,
            # hashed: a tenant is derived from an API key
            salt=hashlib.sha256(tenant.encode()).hexdigest() if tenant else None,
        )

    async def _verify(self, client: VllmClient) -> VerifiedServer:
        """Send the golden request by ids, then by embeddings in each form until one matches.

        Raises EngineMismatch, or EngineError if the server does not complete it.
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
        for form in self._embedder.forms:
            embeds = self._embedder(golden.prompt, form)
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
            "without --engine-url if this language model takes no embeddings there"
        )

    async def _mismatch(self, client: VllmClient, served: ServedModel, prompt: Any) -> str | None:
        body = completion_body(prompt, self.golden.sampling_params, model=served.name, end_ids=())
        tokens: list[TokenEvent] = []
        try:
            async for delta in client.complete(body, self.golden.sampling_params.num_logprobs or 0):
                tokens += delta.tokens
        except EngineError as error:
            # a server without --enable-prompt-embeds rejects embeddings: final, not a failure
            if error.reason == "rejected":
                return str(error)
            raise
        weight: Any = self.model.get_input_embeddings().weight
        return self.golden.mismatch(tokens, logprob_tolerance(weight.dtype, is_remote=True))


def build_vllm_engine(
    model: MultiTokenForConditionalGeneration, settings: ServeSettings
) -> VllmEngine:
    """Return the engine of an exported run, whose language model may be loaded without layers.

    Raises CheckpointError for a folder that is no export.
    """
    if settings.run_folder is None:
        raise LanguageModelError("--engine-url needs the folder of an exported run")
    golden = read_golden(settings.run_folder)
    language_model = model.language_model
    # without layers nothing can be probed, so the capabilities come from the manifest
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
        startup_timeout_s=settings.engine_startup_timeout_s,
    )
