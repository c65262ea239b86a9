"""A small stand-in for `vllm serve`: the same HTTP contract, with a real tiny language model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from multi_token.serve.engines.base import SamplingParams
from multi_token.serve.engines.sampler import sample


class Refused(Exception):
    """An error response with this status, in vLLM's form."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class StandIn:
    """A server in a thread on 127.0.0.1. Its fields may be changed while it runs."""

    def __init__(
        self,
        language_model: Any,
        *,
        key: str | None = None,
        max_num_seqs: int = 8,
        max_inside: int = 64,
        max_model_len: int | None = None,
        takes_embeds: bool = True,
        multiplies: float = 1.0,
        multiplies_ids: float = 1.0,
        start: bool = True,
    ) -> None:
        """`max_inside`: limit of running and waiting requests (`--max-num-queued-reqs`).

        `multiplies`: factor of received embeddings before the first layer, as vLLM applies it for
        some families. `multiplies_ids`: the same for embeddings of ids, after the lookup.
        """
        self.language_model = language_model
        self.key = key
        self.max_num_seqs = max_num_seqs
        self.max_inside = max_inside
        self.max_model_len = max_model_len or language_model.config.max_position_embeddings
        self.takes_embeds = takes_embeds
        self.multiplies = multiplies
        self.multiplies_ids = multiplies_ids
        self.is_healthy = True
        self.fails_with: int | None = None
        """Status of the response to every completion request."""
        self.breaks_at: int | None = None
        """Number of tokens after which the engine fails."""
        self.bodies: list[dict[str, Any]] = []
        """Bodies of the requests, without golden requests."""
        self.num_asked = 0
        self.num_running = self.num_waiting = 0
        self.port = 0
        self._is_free = threading.Event()
        self._is_free.set()
        self._thread = threading.Thread()
        self._loop: asyncio.AbstractEventLoop | None = None
        if start:
            self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after a `die`, on the same port."""
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
            ]
        )
        config = uvicorn.Config(
            app, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._has_started = threading.Event()
        self._thread.start()
        assert self._has_started.wait(30), "the stand-in did not start"

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            watching = asyncio.create_task(self._tell_start())
            await self._server.serve()
            watching.cancel()

        asyncio.run(serve())

    async def _tell_start(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.005)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._has_started.set()

    def die(self) -> None:
        """End at once, and break all connections."""
        if not self._thread.is_alive():
            return

        def abort() -> None:
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()  # type: ignore[union-attr]
            self._server.should_exit = self._server.force_exit = True

        assert self._loop is not None
        self._loop.call_soon_threadsafe(abort)
        self._thread.join(30)
        assert not self._thread.is_alive(), "the stand-in did not end"
        self.num_running = self.num_waiting = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the context, requests wait for their first token."""
        self._is_free.clear()
        try:
            yield
        finally:
            self._is_free.set()

    def wait_until(self, holds: Any, seconds: float = 10.0) -> bool:
        """Return True as soon as a condition holds, False if it does not in time."""
        end = threading.Event()
        for _ in range(int(seconds / 0.005)):
            if holds():
                return True
            end.wait(0.005)
        return False

    async def _health(self, _: Request) -> Response:
        return Response(status_code=200 if self.is_healthy else 503)

    async def _models(self, request: Request) -> Response:
        if not self._may(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        entry = {"id": "stand-in", "object": "model", "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [entry]})

    def _may(self, request: Request) -> bool:
        return self.key is None or request.headers.get("authorization") == f"Bearer {self.key}"

    async def _completions(self, request: Request) -> Response:
        if not self._may(request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        self.num_asked += 1
        try:
            if self.fails_with is not None:
                raise Refused(self.fails_with, "cannot schedule new futures after shutdown")
            body = json.loads(await request.body())
            if not (body.get("logprobs") == 5 and body["ignore_eos"]):
                self.bodies.append(body)
            embeds, options = self._prompt(body), _options(body)
            if embeds.shape[1] + options.max_new_tokens > self.max_model_len:
                raise Refused(400, f"maximum context length is {self.max_model_len} tokens")
            if self.num_running + self.num_waiting >= self.max_inside:
                raise Refused(503, "Too many requests queued")
        except Refused as error:
            kind = {400: "BadRequestError", 503: "Service Unavailable"}.get(error.status, "Error")
            fields = {"message": str(error), "type": kind, "param": None, "code": error.status}
            return JSONResponse({"error": fields}, error.status)
        self.num_waiting += 1
        return StreamingResponse(
            self._stream(embeds, options, body), media_type="text/event-stream"
        )

    def _prompt(self, body: dict[str, Any]) -> Tensor:
        """Input of the first layer, [1, time, hidden]."""
        if body.get("prompt_embeds") is None:
            ids = body.get("prompt")
            if not ids or not all(type(id) is int for id in ids):
                raise Refused(400, "Either prompt or prompt_embeds must be provided")
            looked_up = self.language_model.get_input_embeddings()(torch.tensor([ids])).detach()
            return looked_up * self.multiplies_ids
        if not self.takes_embeds:
            raise Refused(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        data = base64.b64decode(body["prompt_embeds"], validate=True)
        embeds = torch.load(io.BytesIO(data), weights_only=True)
        width = self.language_model.config.hidden_size
        if embeds.dim() != 2 or not len(embeds) or not embeds.is_floating_point():
            raise Refused(400, f"`prompt_embeds` must be 2D and floating, got {embeds.shape}")
        if embeds.shape[1] != width:
            raise Refused(400, f"prompt_embeds hidden_size {embeds.shape[1]}, expected {width}")
        return embeds.to(self.language_model.dtype)[None] * self.multiplies

    async def _stream(
        self, embeds: Tensor, options: SamplingParams, body: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        is_waiting = True
        try:
            while not self._is_free.is_set() or self.num_running >= self.max_num_seqs:
                await asyncio.sleep(0.002)
            self.num_waiting, self.num_running = self.num_waiting - 1, self.num_running + 1
            is_waiting = False
            async for chunk in self._chunks(embeds, options, body):
                yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        finally:
            if is_waiting:
                self.num_waiting -= 1
            else:
                self.num_running -= 1

    @torch.no_grad()
    async def _chunks(
        self, embeds: Tensor, options: SamplingParams, body: dict[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        model, past = self.language_model, None
        generator = torch.Generator()
        if options.seed is not None:
            generator.manual_seed(options.seed)
        inputs = {"inputs_embeds": embeds}
        for number in range(options.max_new_tokens):
            if number == self.breaks_at:
                yield {"error": {"message": "EngineCore died", "type": "Error", "code": 500}}
                return
            with torch.no_grad():
                output = model(**inputs, past_key_values=past, use_cache=True)
            past, scores = output.past_key_values, output.logits[0, -1]
            greedy = options.temperature < 1e-5
            id = int(scores.argmax()) if greedy else sample(scores, options, generator)
            is_stop = id in body["stop_token_ids"]
            is_last = number + 1 == options.max_new_tokens
            choice: dict[str, Any] = {
                "index": 0,
                "text": "",
                "logprobs": _logprobs(scores, id, options.num_logprobs),
                "finish_reason": "stop" if is_stop else "length" if is_last else None,
                "stop_reason": id if is_stop else None,
                "token_ids": [id],
            }
            yield {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}
            if is_stop:
                return
            inputs = {"input_ids": torch.tensor([[id]])}
            await asyncio.sleep(0)


def _options(body: dict[str, Any]) -> SamplingParams:
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        assert name in body, f"vLLM would take {name} from the generation config"
    assert body["stream"] and body["return_token_ids"] and body["return_tokens_as_token_ids"]
    return SamplingParams(
        body["max_tokens"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        seed=body.get("seed"),
        num_logprobs=body.get("logprobs"),
        ignore_eos=body["ignore_eos"],
    )


def _logprobs(scores: Tensor, id: int, num_top: int | None) -> dict[str, Any] | None:
    if num_top is None:
        return None
    own = scores.float().log_softmax(-1)
    values, ids = own.topk(num_top)
    # the chosen token comes first, as in vLLM
    top = {f"token_id:{id}": float(own[id])}
    top |= {
        f"token_id:{other}": value
        for other, value in zip(ids.tolist(), values.tolist(), strict=True)
    }
    return {
        "text_offset": [0],
        "token_logprobs": [float(own[id])],
        "tokens": [f"token_id:{id}"],
        "top_logprobs": [top],
    }
