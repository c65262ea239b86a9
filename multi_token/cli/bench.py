"""`multi-token bench`: what a running server takes, measured by many clients at once.

Border: options in, a table and JSON out; the asking is serve/bench.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from multi_token.serve.bench import Load, Measured

KEY_VARIABLE = "MULTI_TOKEN_API_KEY"

bench_app = typer.Typer(
    name="bench", help="Measure what has been trained at work.", no_args_is_help=True
)


@bench_app.callback()
def _bench() -> None:
    """Measure what has been trained at work."""


@bench_app.command("serve")
def serve_command(
    url: str = typer.Argument(..., help="Of the server: http://127.0.0.1:8000"),
    clients: str = typer.Option("1,8,32", help="Clients at once; several numbers are tried."),
    requests: int = typer.Option(None, min=1, help="For each number; default: 4 a client, >= 16."),
    rows: str = typer.Option(None, help="Ask what these rows ask; default: made-up text."),
    media: list[str] = typer.Option(None, help="NAME=FILE: an item in every made-up question."),
    words: int = typer.Option(32, min=1, help="Words in a made-up question."),
    max_tokens: int = typer.Option(64, min=1, help="Longest answer, in tokens."),
    ignore_eos: bool = typer.Option(False, help="Answers of exactly --max-tokens tokens."),
    api_key: str = typer.Option(None, help=f"The server's key; default: ${KEY_VARIABLE}."),
    timeout: float = typer.Option(300.0, min=0.1, help="The longest that one request may take."),
    out: Path = typer.Option(None, help="Write the figures as JSON."),
) -> None:
    """Time to the first token, between tokens, throughput and errors of a running server."""
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from multi_token.errors import MultiTokenError
    from multi_token.serve.bench import Load, measure, served_model

    numbers = _numbers(clients)
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    model = served_model(url, key)
    per_number = {number: requests or max(16, 4 * number) for number in numbers}
    prompts = _prompts(rows, media, words, model, most=max(per_number.values()))
    load = Load(url, model["id"], prompts, max_tokens, ignore_eos, key, timeout)
    console = Console(stderr=True)
    measured: list[Measured] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        for number in numbers:
            label = f"{number} client{'s' if number > 1 else ''}"
            task = progress.add_task(label, total=per_number[number])
            work = measure(load, number, per_number[number], lambda _, t=task: progress.advance(t))
            measured.append(asyncio.run(work))
    figures = figures_of(load, measured, source=rows or "made-up text")
    Console().print(table_of(measured))
    if out is not None:
        try:
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise MultiTokenError(f"cannot write {out}: {error.strerror or error}") from None
        console.print(f"figures: {out}", highlight=False, markup=False)
    if not any(each.answered for each in measured):
        raise MultiTokenError("no request was answered; the table's last column says why")


def figures_of(load: Load, measured: Sequence[Measured], *, source: str) -> dict[str, Any]:
    """All figures, and what they were measured with."""
    from multi_token import __version__
    from multi_token.report.machine import machine_facts

    return {
        "url": load.url,
        "model": load.model,
        "prompts": source,
        "num_prompts": len(load.prompts),
        "max_tokens": load.max_tokens,
        "ignore_eos": load.ignore_eos,
        "multi_token": __version__,
        "client": machine_facts(),
        "levels": [each.as_json() for each in measured],
    }


def table_of(measured: Sequence[Measured]) -> Table:
    """A line for each number of clients."""
    from rich.table import Table

    table = Table(title="times in ms: p50 / p99")
    for name in ("clients", "answered", "first token", "between", "tokens/s", "requests/s"):
        table.add_column(name, justify="right")
    table.add_column("errors")
    for each in measured:
        found = each.as_json()
        errors = [f"{count} x {kind}" for kind, count in found["errors"].items()]
        table.add_row(
            str(each.num_clients),
            f"{found['num_answered']} of {found['num_requests']}",
            _times(found["ttft_s"]),
            _times(found["itl_s"]),
            f"{found['tokens_per_second']:.1f}",
            f"{found['requests_per_second']:.2f}",
            "\n".join(errors),
        )
    return table


def _times(found: dict[str, float | None]) -> str:
    middle, last = found["p50"], found["p99"]
    if middle is None or last is None:
        return "-"
    return f"{1000 * middle:.0f} / {1000 * last:.0f}"


def _numbers(clients: str) -> list[int]:
    from multi_token.errors import MultiTokenError

    numbers = [int(text) if text.strip().isdecimal() else 0 for text in clients.split(",")]
    if not all(1 <= number <= 10_000 for number in numbers):
        raise MultiTokenError(f"--clients: expected numbers of 1 to 10000 (1,8,32), got {clients}")
    return numbers


def _prompts(
    rows: str | None, media: list[str] | None, words: int, model: dict[str, Any], *, most: int
) -> list[Any]:
    from multi_token.cli.ask import _items
    from multi_token.errors import MultiTokenError
    from multi_token.media.fetch import Fetch
    from multi_token.serve.bench import prompts_of_rows, written_prompts

    if rows is None:
        items = [(m.modality, Fetch().read(m.source)) for m in _items(media, None)]
        return written_prompts(most, words, items)
    if media:
        raise MultiTokenError("--media is for made-up questions, and --rows has its own items")
    return prompts_of_rows(rows, list(model.get("modalities") or {}), most=most)
