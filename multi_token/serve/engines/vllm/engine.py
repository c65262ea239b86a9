"""vLLM engine: prompts go to vLLM servers, as ids or as prompt embeddings.

    submit -> prompt embeddings (text looked up, media written in) -> router -> vLLM replica
           <- token events <-------------------------------------- SSE <-

The gateway builds complete prompts, so chat template, tokens and media spans are those of the run.
It needs the language model's embeddings, not the layers. A replica is used once it has given the
golden tokens of the run's export, by ids and by embeddings.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from multi_token.errors import LanguageModelError, MultiTokenError
from multi_token.language_model.capabilities import Capabilities
from multi_token.language_model.embeddings_only import EmbeddingsOnly
from multi_token.serve.engines.base import Prompt, TokenEvent
from multi_token.serve.engines.engine import Engine, min_limit
from multi_token.serve.engines.parity import logprob_tolerance
from multi_token.serve.engines.request import GenerationRequest, fail_request
from multi_token.serve.engines.vllm.client import (
    EngineError,
    ServedModel,
    VllmClient,
    completion_body,
)
from multi_token.serve.engines.vllm.golden import GoldenRequest, read_golden
from multi_token.serve.engines.vllm.router import (
    EngineMismatch,
    Replica,
    Router,
    no_engine_error,
)
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
"""`inputs`: like transformers' `inputs_embeds`. `weights`: like rows of the embedding matrix."""


@dataclass(frozen=True)
class PromptEmbedder:
    """Builds prompt embeddings in the language model's precision.

    Some language models multiply embeddings after the look-up, for example by the root of the
    width. Where vLLM multiplies within its own look-up, prompt embeddings must be scaled already
    (`inputs`); where vLLM multiplies afterwards, they must not be (`weights`).
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
        # Least squares over all elements: a single quotient would be rounding in half precision.
        scale = float((rows * inputs).sum() / rows.square().sum().clamp_min(1e-12))
        close = torch.allclose(rows * scale, inputs, rtol=2e-2, atol=1e-6)
        return cls(model, scale if close else 1.0)

    @torch.no_grad()
    def __call__(self, prompt: Prompt, form: EmbedsForm) -> Tensor:
        """Return [time, hidden] on the CPU."""
        embedding: Any = self.model.get_input_embeddings()
        weight: Tensor = embedding.weight
        ids = prompt.input_ids.to(weight.device)
        text = embedding(ids) if form == "inputs" else weight[ids]
        pieces = []
        for span, embeds in zip(prompt.media_spans, prompt.media_embeds, strict=True):
            if form == "weights":
                # Media too: projectors are trained for transformers' inputs. In float32: rounding
                # twice in half precision would change log-probabilities.
                embeds = embeds.float() / self.scale
            positions = span.positions().to(weight.device)
            values = embeds.to(weight.device, weight.dtype)
            pieces.append(MediaEmbeds(span.modality, values, positions))
        return splice(text.to(weight.dtype)[None], pieces)[0].cpu()


@dataclass(frozen=True)
class VerifiedServer:
    """A vLLM server that has given the golden tokens."""

    served: ServedModel
    form: EmbedsForm
    """Form of prompt embeddings that it takes."""


class VllmEngine(Engine):
    """Sends prompts to vLLM's completions: text as ids, prompts with media as embeddings."""

    name = "vllm"
    is_remote = True

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

        The language model may hold embeddings only. `golden` verifies the replicas, whose addresses
        (`urls`) have no `/v1`. `max_tokens` is lowered to the limit of each verified replica.
        """
        super().__init__(model, max_tokens)
        self.golden = golden
        self.urls = tuple(urls)
        self._key = key
        self._model_max_tokens = self.max_tokens
        self._server_max_tokens: dict[str, int | None] = {}
        self._startup_timeout_s = startup_timeout_s
        self._health_interval_s = health_interval_s
        self._futures: dict[GenerationRequest, Future[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._router: Router | None = None

    def start(self) -> None:
        """Find the replicas; if all are down later, wait until one is up again; see `Engine`."""
        router = self._router
        if router is not None and self._thread is not None and self._thread.is_alive():
            self._run_on_loop(router.wait_until(lambda: router.num_alive > 0))
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
            self.stop()
            raise LanguageModelError(f"no engine can be used: {self.report()}")

    def _run_on_loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the loop, until it or the engine ends."""
        assert self._loop is not None
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop was closed by `stop` in another thread
            work.close()
            return
        # a loop that ends right now may never start the coroutine, and its future would never end
        while not future.done() and self._thread is not None and self._thread.is_alive():
            wait([future], timeout=1)
        if future.done():
            with suppress(CancelledError):  # by `_loop_main`
                future.result()
        else:
            work.close()

    async def _first_check_done(self, router: Router) -> None:
        """Wait until each replica was checked, and one is up or the startup timeout has passed."""
        await router.wait_until(lambda: router.all_checked)
        # A mismatch is final: waiting cannot change a server's weights.
        if router.num_alive or router.all_mismatched or not self._startup_timeout_s:
            return
        timeout = self._startup_timeout_s
        _LOG.warning("waiting up to %g s for an engine: %s", timeout, router.report())
        waiting = router.wait_until(lambda: router.num_alive > 0 or router.all_mismatched)
        try:
            await asyncio.wait_for(waiting, timeout)
        except asyncio.TimeoutError:
            _LOG.error("no engine is up after %g s", timeout)

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
            # Before the connections are closed: a request that ends by a closed connection would
            # count as a fault of its replica.
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await router.close()
            self._serializers.shutdown(wait=False, cancel_futures=True)
            self._fail_unfinished()

    @property
    def is_alive(self) -> bool:
        return super().is_alive and self.num_replicas > 0

    @property
    def num_replicas(self) -> int:
        return 0 if self._router is None or self._is_stopping else self._router.num_alive

    def report(self) -> str:
        """Return why replicas are not up."""
        return "" if self._router is None else self._router.report()

    def _start_request(self, request: GenerationRequest) -> None:
        assert self._loop is not None
        # In `submit`'s locked section: `cancel` must find the future of every request it finds.
        self._futures[request] = asyncio.run_coroutine_threadsafe(
            self._run_request(request), self._loop
        )

    def _cancel_request(self, request: GenerationRequest) -> None:
        """Also close its connection, so its replica stops generating."""
        request.cancel()
        with self._condition:
            future = self._futures.pop(request, None)
        if future is not None:
            future.cancel()

    def _wake_thread(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stopped.set)

    def _unavailable_error(self) -> ServeError:
        return no_engine_error()

    async def _run_request(self, request: GenerationRequest) -> None:
        """Run one request to its end, on one replica or on a second one."""
        assert self._router is not None
        try:
            await self._router.dispatch(
                lambda replica: self._stream_from(replica, request),
                lambda: request.state != "waiting",
            )
        except MultiTokenError as error:
            request.fail(error)
        except asyncio.CancelledError:
            request.cancel()
            raise
        # A defect of ours: the client must receive its end.
        except Exception as error:  # noqa: BLE001
            fail_request(request, error)
        finally:
            # Under the lock in which `submit` stores the future: a request may end before that, and
            # its future would then stay here.
            with self._condition:
                self._futures.pop(request, None)

    async def _stream_from(self, replica: Replica, request: GenerationRequest) -> None:
        """Emit the tokens of one replica. Raises EngineError if it breaks off."""
        assert self._loop is not None
        body = await self._loop.run_in_executor(
            self._serializers, self._request_body, replica.verified, request
        )
        last: int | None = None
        deltas = replica.client.complete(body, request.options.num_logprobs or 0)
        try:
            async for delta in deltas:
                # vLLM may stream past an id that ends generation here.
                if request.is_finished and delta.finish is None:
                    return
                for token in delta.tokens:
                    request.emit_token(token)
                    last = token.id
                if delta.finish is None or request.is_finished:
                    continue
                # Some releases of vLLM leave the stop token out of the ids.
                if delta.stop_id is not None and delta.stop_id != last:
                    request.emit_token(TokenEvent(delta.stop_id))
                request.finish("stop" if delta.finish == "stop" else "length")
        finally:
            # Closes the connection now, not at some later garbage collection.
            await deltas.aclose()  # type: ignore[attr-defined]
        if not request.is_finished:
            raise EngineError("the response ended without a finish reason", "failed")

    def _request_body(self, verified: VerifiedServer, request: GenerationRequest) -> bytes:
        prompt, tenant = request.prompt, request.prompt.tenant
        return completion_body(
            self._embedder(prompt, verified.form)
            if prompt.media_spans
            else prompt.input_ids.tolist(),
            request.options,
            model=verified.served.name,
            end_ids=request.end_ids,
            # Hashed: a tenant is derived from an API key.
            salt=hashlib.sha256(tenant.encode()).hexdigest() if tenant else None,
        )

    async def _verify(self, client: VllmClient) -> VerifiedServer:
        """Send the golden request by ids, then by embeddings in each form until one matches.

        Raises EngineMismatch, or EngineError if the server does not complete the request.
        """
        served = await client.served_model()
        golden, start = self.golden, f"`vllm serve {self.golden.folder} --enable-prompt-embeds`"
        wrong = await self._mismatch(client, served, list(golden.input_ids))
        if wrong is not None:
            raise EngineMismatch(
                f"for the golden request by ids, {served.name!r} gives other tokens ({wrong}): it "
                f"has other weights, or another precision; start it with {start}"
            )
        faults = []
        forms: tuple[EmbedsForm, ...] = ("inputs", "weights")
        # Without a scale both forms are the same; `inputs` is the more common one.
        for form in forms if abs(self._embedder.scale - 1.0) >= 1e-4 else forms[:1]:
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
            f"for the golden request by embeddings, {served.name!r} gives other tokens "
            f"({'; '.join(faults)}), but the right ones by ids; start it with {start}, or serve "
            "without --engine-url if vLLM takes no embeddings for this language model"
        )

    async def _mismatch(self, client: VllmClient, served: ServedModel, prompt: Any) -> str | None:
        body = completion_body(prompt, self.golden.sampling_params, model=served.name, end_ids=())
        tokens: list[TokenEvent] = []
        try:
            async for delta in client.complete(body, self.golden.sampling_params.num_logprobs or 0):
                tokens += delta.tokens
        except EngineError as error:
            # A server without --enable-prompt-embeds rejects embeddings: a mismatch, no fault.
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
    # Without layers nothing can be probed, so the capabilities come from the manifest.
    if isinstance(language_model, EmbeddingsOnly):
        model.capabilities = Capabilities(
            name=type(language_model).__name__,
            embedding_scale=golden.embedding_scale,
            needs_input_ids=golden.needs_ids,
            prefill_mode="embeds",
            supports_left_padding=True,
            supports_logits_to_keep=True,
            supports_chunked_logits=True,
            max_batched_length=None,
        )
    return VllmEngine(
        model,
        golden,
        [url.rstrip("/") for url in settings.engine_urls],
        key=settings.engine_key,
        startup_timeout_s=settings.engine_startup_timeout_s,
    )
