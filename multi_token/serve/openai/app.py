"""Routes of the OpenAI-compatible API: HTTP in, JSON or server-sent events (SSE) out.

    body -> `parse_chat` -> `MessageParser` -> `Service.submit` -> `RequestOutput` -> JSON | SSE

A client that disconnects cancels its request in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from multi_token import __version__
from multi_token.serve.admission import Deadline
from multi_token.serve.chat_ui.routes import PUBLIC_PATHS, add_chat_routes
from multi_token.serve.errors import ServeError
from multi_token.serve.media.memory import RequestMemory, parse_bytes, source_bytes
from multi_token.serve.openai.docs import REFERENCE, openapi_document, reference_page
from multi_token.serve.openai.middleware import (
    MEMORY,
    RECORD,
    SMALL_BODY_BYTES,
    ClientGone,
    GuardMiddleware,
    RequestLog,
)
from multi_token.serve.openai.output import RequestOutput
from multi_token.serve.openai.protocol import (
    RequestParams,
    parse_chat,
    parse_json,
    request_params,
)
from multi_token.serve.openai.responses import (
    SSE_DONE,
    Completion,
    ResponseBuilder,
    error_body,
    error_headers,
    sse_event,
)
from multi_token.serve.service import Service
from multi_token.types import Conversation

T = TypeVar("T")
_SSE = "text/event-stream; charset=utf-8"


class _ParsedChat(NamedTuple):
    conversation: Conversation
    params: RequestParams
    ignored: tuple[str, ...]
    is_stream: bool
    with_usage: bool


def build_app(service: Service) -> FastAPI:
    """Build the ASGI application; its lifespan starts and stops the service."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="multi_token",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        # A server that other machines can reach does not describe its routes.
        openapi_url="/openapi.json" if settings.is_local else None,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(
        GuardMiddleware,
        settings=settings,
        memory=service.prompts.media_memory,
        on_end=service.count_request,
        public_paths=PUBLIC_PATHS,
    )
    app.add_exception_handler(HTTPException, _routing_error)
    _add_generation_routes(app, service)
    _add_status_routes(app, service)
    add_chat_routes(app, service)
    if settings.is_local:
        app.openapi = lambda: openapi_document(app)  # type: ignore[method-assign]

        @app.get(REFERENCE, include_in_schema=False)
        async def reference() -> HTMLResponse:
            return HTMLResponse(reference_page(app.openapi()))

    return app


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/chat/completions", tags=["answers"])
    async def chat_completions(request: Request) -> Response:
        """Chat completion in OpenAI's format, as JSON or as a stream of events."""
        record: RequestLog = request.scope[RECORD]
        # A full server refuses before it parses a large body.
        service.check_capacity(tenant=record.tenant)
        deadline = _deadline_of(request, service)

        def parse(body: bytes | bytearray) -> _ParsedChat:
            chat, ignored = parse_chat(parse_json(body, max_values=settings.max_json_values))
            _check_model(chat.model, service)
            messages = service.message_parser.parse_messages(chat.messages, id=record.id)
            options = chat.stream_options
            params = request_params(chat, settings)
            kwargs, unknown = service.prompts.check_kwargs(params.chat_template_kwargs)
            return _ParsedChat(
                messages,
                replace(params, chat_template_kwargs=kwargs),
                (*ignored, *(f"chat_template_kwargs.{name}" for name in unknown)),
                bool(chat.stream),
                options is not None and options.include_usage,
            )

        conversation, params, ignored, is_stream, with_usage = await _parse_body(
            request, service, deadline, parse, lambda parsed: parsed.conversation
        )
        running = _submit(request, service, deadline, conversation, params)
        # Not kept while the request generates: its media may have megabytes.
        del conversation
        builder = ResponseBuilder(
            f"chatcmpl-{record.id}", int(time.time()), settings.name, with_usage=with_usage
        )
        headers = {"x-multi-token-ignored": ", ".join(ignored)[:500]} if ignored else {}
        if not is_stream:
            completions, usage = await _complete(request, running)
            return JSONResponse(builder.completion(completions, usage), headers=headers)
        # Remote engines may refuse a prompt after `submit`: wait for their first token.
        wait = service.engine.is_remote
        events = _sse_stream(running, builder, record, wait_for_token=wait)
        await cancel_on_disconnect(request.receive, anext(events))
        return _EventStream(events, headers)

    @app.post("/generate", tags=["answers"])
    async def generate(request: Request) -> Response:
        """Completion in the format of sshh12/multi_token: `{"output": ...}`."""
        service.check_capacity(tenant=request.scope[RECORD].tenant)
        deadline = _deadline_of(request, service)

        def parse(body: bytes | bytearray) -> Conversation:
            fields = parse_json(body, max_values=settings.max_json_values)
            return service.message_parser.parse_row(fields, id=request.scope[RECORD].id)

        conversation = await _parse_body(request, service, deadline, parse, lambda parsed: parsed)
        # As many tokens as sshh12/multi_token generates.
        running = _submit(request, service, deadline, conversation, RequestParams(max_tokens=128))
        del conversation
        (completion,), _ = await _complete(request, running)
        return JSONResponse({"output": completion.text.strip()})


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["model"])
    async def models() -> JSONResponse:
        """The served model and its modalities."""
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}", tags=["model"])
    async def model(name: str) -> JSONResponse:
        """The served model by its name."""
        _check_model(name, service)
        return JSONResponse(service.model_card())

    @app.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while the engine runs, else 503. Needs no API key."""
        is_well = service.is_healthy
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    @app.get("/ready", tags=["state"])
    async def ready() -> Response:
        """200 while the server accepts requests, else 503."""
        is_ready = service.is_ready
        status = "ready" if is_ready else "draining" if service.admission.is_draining else "failed"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        content = service.metrics.render()
        return Response(content, headers={"content-type": service.metrics.content_type})

    @app.get("/version", tags=["state"])
    async def version() -> JSONResponse:
        """The version of multi_token."""
        return JSONResponse({"version": __version__})


async def _parse_body(
    request: Request,
    service: Service,
    deadline: Deadline,
    parse: Callable[[bytes | bytearray], T],
    conversation_of: Callable[[T], Conversation],
) -> T:
    """Parse a body of `Content-Type: application/json`; a large one in a thread.

    A large one waits for memory first. The body is dropped, and the request keeps the memory of its
    media only.
    """
    # A website's script may send text/plain to any host. For application/json the browser asks
    # first (CORS preflight), and this server does not allow it.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServeError(
            "the request needs the header Content-Type: application/json",
            status=415,
            code="unsupported_content_type",
        )
    # Not `request.body()`, which keeps the body as long as the request.
    (body, *_) = [chunk async for chunk in request.stream()]
    if len(body) <= SMALL_BODY_BYTES:
        return parse(body)
    memory: RequestMemory = request.scope[MEMORY]
    num_bytes = parse_bytes(len(body), service.settings.max_json_values)
    waiting = memory.wait_for(memory.parse, num_bytes, service.settings.memory_wait_s)
    await cancel_on_disconnect(request.receive, deadline.wait_for(waiting))

    def parse_and_measure(body: bytes | bytearray) -> tuple[T, int]:
        parsed = parse(body)
        return parsed, source_bytes(conversation_of(parsed))

    parsed, num_bytes = await asyncio.to_thread(parse_and_measure, body)
    del body
    memory.keep(num_bytes)
    return parsed


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.settings.name:
        raise ServeError(
            f"unknown model {name[:60]!r}; this server has {service.settings.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _deadline_of(request: Request, service: Service) -> Deadline:
    """Return the deadline of a request that begins now. Raises ServeError."""
    return Deadline.of(request.headers.get("x-request-timeout"), service.settings.deadline_s)


def _submit(
    request: Request,
    service: Service,
    deadline: Deadline,
    conversation: Conversation,
    params: RequestParams,
) -> AbstractAsyncContextManager[RequestOutput]:
    record: RequestLog = request.scope[RECORD]
    return service.submit(
        conversation,
        params,
        request_id=record.id,
        tenant=record.tenant,
        deadline=deadline,
        arrived=record.started,
        memory=request.scope[MEMORY],
    )


async def _complete(
    request: Request, running: AbstractAsyncContextManager[RequestOutput]
) -> tuple[list[Completion], dict[str, Any]]:
    """Wait for all choices; returns them and OpenAI's `usage`."""

    async def run() -> tuple[list[Completion], dict[str, Any]]:
        async with running as output:
            completions = await output.completions()
            request.scope[RECORD].fields |= output.log_fields()
            return completions, output.usage()

    return await cancel_on_disconnect(request.receive, run())


async def _sse_stream(
    running: AbstractAsyncContextManager[RequestOutput],
    builder: ResponseBuilder,
    record: RequestLog,
    *,
    wait_for_token: bool,
) -> AsyncGenerator[bytes, None]:
    """Yield b"" once the request runs, then OpenAI's events: role, text, finish, usage, [DONE]."""
    async with running as output:
        if wait_for_token:
            await output.first_event()
        try:
            # The route takes this item before it sends status 200, so an error up to here still
            # becomes a status.
            yield b""
            for index in range(output.num_choices):
                role_delta = {"role": "assistant", "content": ""}
                yield sse_event(builder.chunk(index, role_delta))
            async for delta in output.deltas():
                if delta.text or delta.logprobs is not None:
                    content = {"content": delta.text}
                    yield sse_event(builder.chunk(delta.index, content, logprobs=delta.logprobs))
                if delta.finish is not None:
                    yield sse_event(builder.chunk(delta.index, {}, finish=delta.finish))
            if builder.with_usage:
                yield sse_event(builder.usage_chunk(output.usage()))
        # Status 200 has been sent, so an error becomes an event: the stream must not just end.
        except Exception as error:  # noqa: BLE001
            yield sse_event(record.refuse(error).as_json(record.id))
        finally:
            # In `finally`: a client that disconnects closes this generator at a `yield`.
            record.fields |= output.log_fields()
        yield SSE_DONE


class _EventStream(StreamingResponse):
    """Stream of events that closes its generator, and so its request, however the stream ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(events, media_type=_SSE, headers={"cache-control": "no-cache", **headers})
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Starlette does not close its iterator when the client disconnects; the request would go on
        # generating.
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def cancel_on_disconnect(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T:
    """Return the result of `work`. If the client disconnects: cancel it and raise ClientGone."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_for_disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _routing_error(request: Request, error: Exception) -> Response:
    """Turn the router's 404 and 405 into OpenAI's error object."""
    assert isinstance(error, HTTPException)
    record: RequestLog = request.scope[RECORD]
    is_missing = error.status_code == 404
    refused = record.refuse(
        ServeError(
            # Not request.url: it contains the Host header, which the client writes.
            "unknown route" if is_missing else f"{error.detail}: {request.method}",
            status=error.status_code,
            code="unknown_route" if is_missing else None,
        )
    )
    # The router's headers: `Allow` with the methods of the route.
    headers = {**(error.headers or {}), **dict(error_headers(refused))}
    return Response(error_body(refused, record.id), refused.status, headers=headers)
