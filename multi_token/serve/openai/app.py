"""Routes of the OpenAI-compatible API: HTTP in, JSON or server-sent events (SSE) out.

    body -> `parse_chat` -> `MessageParser` -> `Service.submit` -> `RequestOutput` -> JSON | SSE

A client that disconnects cancels its request in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from multi_token import __version__
from multi_token.errors import MultiTokenError
from multi_token.serve.admission import Deadline
from multi_token.serve.chat_ui.routes import PUBLIC_PATHS, add_chat_routes
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.docs import REFERENCE, openapi_document, reference_page
from multi_token.serve.openai.middleware import RECORD, ClientGone, GuardMiddleware, RequestLog
from multi_token.serve.openai.output import RequestOutput
from multi_token.serve.openai.protocol import (
    ChatRequest,
    RequestParams,
    parse_chat,
    parse_json,
    request_params,
)
from multi_token.serve.openai.responses import (
    SSE_DONE,
    ResponseBuilder,
    completion_choice,
    error_body,
    error_headers,
    sse_event,
)
from multi_token.serve.service import Service
from multi_token.types import Conversation

T = TypeVar("T")
LOG = logging.getLogger("multi_token.serve")
_SSE = "text/event-stream; charset=utf-8"
_GENERATE_MAX_TOKENS = 128
"""`max_tokens` of `/generate`, as in sshh12/multi_token."""
_SMALL_BODY_BYTES = 64 * 1024
"""Bodies up to this size are parsed on the event loop: cheaper than the switch to a thread."""


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
        GuardMiddleware, settings=settings, on_end=service.count_request, public_paths=PUBLIC_PATHS
    )
    app.add_exception_handler(ServeError, _error_handler)
    app.add_exception_handler(MultiTokenError, _error_handler)
    app.add_exception_handler(HTTPException, _error_handler)
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
    @app.post("/v1/chat/completions", tags=["answers"])
    async def chat_completions(request: Request) -> Response:
        """Chat completion in OpenAI's format, as JSON or as a stream of events."""
        service.check_capacity()  # a full server refuses before it parses a large body
        body = await _json_body(request)
        chat, ignored = await _parse_chat_request(body, service)
        _check_model(chat.model, service)
        record: RequestLog = request.scope[RECORD]
        conversation = await _in_thread_if_large(
            len(body), lambda: service.message_parser.parse_messages(chat.messages, id=record.id)
        )
        params = request_params(chat, service.settings)
        headers = {"x-multi-token-ignored": ", ".join(ignored)[:500]} if ignored else {}
        running = _submit(request, service, conversation, params)
        builder = ResponseBuilder(f"chatcmpl-{record.id}", int(time.time()), service.settings.name)
        if not chat.stream:
            return await cancel_on_disconnect(
                request.receive, _complete_response(running, builder, record, headers)
            )
        stack = AsyncExitStack()
        output = await cancel_on_disconnect(
            request.receive, _first_token_or_error(service, running, stack)
        )
        with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = _sse_stream(output, builder, record, with_usage=with_usage)
        return _EventStream(events, stack, headers)

    @app.post("/generate", tags=["answers"])
    async def generate(request: Request) -> Response:
        """Completion in the format of sshh12/multi_token: `{"output": ...}`."""
        service.check_capacity()
        body = await _json_body(request)
        record: RequestLog = request.scope[RECORD]
        limit = service.settings.max_json_values
        conversation = await _in_thread_if_large(
            len(body),
            lambda: service.message_parser.parse_row(
                parse_json(body, max_values=limit), id=record.id
            ),
        )
        params = RequestParams(max_tokens=_GENERATE_MAX_TOKENS)
        running = _submit(request, service, conversation, params)

        async def respond() -> Response:
            async with running as output:
                (completion,) = await output.completions()
                record.fields |= output.log_fields()
            return JSONResponse({"output": completion.text.strip()})

        return await cancel_on_disconnect(request.receive, respond())


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


async def _json_body(request: Request) -> bytes:
    """Return the body of a request with `Content-Type: application/json`. Raises ServeError."""
    # A website's script may send text/plain to any host. For application/json the browser asks
    # first (CORS preflight), and this server does not allow it.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServeError(
            "the request needs the header Content-Type: application/json",
            status=415,
            code="unsupported_content_type",
        )
    return await request.body()


async def _parse_chat_request(body: bytes, service: Service) -> tuple[ChatRequest, tuple[str, ...]]:
    limit = service.settings.max_json_values
    return await _in_thread_if_large(
        len(body), lambda: parse_chat(parse_json(body, max_values=limit))
    )


async def _in_thread_if_large(num_bytes: int, work: Callable[[], T]) -> T:
    return work() if num_bytes <= _SMALL_BODY_BYTES else await asyncio.to_thread(work)


def _check_model(name: str | None, service: Service) -> None:
    if name is not None and name != service.settings.name:
        raise ServeError(
            f"unknown model {name[:60]!r}; this server has {service.settings.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _submit(
    request: Request, service: Service, conversation: Conversation, params: RequestParams
) -> AbstractAsyncContextManager[RequestOutput]:
    record: RequestLog = request.scope[RECORD]
    header = request.headers.get("x-request-timeout")
    deadline = Deadline.of(header, service.settings.deadline_s)
    return service.submit(
        conversation,
        params,
        request_id=record.id,
        tenant=record.tenant,
        deadline=deadline,
        arrived=record.started,
    )


async def _first_token_or_error(
    service: Service, running: AbstractAsyncContextManager[RequestOutput], stack: AsyncExitStack
) -> RequestOutput:
    """Start a request whose output is streamed, and enter it into `stack`. Raises ServeError."""
    output = await stack.enter_async_context(running)
    # Remote engines may refuse a prompt after it was submitted. Once a stream has begun, its status
    # is sent, so wait for the first token: an error before it still becomes a status.
    if service.engine.is_remote:
        try:
            await output.first_event()
        except BaseException:
            await stack.aclose()
            raise
    return output


async def _complete_response(
    running: AbstractAsyncContextManager[RequestOutput],
    builder: ResponseBuilder,
    record: RequestLog,
    headers: dict[str, str],
) -> Response:
    async with running as output:
        completions = await output.completions()
        choices = [
            completion_choice(i, completion.text, completion.finish, completion.logprobs)
            for i, completion in enumerate(completions)
        ]
        record.fields |= output.log_fields()
        return JSONResponse(builder.completion(choices, output.usage()), headers=headers)


async def _sse_stream(
    output: RequestOutput, builder: ResponseBuilder, record: RequestLog, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """Events in OpenAI's order: role, text and finish of each choice, usage, [DONE]."""
    try:
        for index in range(output.num_choices):
            role_delta = {"role": "assistant", "content": ""}
            yield sse_event(builder.chunk(index, role_delta, with_usage=with_usage))
        async for delta in output.deltas():
            if delta.text or delta.logprobs is not None:
                chunk = builder.chunk(
                    delta.index,
                    {"content": delta.text},
                    logprobs=delta.logprobs,
                    with_usage=with_usage,
                )
                yield sse_event(chunk)
            if delta.finish is not None:
                yield sse_event(
                    builder.chunk(delta.index, {}, finish=delta.finish, with_usage=with_usage)
                )
        if with_usage:
            yield sse_event(builder.usage_chunk(output.usage()))
    # Status 200 has been sent, so an error becomes an event: the stream must not just end.
    except ServeError as error:
        record.fields["code"] = error.code or error.type
        yield sse_event(error.as_json(record.id))
    # A bug of ours: the log has the traceback, the client an error without details.
    except Exception as error:
        LOG.error("request %s failed", record.id, exc_info=error)
        record.fields["code"] = "internal_error"
        yield sse_event(ServeError("internal server error", status=500).as_json(record.id))
    finally:
        # In `finally`: a client that disconnects closes this generator at a `yield`.
        record.fields |= output.log_fields()
    yield SSE_DONE


class _EventStream(StreamingResponse):
    """Stream of events that closes its request however the stream ends."""

    def __init__(
        self, events: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type=_SSE, headers={"cache-control": "no-cache", **headers})
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Starlette does not close its iterator when the client disconnects; the request inside
        # `stack` would go on generating.
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def cancel_on_disconnect(
    receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]
) -> T:
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


async def _error_handler(request: Request, error: Exception) -> Response:
    """Turn errors of this package and of routing into OpenAI's error object."""
    record: RequestLog = request.scope[RECORD]
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})  # Allow: the methods of the route
        is_missing = error.status_code == 404
        error = ServeError(
            # Not request.url: it contains the Host header, which the client writes.
            "unknown route" if is_missing else f"{error.detail}: {request.method}",
            status=error.status_code,
            code="unknown_route" if is_missing else None,
        )
    elif not isinstance(error, ServeError):
        # Modalities and chat templates raise MultiTokenError, whose text may contain paths:
        # ServeError removes them.
        LOG.warning("request %s refused: %s", record.id, type(error).__name__)
        error = ServeError(str(error), param="messages")
    record.fields["code"] = error.code or error.type
    headers |= dict(error_headers(error))
    return Response(error_body(error, record.id), error.status, headers=headers)
