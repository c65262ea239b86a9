"""The server beside bare `generate`, and many clients beside one, on one run and one machine.

    python benchmarks/serving.py [RUN] [--rows FILE] [--out FILE]

Without RUN, the demo's language model with an untrained `vector` modality, each question about
another vector. In one run and in turns:

- **one client**: every question by `model.generate` in this process, and by one client of a server
  that has no more threads; time to the first token and tokens a second, as ratios of medians.
- **many clients**: the same questions by one client, then by 8 at once; tokens a second as a ratio.

Answers must be equal, all of them, or the figures mean nothing; how many are is printed. Every
round has an API key of its own, so it finds no entry of an earlier round in a cache: only the
prefix that its own prompts share, the chat template's system message, is reused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from client_load import LoadResult, LoadSpec, measure, request_messages
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from multi_token.data.files.open import load_rows, media_root
from multi_token.data.formats import to_conversation
from multi_token.demo.parts import encoder_folder, language_model_folder
from multi_token.media.fetch import Fetch
from multi_token.model import MultiTokenForConditionalGeneration
from multi_token.recipe.model import ModelSpec
from multi_token.recipe.recipe import load_recipe
from multi_token.report.machine import machine_facts
from multi_token.serve.chat_ui.examples import bytes_of, question_of
from multi_token.types import Conversation, Media, Message, Text

_DIM = 64
_TOPICS = ("a river", "winter", "an old house", "the night train", "bread", "a lighthouse", "snow")


@dataclass
class Bare:
    """`generate` in this process: of each question its answer and times, in seconds."""

    texts: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)


class Watch:
    """Streamer of transformers that records when tokens come. The prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def composed(folder: Path, *, with_images: bool = False) -> None:
    """Save a run with the demo's language model and untrained modalities."""
    modalities: dict[str, Any] = {
        "vector": {"type": "vector", "dim": _DIM, "projector": {"type": "expand", "factor": 8}}
    }
    if with_images:
        modalities["image"] = {
            "type": "image",
            "encoder": str(encoder_folder()),
            "features": "pooled",
            "projector": {"type": "expand", "factor": 8},
        }
    fields = {"language_model": str(language_model_folder()), "modalities": modalities}
    torch.manual_seed(0)
    MultiTokenForConditionalGeneration.from_spec(ModelSpec.model_validate(fields)).save_pretrained(
        folder
    )


def made_up(number: int) -> list[Conversation]:
    """Return questions of several lengths, each about a vector of its own."""
    generator = torch.Generator().manual_seed(0)
    conversations = []
    for i in range(number):
        vector = bytes_of(torch.randn(_DIM, generator=generator).tolist(), Fetch())
        words = " and ".join(_TOPICS[(i + j) % len(_TOPICS)] for j in range(1 + i % 4))
        text = f"\nTell me a story about {words}, in {20 + i} words."
        message = Message("user", (Media("vector", vector), Text(text)))
        conversations.append(Conversation((message,), id=str(i)))
    return conversations


def of_rows(rows: str, names: Sequence[str], number: int) -> list[Conversation]:
    """Return questions of the first rows, with their items as bytes."""
    every = load_rows(rows)
    fetch = Fetch(root=media_root(rows))

    def held(part: Any) -> Any:
        is_media = isinstance(part, Media)
        return replace(part, source=bytes_of(part.source, fetch)) if is_media else part

    conversations = []
    for i in range(min(number, len(every))):
        messages, _ = question_of(to_conversation(every[i], names, row_id=str(i)))
        conversations.append(
            Conversation(
                tuple(Message(m.role, tuple(map(held, m.parts))) for m in messages), id=str(i)
            )
        )
    return conversations


def bare_answers(model: Any, conversations: Sequence[Conversation], max_tokens: int) -> Bare:
    """Ask `model.generate` every question by itself."""
    bare = Bare()
    for conversation in conversations:
        watch = Watch()
        began = time.perf_counter()
        (text,) = model.generate([conversation], max_new_tokens=max_tokens, streamer=watch)
        bare.seconds.append(time.perf_counter() - began)
        bare.texts.append(text)
        bare.first.append(watch.times[1] - began)
        bare.num_tokens.append(len(watch.times) - 1)
    return bare


@dataclass(frozen=True)
class Served:
    """A server that listens. `faults`: lines of its log about errors, the last thousand."""

    url: str
    pid: int
    faults: deque[str]


@contextmanager
def served(run: Path, *options: str) -> Iterator[Served]:
    """Start a server in a process of its own, on a free port; its model is called `measured`."""
    command = [sys.executable, "-m", "multi_token", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--no-examples", "--name", "measured", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    printed: list[str] = []
    url = None
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"listens on (http://\S+);", line):
            url = found[1]
            break
    if url is None:
        raise SystemExit("the server did not start:\n" + "".join(printed[-20:]))
    # Bounded: a server that fails at every request would fill the memory of a long soak.
    faults: deque[str] = deque(maxlen=1000)

    def read() -> None:
        """Read the log to its end: with a full pipe, the server would wait."""
        for line in process.stdout or ():
            if not re.match(r"\S+ \S+ INFO ", line):
                faults.append(line.rstrip())

    threading.Thread(target=read, daemon=True).start()
    try:
        yield Served(url, process.pid, faults)
    finally:
        process.terminate()
        process.wait(60)


def answered(measured: LoadResult) -> list[str]:
    """Return all answers in the order of asking. Exits if one is missing."""
    faults = [request.fault for request in measured.requests if request.fault is not None]
    if faults:
        raise SystemExit(f"{len(faults)} requests failed: {', '.join(sorted(set(faults)))}")
    return [r.text.strip() for r in sorted(measured.requests, key=lambda r: r.number)]


def num_equal(texts: Sequence[str], others: Sequence[str]) -> int:
    return sum(a == b for a, b in zip(texts, others, strict=True))


def compared(
    run: Path,
    model: Any,
    conversations: Sequence[Conversation],
    args: argparse.Namespace,
    tick: Any,
) -> dict[str, Any]:
    """Return the figures of the server."""
    prompts = [request_messages(c.messages, Fetch()) for c in conversations]
    few, few_prompts = conversations[: args.num_alone], prompts[: args.num_alone]
    options = ["--max-batch", str(args.clients), "--max-queue", "10000"]
    # No media cache, and a key per round, since the prefix cache is per key: a second round of the
    # same questions would measure the caches.
    options += ["--media-cache-mb", "0", "--workers", "1"]
    keys = [f"sk-measured-{i}" for i in range(1 + 3 * args.rounds)]
    options += [part for key in keys for part in ("--api-key", key)]
    with served(run, *options) as server:
        work = LoadSpec(server.url, "measured", prompts, max_tokens=args.max_tokens)

        def asked(load: LoadSpec, num_clients: int) -> LoadResult:
            own = replace(load, api_key=keys.pop())
            return asyncio.run(measure(own, num_clients, len(own.prompts), lambda _: None))

        alone = replace(work, prompts=few_prompts)
        bare_answers(model, few[:1], args.max_tokens)  # both warm up
        asked(replace(work, prompts=few_prompts[:1]), 1)
        tick()
        rounds = []
        for _ in range(args.rounds):  # in turns, so that a slow minute slows both
            rounds.append((bare_answers(model, few, args.max_tokens), asked(alone, 1)))
            tick()
        ones, manies = [], []
        for _ in range(args.rounds):
            ones.append(asked(work, 1))
            manies.append(asked(work, args.clients))
            tick()
    bare_first = statistics.median(t for bare, _ in rounds for t in bare.first)
    first = statistics.median(r.pieces[0] for _, m in rounds for r in m.requests if r.pieces)
    # Rates of whole rounds: single answers have too few tokens for a rate each.
    bare_rate = statistics.median(sum(b.num_tokens) / sum(b.seconds) for b, _ in rounds)
    rate = statistics.median(
        sum(r.num_tokens for r in m.requests) / sum(r.seconds for r in m.requests)
        for _, m in rounds
    )
    one = statistics.median(m.as_json()["tokens_per_second"] for m in ones)
    many = statistics.median(m.as_json()["tokens_per_second"] for m in manies)
    # Answers are compared too: a faster server that answers something else has gained nothing.
    texts = answered(ones[0])
    return {
        "one_client": {
            "num_questions": len(few),
            "equal_answers": num_equal(rounds[0][0].texts, answered(rounds[0][1])),
            "bare_ttft_s": bare_first,
            "ttft_s": first,
            "ttft_ratio": first / bare_first,
            "bare_tokens_per_second": bare_rate,
            "tokens_per_second": rate,
            "tokens_per_second_ratio": rate / bare_rate,
        },
        "many_clients": {
            "num_clients": args.clients,
            "num_questions": len(prompts),
            "equal_answers": min(num_equal(texts, answered(m)) for m in [*ones, *manies]),
            "one_at_a_time_tokens_per_second": one,
            "tokens_per_second": many,
            "throughput_ratio": many / one,
            "one": ones[0].as_json(),
            "many": manies[0].as_json(),
        },
    }


def table_of(figures: dict[str, Any]) -> Table:
    """Return the ratios as a table."""
    table = Table(title="the server beside bare generate, and many clients beside one")
    for name in ("first token", "tokens/s", "equal", "clients", "throughput", "equal "):
        table.add_column(name, justify="right")
    one, many = figures["one_client"], figures["many_clients"]
    table.add_row(
        f"{one['ttft_ratio']:.2f}x",
        f"{one['tokens_per_second_ratio']:.2f}x",
        f"{one['equal_answers']} of {one['num_questions']}",
        str(many["num_clients"]),
        f"{many['throughput_ratio']:.2f}x",
        f"{many['equal_answers']} of {many['num_questions']}",
    )
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("run", nargs="?", type=Path, help="a trained run; default: see above")
    parser.add_argument("--rows", help="questions; default: the run's first rows of training")
    parser.add_argument("--requests", type=int, default=32, help="questions of many clients")
    parser.add_argument("--num-alone", type=int, default=8, help="of them, also asked one by one")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or Path(scratch, "composed")
        if args.run is None:
            composed(run)
        model = MultiTokenForConditionalGeneration.from_pretrained(run)
        if args.run is None and args.rows is None:
            conversations = made_up(args.requests)
        else:
            rows = args.rows or load_recipe(run / "recipe.yaml").data.train[0].rows
            conversations = of_rows(rows, list(model.modalities), args.requests)
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=1 + 2 * args.rounds)
            figures = compared(run, model, conversations, args, lambda: progress.advance(task))
    console.print(table_of(figures))
    if args.out is not None:
        described = {
            "run": "composed" if args.run is None else args.run.name,
            "settings": {k: v for k, v in vars(args).items() if k not in ("run", "rows", "out")},
            "threads": torch.get_num_threads(),
            "machine": machine_facts(),
            **figures,
        }
        args.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
