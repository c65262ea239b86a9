"""The chat page: its files, what it must know of the run, examples, and the training's report.

Border: routes under `/` and `/page`; an answer is asked for as any client does. Nothing that a
request says names a file: examples go by their number.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.errors import MultiTokenError
from multi_token.media.fetch import MIB, Fetch
from multi_token.media.sniff import sniff_kind
from multi_token.modalities.base import Modality
from multi_token.recipe.recipe import Recipe, load_recipe
from multi_token.report import style
from multi_token.serve.errors import ServeError
from multi_token.serve.row_parts import bytes_of, question_of
from multi_token.types import Conversation, Media, Message, Text

if TYPE_CHECKING:
    from multi_token.serve.service import Service

PUBLIC_PATHS = frozenset({"/", "/page/page.css", "/page/page.js", "/page/report"})
"""What a browser asks for before anybody has typed a key; the report has a ticket in its place."""
LOG = logging.getLogger("multi_token.serve")

MAX_EXAMPLES = 6
_MAX_ROWS_SCANNED = 32
_MAX_ITEM_BYTES = 4 * MIB
_MAX_ITEMS_BYTES = 32 * MIB
_MAX_JSON_BYTES = 64 * MIB
"""A larger list of rows would have to be parsed whole for the sake of six."""
_CHARS_PER_SAVED_BYTE = ("dataset_dict.json", "state.json")
"""What a folder has that `datasets` has saved."""
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


@dataclass(frozen=True)
class Examples:
    """Rows of a run's data that are still there, as the page shows them, and their items' bytes."""

    rows: Sequence[dict[str, Any]] = ()
    items: Sequence[bytes] = field(default=(), repr=False)

    @functools.cached_property
    def system(self) -> str | None:
        """The system message that all of them have, if they do."""
        load_examples = {row["system"] for row in self.rows}
        return load_examples.pop() if len(load_examples) == 1 else None


def add_chat_routes(app: FastAPI, service: Service) -> None:
    """The page's routes. They are not in the description of the API."""
    settings = service.settings
    folder = settings.run_folder
    report = None if folder is None else folder / "report.html"
    secret = secrets.token_bytes(32)
    looking: asyncio.Task[tuple[list[dict[str, Any]], Examples]] | None = None

    def look() -> tuple[list[dict[str, Any]], Examples]:
        senses = [
            {
                "name": name,
                "type": modality.type,
                "takes": [dataclasses.asdict(kind) for kind in modality.file_kinds()],
            }
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


def read_examples(folder: Path | None, modalities: Mapping[str, Modality]) -> Examples:
    """At most six rows of the run's own data, held-out ones first, whose items can be read.

    Only files of this machine: a name on the hub is not asked for. What cannot be read is left out.
    """
    if folder is None or not (folder / "recipe.yaml").is_file():
        return Examples()
    try:
        recipe = load_recipe(folder / "recipe.yaml")
    except MultiTokenError as error:
        LOG.warning("no examples on the page: %s", error)
        return Examples()
    rows: list[dict[str, Any]] = []
    items: list[bytes] = []
    seen: set[str] = set()
    for conversation, fetch, is_held_out in _example_candidates(recipe, modalities):
        messages, answer = question_of(conversation)
        try:
            row, own = _build_example(messages, answer, modalities, fetch, first=len(items))
        except (MultiTokenError, OSError):
            continue
        if row is None or (look := _appearance(row)) in seen:
            continue
        if sum(map(len, (*items, *own))) > _MAX_ITEMS_BYTES:
            continue
        seen.add(look)
        rows.append({**row, "held_out": is_held_out})
        items += own
        if len(rows) == MAX_EXAMPLES:
            break
    return Examples(rows, items)


def _example_candidates(
    recipe: Recipe, modalities: Mapping[str, Modality]
) -> Iterator[tuple[Conversation, Fetch, bool]]:
    """Rows of all sources in turn, and whether they were held out: one of each, then the next."""
    sources = [
        (_conversations_of(source.rows, source.split, modalities), is_held_out)
        for is_held_out, named in ((True, recipe.data.eval), (False, recipe.data.train))
        for source in named
    ]
    while sources:
        for source in list(sources):
            rows, is_held_out = source
            row = next(rows, None)
            if row is None:
                sources.remove(source)
            else:
                yield *row, is_held_out


def _conversations_of(
    source: str, split: str, modalities: Mapping[str, Modality]
) -> Iterator[tuple[Conversation, Fetch]]:
    """Up to 32 conversations of a source, spread over it."""
    if not _is_indexable(Path(source).expanduser()):
        return
    try:
        rows = load_rows(source, split=split)
        fetch = Fetch(root=media_root(source), max_bytes=_MAX_ITEM_BYTES, allow_urls=False)
    except (MultiTokenError, OSError, ValueError) as error:
        LOG.warning("no examples of %s: %s", source, error)
        return
    num = min(_MAX_ROWS_SCANNED, len(rows))
    for i in range(num):
        try:
            index = i * len(rows) // num
            yield to_conversation(rows[index], list(modalities), row_id=str(index)), fetch
        except MultiTokenError:
            continue


def _is_indexable(path: Path) -> bool:
    """Whether rows can be read by their number: they are here, and not in shards to be unpacked."""
    if path.is_dir():
        return any((path / name).is_file() for name in _CHARS_PER_SAVED_BYTE)
    if path.suffix.lower() == ".json":
        return path.is_file() and path.stat().st_size <= _MAX_JSON_BYTES
    return path.is_file() and path.suffix.lower() in (".jsonl", ".parquet")


def _build_example(
    messages: Sequence[Message],
    answer: str,
    modalities: Mapping[str, Modality],
    fetch: Fetch,
    *,
    first: int,
) -> tuple[dict[str, Any] | None, list[bytes]]:
    """A row with one question, and its items, numbered from `first`; None for other rows."""
    systems = [m for m in messages if m.role == "system"]
    users = [m for m in messages if m.role == "user"]
    if len(users) != 1 or len(systems) > 1 or len(messages) != len(systems) + 1:
        return None, []
    parts: list[dict[str, Any]] = []
    items: list[bytes] = []
    for part in users[0].parts:
        if isinstance(part, Text):
            parts.append({"text": part.text})
            continue
        assert isinstance(part, Media)
        is_text = modalities[part.modality].named_file(part.source) is None
        data = bytes_of(part.source, fetch, is_text=is_text)
        number = first + len(items)
        parts.append({"modality": part.modality, "item": number, "shown": _browser_kind(data)})
        items.append(data)
    system = _text_of(systems[0]) if systems else None
    return {"system": system, "parts": parts, "answer": answer[:200]}, items


def _text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, Text))


def _appearance(row: Mapping[str, Any]) -> str:
    """What a person sees of a card: two that look the same say nothing new."""
    words = "".join(part.get("text", "<>") for part in row["parts"])
    return f"{words} -> {row['answer']}"


def _browser_kind(data: bytes) -> str:
    """How a browser shows an item: its kind, or `file`."""
    try:
        kind = sniff_kind(data)
    except MultiTokenError:
        return "file"
    return "file" if kind == "text" else kind


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
