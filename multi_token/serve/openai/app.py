"""The routes: HTTP in, the service's answers out as JSON or as a stream of events.

Border: what a request means is schema.py's and parts.py's, what an answer looks like answers.py's;
here they meet the service, and clients that leave.
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
from multi_token.serve.engines.base import SupportsReplicas
from multi_token.serve.errors import ServeError
from multi_token.serve.openai.docs import REFERENCE, openapi_document, reference_page
from multi_token.serve.openai.middleware import RECORD, ClientGone, GuardMiddleware, RequestLog
from multi_token.serve.openai.options import RequestParams, request_params
from multi_token.serve.openai.output import RequestOutput
from multi_token.serve.openai.protocol import ChatRequest, parse_chat, parse_json
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
"""The longest answer of `/generate`, as the original had it."""
_SMALL_BODY_BYTES = 64 * 1024
"""Bodies up to this are parsed on the event loop; it takes less than handing them to a thread."""


def build_app(service: Service) -> FastAPI:
    """The application; its lifespan starts and stops the service."""
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
        """Answer a conversation, in OpenAI's form."""
        service.check_capacity()  # before a long body is parsed
        body = await _json_body(request)
        chat, ignored = await _parse_chat_request(body, service)
        _check_model(chat.model, service)
        record: RequestLog = request.scope[RECORD]
        conversation = await _in_thread_if_large(
            len(body), lambda: service.message_parser.parse_messages(chat.messages, id=record.id)
        )
        options = request_params(chat, service.settings)
        headers = {"x-multi-token-ignored": ", ".join(ignored)[:500]} if ignored else {}
        answering = _generation_context(request, service, conversation, options)
        builder = ResponseBuilder(f"chatcmpl-{record.id}", int(time.time()), service.settings.name)
        if not chat.stream:
            return await cancel_on_disconnect(
                request.receive, _complete_response(answering, builder, record, headers)
            )
        stack = AsyncExitStack()
        answer = await cancel_on_disconnect(
            request.receive, _first_token_or_error(service, answering, stack)
        )
        with_usage = chat.stream_options is not None and chat.stream_options.include_usage
        events = _sse_stream(answer, builder, record, with_usage=with_usage)
        return _EventStream(events, stack, headers)

    @app.post("/generate", tags=["answers"])
    async def generate(request: Request) -> Response:
        """Answer a row, in the form of sshh12/multi_token: `{"output": ...}`."""
        service.check_capacity()  # before a long body is parsed
        body = await _json_body(request)
        record: RequestLog = request.scope[RECORD]
        limit = service.settings.max_json_values
        conversation = await _in_thread_if_large(
            len(body),
            lambda: service.message_parser.parse_row(
                parse_json(body, max_values=limit), id=record.id
            ),
        )
        options = RequestParams(max_tokens=_GENERATE_MAX_TOKENS)
        answering = _generation_context(request, service, conversation, options)

        async def respond() -> Response:
            async with answering as answer:
                (completion,) = await answer.completions()
                record.fields |= answer.log_fields()
            return JSONResponse({"output": completion.text.strip()})

        return await cancel_on_disconnect(request.receive, respond())


def _add_status_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["model"])
    async def models() -> JSONResponse:
        """The one model that is served, and its senses."""
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{name:path}", tags=["model"])
    async def model(name: str) -> JSONResponse:
        """The same by its name."""
        _check_model(name, service)
        return JSONResponse(service.model_card())

    @app.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while the engine runs, else 503; needs no key."""
        is_well = service.is_healthy
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    @app.get("/ready", tags=["state"])
    async def ready() -> Response:
        """200 while new requests are taken, else 503."""
        is_ready = service.is_ready
        status = "ready" if is_ready else "draining" if service.admission.is_draining else "failed"
        return JSONResponse({"status": status}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        found = service.metrics
        return Response(found.render(), headers={"content-type": found.content_type})

    @app.get("/version", tags=["state"])
    async def version() -> JSONResponse:
        """The version of multi_token."""
        return JSONResponse({"version": __version__})


async def _json_body(request: Request) -> bytes:
    """The body of a request that says that it is JSON.

    A page of the web cannot send that type to another host without asking first, and it is told no.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServeError(
            "expected the header Content-Type: application/json",
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
            f"there is no model {name[:60]!r}; this server has {service.settings.name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _generation_context(
    request: Request, service: Service, conversation: Conversation, options: RequestParams
) -> AbstractAsyncContextManager[RequestOutput]:
    record: RequestLog = request.scope[RECORD]
    header = request.headers.get("x-request-timeout")
    deadline = Deadline.of(header, service.settings.deadline_s)
    return service.generate(
        conversation,
        options,
        request_id=record.id,
        tenant=record.tenant,
        deadline=deadline,
        arrived=record.started,
    )


async def _first_token_or_error(
    service: Service, answering: AbstractAsyncContextManager[RequestOutput], stack: AsyncExitStack
) -> RequestOutput:
    """An answer of which a stream can be made. Where engines elsewhere may still refuse it, it
    waits for their first word: a stream that has begun has no status of its own any more.
    """
    answer = await stack.enter_async_context(answering)
    if isinstance(service.engine, SupportsReplicas):
        try:
            await answer.first_event()
        except BaseException:
            await stack.aclose()
            raise
    return answer


async def _complete_response(
    answering: AbstractAsyncContextManager[RequestOutput],
    builder: ResponseBuilder,
    record: RequestLog,
    headers: dict[str, str],
) -> Response:
    async with answering as answer:
        completions = await answer.completions()
        choices = [
            completion_choice(i, completion.text, completion.finish, completion.logprobs)
            for i, completion in enumerate(completions)
        ]
        record.fields |= answer.log_fields()
        return JSONResponse(builder.completion(choices, answer.usage()), headers=headers)


async def _sse_stream(
    answer: RequestOutput, builder: ResponseBuilder, record: RequestLog, *, with_usage: bool
) -> AsyncIterator[bytes]:
    """OpenAI's order: each choice's role, its text, its end; the usage if asked for; [DONE]."""
    try:
        for index in range(answer.num_choices):
            delta = {"role": "assistant", "content": ""}
            yield sse_event(builder.chunk(index, delta, with_usage=with_usage))
        async for piece in answer.deltas():
            if piece.text or piece.logprobs is not None:
                chunk = builder.chunk(
                    piece.index,
                    {"content": piece.text},
                    logprobs=piece.logprobs,
                    with_usage=with_usage,
                )
                yield sse_event(chunk)
            if piece.finish is not None:
                yield sse_event(
                    builder.chunk(piece.index, {}, finish=piece.finish, with_usage=with_usage)
                )
        if with_usage:
            yield sse_event(builder.usage_chunk(answer.usage()))
    except ServeError as error:
        # the status has been sent: clients learn of it by an event, never by a silent end
        record.fields["code"] = error.code or error.type
        yield sse_event(error.as_json(record.id))
    except Exception as error:
        LOG.error("request %s failed", record.id, exc_info=error)
        record.fields["code"] = "internal_error"
        yield sse_event(ServeError("the server has a fault", status=500).as_json(record.id))
    finally:
        record.fields |= answer.log_fields()  # also of a client that leaves
    yield SSE_DONE


class _EventStream(StreamingResponse):
    """A stream of events that ends what stands behind it however it ends itself."""

    def __init__(
        self, events: AsyncIterator[bytes], stack: AsyncExitStack, headers: dict[str, str]
    ) -> None:
        super().__init__(events, media_type=_SSE, headers={"cache-control": "no-cache", **headers})
        self._stack = stack

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stack.aclose()


async def cancel_on_disconnect(
    receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]
) -> T:
    """The result of `work`, which is cancelled if the client leaves. Raises ClientGone then."""
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
    """Every error of ours, and those of routing, in OpenAI's form."""
    record: RequestLog = request.scope[RECORD]
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})  # which methods a route has
        is_missing = error.status_code == 404
        error = ServeError(
            # never of request.url, which is put together with what the Host header says
            "there is no such route" if is_missing else f"{error.detail}: {request.method}",
            status=error.status_code,
            code="no_such_route" if is_missing else None,
        )
    elif not isinstance(error, ServeError):
        # a fault of the request that another room found: its text may hold paths, so it is cleaned
        LOG.warning("request %s refused: %s", record.id, type(error).__name__)
        error = ServeError(str(error), param="messages")
    record.fields["code"] = error.code or error.type
    headers |= dict(error_headers(error))
    return Response(error_body(error, record.id), error.status, headers=headers)
