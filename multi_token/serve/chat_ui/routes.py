"""Routes of the chat page: its files, facts about the run, examples and the training report.

The page sends chat requests as any other client does. No request names a file: examples are
addressed by their number.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from multi_token.media.fetch import MIB
from multi_token.modalities.base import Modality
from multi_token.modalities.joint import methods
from multi_token.report import style
from multi_token.serve.chat_ui.examples import Examples, read_examples
from multi_token.serve.errors import ServeError

if TYPE_CHECKING:
    from multi_token.serve.service import Service

PUBLIC_PATHS = frozenset({"/", "/page/page.css", "/page/page.js", "/page/report"})
"""Paths that need no API key: the browser loads them before a key was typed. The report is opened
with a ticket instead."""
LOG = logging.getLogger("multi_token.serve")

_NUMBERS = (".npy", ".json", ".csv", ".txt")
FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "image": (
        "pictures",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    ),
    "audio": (
        "sounds",
        (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".webm"),
    ),
    "video": ("films", (".mp4", ".webm", ".mov", ".mkv", ".avi", ".mpeg", ".mpg")),
    "document": ("documents", (".pdf", ".txt", ".md", ".html", ".htm")),
    "text": ("texts", (".txt", ".md")),
    "vector": ("lists of numbers", _NUMBERS),
    "series": ("series of numbers", _NUMBERS),
}
"""Kind of thing -> what people call it, and how names of such files end."""
FILE_KINDS_OF_TYPE: Mapping[str, tuple[str, ...]] = {
    "image": ("image",),
    "speech": ("audio",),
    "sound": ("audio",),
    "video": ("video",),
    "document": ("document",),
    "vector": ("vector",),
    "timeseries": ("series",),
}
"""Type of a sense -> what it takes; any file goes to a type that is not here (of a plug-in)."""

_MAX_REPORT_BYTES = 64 * MIB
_TICKET_TTL_S = 12 * 3600.0
_HTML = "text/html; charset=utf-8"

_COMMON_HEADERS = {"referrer-policy": "no-referrer", "cross-origin-resource-policy": "same-origin"}
_PAGE_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "permissions-policy": "microphone=(self), camera=(), geolocation=()",
    "cache-control": "no-cache",
}
_REPORT_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
    ),
    "cache-control": "no-store",
}
_ITEM_HEADERS = {
    **_COMMON_HEADERS,
    "content-security-policy": "default-src 'none'; sandbox",
    "cache-control": "no-store",
}


def add_chat_routes(app: FastAPI, service: Service) -> None:
    """Add the page's routes, which the OpenAPI document leaves out."""
    settings = service.settings
    folder = settings.run_folder
    report = None if folder is None else folder / "report.html"
    secret = secrets.token_bytes(32)
    looking: asyncio.Task[tuple[list[dict[str, Any]], Examples]] | None = None

    def look() -> tuple[list[dict[str, Any]], Examples]:
        senses = [
            {"name": name, "type": modality.type, "takes": accepted_kinds(modality)}
            for name, modality in service.modalities.items()
        ]
        if not settings.show_examples:
            return senses, Examples()
        try:
            return senses, read_examples(folder, service.modalities)
        except Exception as error:  # somebody's old rows do not keep the page from being used
            LOG.error("no examples on the page", exc_info=error)
            return senses, Examples()

    async def load_examples() -> tuple[list[dict[str, Any]], Examples]:
        """Looked for once, when the first page asks; a client that leaves does not end it."""
        nonlocal looking
        if looking is None:
            looking = asyncio.create_task(asyncio.to_thread(look))
        return await asyncio.shield(looking)

    def static(path: str, content: str, kind: str) -> None:
        async def answered() -> Response:
            return Response(content, media_type=kind, headers=_PAGE_HEADERS)

        app.get(path, include_in_schema=False)(answered)

    static("/", _page_file("index.html"), _HTML)
    static("/page/page.css", style() + _page_file("page.css"), "text/css; charset=utf-8")
    static("/page/page.js", _page_file("page.js"), "text/javascript; charset=utf-8")

    @app.get("/page/facts", include_in_schema=False)
    async def facts() -> JSONResponse:
        senses, examples = await load_examples()
        has_report = report is not None and report.is_file()
        described = {
            "name": settings.name,
            "senses": senses,
            "examples": list(examples.rows),
            "system": examples.system,
            "report": f"page/report?ticket={_ticket(secret)}" if has_report else None,
            "max_body_bytes": settings.max_body_bytes,
            "max_media": settings.max_media,
            "default_max_tokens": settings.default_max_tokens,
        }
        return JSONResponse(described, headers={"cache-control": "no-store"})

    @app.get("/page/examples/{item:int}", include_in_schema=False)
    async def example(item: int) -> Response:
        _, examples = await load_examples()
        if item >= len(examples.items):
            raise ServeError("there is no such example", status=404, code="no_such_example")
        content = examples.items[item]
        return Response(content, media_type="application/octet-stream", headers=_ITEM_HEADERS)

    @app.get("/page/report", include_in_schema=False)
    async def training_report(ticket: str = "") -> Response:
        if not _is_valid(ticket, secret):
            raise ServeError(
                "the report is opened by its link on the chat page; load that page anew",
                status=401,
                code="invalid_ticket",
            )
        content = await asyncio.to_thread(_read_report, report)
        if content is None:
            raise ServeError("this run has no report", status=404, code="no_report")
        return Response(content, media_type=_HTML, headers=_REPORT_HEADERS)


def accepted_kinds(modality: Modality) -> list[dict[str, Any]]:
    """The kinds of files that a sense takes; none stands for any file."""
    if modality.type == "joint":
        joint: Any = modality
        kinds = tuple(methods(joint.encoder, joint.revision))
    else:
        kinds = FILE_KINDS_OF_TYPE.get(modality.type, ())
    return [
        {
            "kind": "numbers" if kind in ("vector", "series") else kind,
            "noun": FILES[kind][0],
            "suffixes": list(FILES[kind][1]),
        }
        for kind in kinds
    ]


def _ticket(secret: bytes) -> str:
    """Opens the report for twelve hours: a link cannot carry a key."""
    until = str(int(time.time() + _TICKET_TTL_S))
    return f"{until}.{_signature(secret, until)}"


def _is_valid(ticket: str, secret: bytes) -> bool:
    until, _, signature = ticket.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 12):
        return False
    is_ours = hmac.compare_digest(signature.encode(), _signature(secret, until).encode())
    return is_ours and int(until) > time.time()


def _signature(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _read_report(report: Path | None) -> bytes | None:
    if report is None or not report.is_file() or report.stat().st_size > _MAX_REPORT_BYTES:
        return None
    return report.read_bytes()


def _page_file(name: str) -> str:
    return Path(__file__).with_name("page").joinpath(name).read_text(encoding="utf-8")
