"""A server under mixed load, in short; benchmarks/soak.py runs the same for longer."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.serve.asking import IMAGE, QUESTION, VECTOR, asked, content_of, post
from tests.serve.running_server import running

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NUM_LEAVERS = 1000
NUM_AT_ONCE = 50


@pytest.fixture(scope="module")
def soak() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("soak")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_20_seconds_of_mixed_load_have_no_wrong_answer_and_no_error_of_the_server(
    served_run: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(BENCHMARKS / "soak.py"), str(served_run)]
    command += ["--minutes", "0.3", "--clients", "8", "--max-batch", "4"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "soak.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    found = json.loads((tmp_path / "soak.json").read_text())
    assert min(found["num_good"], found["num_broken"], found["num_leavers"]) > 1, output
    assert (found["num_wrong"], found["num_own_errors"]) == (0, 0), output
    assert found["let_through"] == [] and found["not_freed"] == {}, output
    assert found["missed"] == []
    assert found["replies"]["good: 200"] == found["num_good"]


def test_a_wrong_answer_and_an_answered_broken_request_are_reported(
    soak: ModuleType, served_model: Any
) -> None:
    fields = {"messages": asked("one two"), "max_tokens": 2}
    false = soak.Question("false", fields, "what the model does not say")
    valid = soak.Broken("valid", json.dumps(fields).encode())
    found = soak.Found()

    async def send(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            await soak._ask(http, false, Random(0), found)
            await soak._err(http, valid, found)

    with running(served_model) as server:
        asyncio.run(send(server.url))
    assert len(found.wrong) == 1 and "what the model does not say" in found.wrong[0]
    assert found.let_through == ["valid: 200 OK"]
    assert found.own_errors == []
    assert soak.missed(found, is_judged=False) == ["1 wrong answers", "1 let through"]


def test_growing_memory_is_reported_and_a_plateau_is_not(soak: ModuleType) -> None:
    def judged(values: list[float]) -> list[str]:
        memory = [(float(i), value, value) for i, value in enumerate(values)]
        return soak.missed(soak.Found(num_good=1, memory=memory), is_judged=True)

    grows = [1000.0 + i for i in range(600)]
    assert soak.growth_percent(grows) == pytest.approx(100 * 300 / 1374, rel=0.01)
    assert judged(grows) == [f"memory grew by {soak.growth_percent(grows):.1f} %"]
    assert judged([min(1300.0, value) for value in grows]) == []
    peaks = [value if i % 10 else 5000.0 for i, value in enumerate([1000.0] * 600)]
    assert judged(peaks) == []


def test_after_a_thousand_clients_have_left_no_request_remains_and_no_slot_is_taken(
    soak: ModuleType, served_model: Any
) -> None:
    long = {"max_tokens": 60, "ignore_eos": True}
    bodies = [
        json.dumps({"messages": asked(*parts), "stream": stream, **long}).encode()
        for parts in (["x"], [IMAGE, QUESTION], [VECTOR, VECTOR, QUESTION])
        for stream in (False, True)
    ]
    moments: list[str] = []

    async def leave_all(url: str) -> None:
        numbers = iter(range(NUM_LEAVERS))

        async def one_after_the_other() -> None:
            for number in numbers:
                random = Random(number)
                moments.append(await soak.leave(url, random.choice(bodies), random))

        await asyncio.gather(*(one_after_the_other() for _ in range(NUM_AT_ONCE)))

    with (
        running(served_model, max_batch=4, max_queue=100) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        before = content_of(post(http, asked(IMAGE, QUESTION)))
        asyncio.run(leave_all(server.url))
        assert len(moments) == NUM_LEAVERS
        assert {"connected", "half sent", "sent", "waiting", "read"} <= set(moments)
        service = server.service
        is_empty = server.wait_until(
            lambda: (
                (
                    service.admission.num_admitted,
                    service.engine.num_running,
                    service.engine.num_waiting,
                    service.prompts.media_pool.num_waiting,
                    service.prompts.media_memory.num_bytes,
                    len(service._outputs),
                )
                == (0, 0, 0, 0, 0, 0)
            ),
            seconds=20,
        )
        assert is_empty, http.get("/metrics").text
        assert content_of(post(http, asked(IMAGE, QUESTION))) == before
        text = http.get("/metrics").text
    assert "multi_token_num_requests_admitted 0.0" in text
    assert "multi_token_num_requests_running 0.0" in text
    assert 'status="500"' not in text and 'status="503"' not in text
