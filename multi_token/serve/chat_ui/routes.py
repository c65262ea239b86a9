"""Routes of the chat page: its files, facts about the run, examples and the training report.

The page sends chat requests as any other client does. No request names a file: examples are
addressed by their number.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import logging
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from multi_token.media.fetch import MIB
from multi_token.report.html import style
from multi_token.serve.chat_ui.examples import Examples, read_examples
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.serve.service import Service

PUBLIC_PATHS = frozenset({"/", "/page/page.css", "/page/page.js", "/page/report"})
"""Paths that need no API key: the browser loads them before a key was typed. The report is opened
with a ticket instead."""
LOG = logging.getLogger("multi_token.serve")

_MAX_REPORT_BYTES = 64 * MIB
_TICKET_TTL_S = 12 * 3600.0
_HTML = "text/html; charset=utf-8"

_COMMON_HEADERS = {"referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin"}
# The page inserts what clients and models write; should any of it become HTML, no script runs.
_PAGE_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cache-control": "no-cache",
}
# The report contains rows of the data set. `sandbox` gives it an origin of its own, so it could not
# read the page's key.
_REPORT_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
    ),
    "cache-control": "no-store",
}
# Items are files of the data set, served as bytes: a browser must not open one as a page.
_ITEM_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "no-store",
}


def add_chat_routes(app: FastAPI, service: Service) -> None:
    """Add the page's routes, which the OpenAPI document leaves out."""
    settings = service.settings
    # Rows may be private (patients, customers), and every client of the page would see them. The
    # report has samples of them too.
    folder = settings.run_folder if settings.show_examples else None
    report = None if folder is None else folder / "report.html"
    secret = secrets.token_bytes(32)
    modalities = [
        {
            "name": name,
            "type": modality.type,
            "takes": [dataclasses.asdict(kind) for kind in modality.file_kinds()],
        }
        for name, modality in service.prompts.modalities.items()
    ]
    loading: asyncio.Task[Examples] | None = None

    def load() -> Examples:
        try:
            return read_examples(folder, service.prompts.modalities)
        # Data moves and changes after a run; whatever it raises, the page works without examples.
        except Exception as error:
            LOG.error("the chat page has no examples", exc_info=error)
            return Examples()

    async def load_once() -> Examples:
        """Load the examples at the page's first request."""
        nonlocal loading
        if loading is None:
            loading = asyncio.create_task(asyncio.to_thread(load))
        # shield: the task is shared, and the first client may disconnect.
        return await asyncio.shield(loading)

    def static(path: str, content: str, kind: str) -> None:
        async def respond() -> Response:
            return Response(content, media_type=kind, headers=_PAGE_HEADERS)

        app.get(path, include_in_schema=False)(respond)

    static("/", _page_file("index.html"), _HTML)
    static("/page/page.css", style() + _page_file("page.css"), "text/css; charset=utf-8")
    static("/page/page.js", _page_file("page.js"), "text/javascript; charset=utf-8")

    @app.get("/page/facts", include_in_schema=False)
    async def facts() -> JSONResponse:
        examples = await load_once()
        systems = {row["system"] for row in examples.rows}
        has_report = report is not None and report.is_file()
        described = {
            "name": settings.name,
            "modalities": modalities,
            "examples": list(examples.rows),
            # The page fills in a system message only where all examples have the same one.
            "system": systems.pop() if len(systems) == 1 else None,
            "report": f"page/report?ticket={_ticket(secret)}" if has_report else None,
            "max_body_bytes": settings.max_body_bytes,
            "max_media": settings.max_media,
            "default_max_tokens": settings.default_max_tokens,
        }
        return JSONResponse(described, headers={"cache-control": "no-store"})

    @app.get("/page/examples/{item:int}", include_in_schema=False)
    async def example(item: int) -> Response:
        examples = await load_once()
        if item >= len(examples.items):
            raise ServeError("unknown example", status=404, code="unknown_example")
        content = examples.items[item]
        return Response(content, media_type="application/octet-stream", headers=_ITEM_HEADERS)

    @app.get("/page/report", include_in_schema=False)
    async def training_report(ticket: str = "") -> Response:
        if not _is_valid(ticket, secret):
            raise ServeError(
                "the link to the report has expired; reload the chat page and open it from there",
                status=401,
                code="invalid_ticket",
            )
        if report is None or not report.is_file() or report.stat().st_size > _MAX_REPORT_BYTES:
            raise ServeError("this run has no report", status=404, code="no_report")
        content = await asyncio.to_thread(report.read_bytes)
        return Response(content, media_type=_HTML, headers=_REPORT_HEADERS)


def _ticket(secret: bytes) -> str:
    """Return a signed ticket that opens the report for twelve hours."""
    # A link cannot send the Authorization header, and a key in a URL would end up in histories.
    until = str(int(time.time() + _TICKET_TTL_S))
    return f"{until}.{_signature(secret, until)}"


def _is_valid(ticket: str, secret: bytes) -> bool:
    # The length is bounded before int(), which takes quadratic time for long strings.
    until, _, signature = ticket.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 12):
        return False
    is_ours = hmac.compare_digest(signature.encode(), _signature(secret, until).encode())
    return is_ours and int(until) > time.time()


def _signature(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _page_file(name: str) -> str:
    return Path(__file__).with_name("page").joinpath(name).read_text(encoding="utf-8")
