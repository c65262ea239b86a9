"""A server under mixed load for minutes: wrong answers, errors and leaks are counted.

    python benchmarks/soak.py [RUN] [--minutes 10] [--clients 32] [--out FILE]

Without RUN, the demo's language model serves with untrained modalities for images and vectors. Each
client sends its next request as soon as the last one is answered. Eight of ten are good questions
with media of all sizes, half of them streamed; one of ten is a broken request; in one of ten the
client leaves before the end. Every good question was asked alone at the start, and its answer must
be the same each time. Each of these counts has to be 0:

- **wrong answers**: a text other than when asked alone, or a refusal other than 429. After a 429
  the client asks again at the time of Retry-After.
- **own errors**: any status of 500 and above, and any error in a stream. The load gives no reason
  for one: the server is not stopped, and no request has a deadline of its own.
- **let through**: broken requests that were not refused with the expected status.
- **not freed**: places, answers and items that the server still counts after all clients have left.

The memory of the server and of its media workers may grow by 5 % in the second half. Growth is that
of the line through the medians of the last two quarters. Under five minutes it is reported and not
judged, since the server still warms up. The exit code is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from serving import Served, composed, served
from traffic import (
    Broken,
    Question,
    alone,
    ask_patiently,
    broken_requests,
    leave,
    questions,
    send_broken,
)

from multi_token.checkpoint.load import read_config
from multi_token.report.machine import machine_facts

MOST_GROWTH_PERCENT = 5.0
JUDGED_MINUTES = 5.0
_MIB = 1024 * 1024
_BROKEN, _LEAVES = 0.1, 0.1
_GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_admitted",
    "num_media_waiting",
    "media_memory_bytes",
)
_FREED_S = 30.0
"""The longest that what is left may take to end when everybody has gone."""
_NUM_KEPT = 20


@dataclass
class Found:
    """All that happened."""

    replies: Counter[str] = field(default_factory=Counter)
    """By what was sent and what came back."""
    num_good: int = 0
    num_broken: int = 0
    num_leavers: int = 0
    wrong: list[str] = field(default_factory=list)
    own_errors: list[str] = field(default_factory=list)
    let_through: list[str] = field(default_factory=list)
    not_freed: dict[str, float] = field(default_factory=dict)
    memory: list[tuple[float, float, float]] = field(default_factory=list)
    """Seconds since the start, MiB of the server, MiB of it and of all its processes."""

    @property
    def num_sent(self) -> int:
        return self.num_good + self.num_broken + self.num_leavers


def growth_percent(values: Sequence[float]) -> float:
    """Return the growth of the second half, by the line through the medians of its two quarters."""
    half = values[len(values) // 2 :]
    middle = len(half) // 2
    if not middle:
        return 0.0
    before, after = statistics.median(half[:middle]), statistics.median(half[middle:])
    return 2 * 100 * (after - before) / before


async def one_client(
    server: Served,
    http: httpx.AsyncClient,
    good: Sequence[Question],
    broken: Sequence[Broken],
    random: Random,
    until: float,
    found: Found,
) -> None:
    """Ask, err and leave until the time is over."""
    while time.monotonic() < until:
        draw = random.random()
        if draw < _BROKEN:
            await _err(http, random.choice(broken), found)
        elif draw < _BROKEN + _LEAVES:
            question = random.choice(good)
            fields = {**question.fields, "max_tokens": 200, "ignore_eos": True}
            content = Question(question.name, fields).content(stream=random.random() < 0.7)
            when = await leave(server.url, content, random)
            found.num_leavers += 1
            found.replies[f"left: {when}"] += 1
        else:
            await _ask(http, random.choice(good), random, found)


async def _ask(http: httpx.AsyncClient, question: Question, random: Random, found: Found) -> None:
    found.num_good += 1
    try:
        reply, num_refused = await ask_patiently(http, question, random)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        found.replies[f"good: {type(error).__name__}"] += 1
        found.wrong.append(f"{question.name}: {type(error).__name__} {error}")
        return
    found.replies[f"good: {reply.status}"] += 1
    found.replies["good: 429, and asked again"] += num_refused
    if reply.status.startswith("5") or (reply.status != "200" and reply.status[:3] == "200"):
        found.own_errors.append(f"{question.name}: {reply.status}")
    elif reply.status != "200":
        found.wrong.append(f"{question.name}: refused with {reply.status}")
    elif reply.text != question.answer:
        found.wrong.append(
            f"{question.name}: {reply.text[:80]!r} instead of {question.answer[:80]!r}"
        )


async def _err(http: httpx.AsyncClient, broken: Broken, found: Found) -> None:
    found.num_broken += 1
    status = await send_broken(http, broken)
    found.replies[f"broken: {status}"] += 1
    if status.startswith("5"):
        found.own_errors.append(f"{broken.name}: {status}")
    elif status == "closed":  # a body that is too long may be cut off before it is sent
        if 413 not in broken.statuses:
            found.let_through.append(f"{broken.name}: {status}")
    elif not status.startswith("429") and int(status[:3]) not in broken.statuses:
        found.let_through.append(f"{broken.name}: {status}")


async def watch_memory(pid: int, found: Found, tick: Any) -> None:
    """A sample each second, until cancelled."""
    began = time.monotonic()
    process = psutil.Process(pid)
    while True:
        own = process.memory_info().rss / _MIB
        others = 0.0
        for child in process.children(recursive=True):
            try:
                others += child.memory_info().rss / _MIB
            except psutil.NoSuchProcess:
                continue  # a fork that was replaced
        found.memory.append((time.monotonic() - began, own, own + others))
        tick()
        await asyncio.sleep(1.0)


async def what_is_left(http: httpx.AsyncClient) -> dict[str, float]:
    """Gauges that do not come back to 0, now that everybody has gone."""
    until = time.monotonic() + _FREED_S
    while True:
        lines = (await http.get("/metrics")).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if line[:1] not in ("#", ""))
        left = {name: float(values[f"multi_token_{name}"]) for name in _GAUGES}
        if not any(left.values()) or time.monotonic() > until:
            return {name: value for name, value in left.items() if value}
        await asyncio.sleep(0.1)


async def soaked(
    server: Served, modalities: dict[str, Any], args: argparse.Namespace, progress: Progress
) -> Found:
    """Send everything for `args.minutes`, and wait until the server is empty."""
    found = Found()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=300, limits=limits, trust_env=False
    ) as http:
        asked = questions(modalities)
        task = progress.add_task("each question alone", total=len(asked))
        good: list[Question] = []
        for question in asked:
            answered = await alone(http, question)
            good += [] if answered is None else [answered]
            progress.advance(task)
        # An answer that hangs on rounding may differ in a batch, so only the others are compared.
        if len(good) < len(asked) / 2:
            raise SystemExit(f"only {len(good)} of {len(asked)} answers do not hang on rounding")
        broken = broken_requests(modalities)
        seconds = args.minutes * 60
        task = progress.add_task(f"{args.clients} clients", total=seconds)
        began = time.monotonic()

        def tick() -> None:
            progress.update(
                task,
                completed=min(seconds, time.monotonic() - began),
                description=f"{found.num_sent} requests, {len(found.wrong)} wrong",
            )

        watching = asyncio.create_task(watch_memory(server.pid, found, tick))
        try:
            await asyncio.gather(
                *(
                    one_client(server, http, good, broken, Random(number), began + seconds, found)
                    for number in range(args.clients)
                )
            )
        finally:
            watching.cancel()
        found.not_freed = await what_is_left(http)
    return found


def missed(found: Found, *, is_judged: bool) -> list[str]:
    """Bars that were not kept, each in a few words."""
    bars = {
        "wrong answers": len(found.wrong),
        "own errors": len(found.own_errors),
        "let through": len(found.let_through),
        "not freed": len(found.not_freed),
    }
    names = [f"{number} {name}" for name, number in bars.items() if number]
    # By the trend of medians: single samples move with the garbage collector and batches in flight.
    growth = growth_percent([total for _, _, total in found.memory])
    if is_judged and growth > MOST_GROWTH_PERCENT:
        names.append(f"memory grew by {growth:.1f} %")
    if not found.num_good:
        names.append("no question was asked")
    return names


def table_of(found: Found, *, is_judged: bool) -> Table:
    """Return a table of replies by status, and of the bars."""
    table = Table(title=f"{found.num_sent} requests")
    table.add_column("what")
    table.add_column("number", justify="right")
    for what, number in sorted(found.replies.items()):
        if number:
            table.add_row(what, str(number))
    table.add_section()
    for name in ("wrong", "own_errors", "let_through", "not_freed"):
        table.add_row(name.replace("_", " "), str(len(getattr(found, name))))
    for name, place in (("server", 1), ("server and its processes", 2)):
        values = [sample[place] for sample in found.memory]
        note = "" if is_judged else ", too short to judge"
        table.add_row(
            f"MiB of {name}, first / half / last, growth of the second half{note}",
            f"{values[0]:.0f} / {values[len(values) // 2]:.0f} / {values[-1]:.0f}, "
            f"{growth_percent(values):+.1f} %",
        )
    return table


def main() -> int:
    """Run the soak; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", nargs="?", type=Path, help="a trained run; default: see above")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument(
        "--max-queue", type=int, help="default: less than clients need, so that some get a 429"
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    console = Console()
    max_queue = args.max_queue
    if max_queue is None:
        max_queue = max(1, args.clients - args.max_batch - args.clients // 8)
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or Path(scratch, "composed")
        if args.run is None:
            composed(run, with_images=True)
        modalities = read_config(run)["model"]["modalities"]
        options = ["--max-batch", str(args.max_batch)]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with (
            served(run, *options, "--max-queue", str(max_queue)) as server,
            Progress(*columns, console=console) as progress,
        ):
            found = asyncio.run(soaked(server, modalities, args, progress))
            faults = list(server.faults)
    is_judged = args.minutes >= JUDGED_MINUTES
    names = missed(found, is_judged=is_judged)
    console.print(table_of(found, is_judged=is_judged))
    for line in [*found.wrong, *found.own_errors, *found.let_through][:_NUM_KEPT]:
        console.print(line, style="red", markup=False)
    if names:
        console.print("\n".join(faults[-_NUM_KEPT:]), markup=False)
    if args.out is not None:
        memory = {
            name: {
                "growth_percent": growth_percent([sample[place] for sample in found.memory]),
                "peak_mib": max(sample[place] for sample in found.memory),
            }
            for name, place in (("server", 1), ("all", 2))
        }
        figures = {
            "run": "composed" if args.run is None else args.run.name,
            "settings": {k: v for k, v in vars(args).items() if k not in ("run", "out")}
            | {"max_queue": max_queue},
            "machine": machine_facts(),
            "num_good": found.num_good,
            "num_broken": found.num_broken,
            "num_leavers": found.num_leavers,
            "replies": dict(sorted(found.replies.items())),
            "wrong": found.wrong[:_NUM_KEPT],
            "num_wrong": len(found.wrong),
            "own_errors": found.own_errors[:_NUM_KEPT],
            "num_own_errors": len(found.own_errors),
            "let_through": found.let_through[:_NUM_KEPT],
            "not_freed": found.not_freed,
            "memory": {**memory, "is_judged": is_judged, "samples": found.memory},
            "missed": names,
        }
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if names:
        console.print(f"missed: {', '.join(names)}", style="red")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
