"""benchmarks/client_load.py against a real server: its figures, its prompts and its errors.

Figures are checked where they can be known (counts, order, sums), never as speeds.
"""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client_load import (
    LoadResult,
    LoadSpec,
    RequestTiming,
    main,
    measure,
    prompts_of_rows,
    served_model,
    summary,
    written_prompts,
)
from multi_token.errors import MultiTokenError
from tests.serve.running_server import KEY, npy, png

pytestmark = pytest.mark.slow


def measured(load: LoadSpec, num_clients: int, num_requests: int) -> LoadResult:
    return asyncio.run(measure(load, num_clients, num_requests, lambda _: None))


@pytest.fixture
def load(server: str) -> LoadSpec:
    prompts = written_prompts(3, 6, [("image", png()), ("vector", npy(1, 2, 3, 4, 5))])
    return LoadSpec(server, "tiny-run", prompts, max_tokens=5, ignore_eos=True, api_key=KEY)


def test_figures_agree_with_what_was_asked(load: LoadSpec) -> None:
    found = measured(load, num_clients=2, num_requests=5).as_json()
    assert (found["num_clients"], found["num_requests"], found["num_answered"]) == (2, 5, 5)
    assert found["errors"] == {}
    assert found["completion_tokens"] == 5 * 5 and found["prompt_tokens"] > 5 * 5
    assert found["tokens_per_second"] == pytest.approx(25 / found["seconds"])
    assert found["requests_per_second"] == pytest.approx(5 / found["seconds"])
    assert 0 < found["ttft_s"]["p50"] <= found["ttft_s"]["p99"] <= found["latency_s"]["p99"]
    assert found["latency_s"]["p99"] <= found["seconds"]
    assert found["itl_s"]["p50"] >= 0 and found["tpot_s"]["mean"] > 0


def test_times_are_those_of_chunks_with_text() -> None:
    fast = RequestTiming(pieces=[1.0, 1.5, 2.5], seconds=3.0, num_prompt=7, num_tokens=5)
    failed = RequestTiming(seconds=9.0, fault="429 queue_full", pieces=[0.1])
    found = LoadResult(2, 4.0, [fast, failed]).as_json()
    assert found["ttft_s"] == {"mean": 1.0, "p50": 1.0, "p99": 1.0}
    assert found["itl_s"] == {"mean": 0.75, "p50": 0.5, "p99": 1.0}
    assert found["tpot_s"]["p50"] == (3.0 - 1.0) / 4
    assert found["errors"] == {"429 queue_full": 1}
    assert found["tokens_per_second"] == 5 / 4


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    assert summary(values) == {"mean": 50.5, "p50": 50.0, "p99": 99.0}
    assert summary([3.0]) == {"mean": 3.0, "p50": 3.0, "p99": 3.0}
    assert summary([]) == {"mean": None, "p50": None, "p99": None}


def test_made_up_questions_are_all_different() -> None:
    prompts = written_prompts(40, 12)
    texts = [message["content"] for (message,) in prompts]
    assert len(set(texts)) == 40 and all(len(text.split()) == 14 for text in texts)
    (message,) = written_prompts(1, 3, [("image", b"abc")])[0]
    assert message["content"][0] == {"type": "media", "modality": "image", "data": "YWJj"}
    assert message["content"][1]["type"] == "text"


def test_rows_are_asked_up_to_their_last_answer(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png())
    row = {
        "messages": [
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "And <vector>?"},
            {"role": "assistant", "content": "numbers"},
        ],
        "images": ["red.png"],
        "vector": [1, 2],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = str(tmp_path / "rows.jsonl")
    (first, said, second), *others = prompts_of_rows(rows, ["image", "vector"], most=5)
    assert others == []
    assert said == {"role": "assistant", "content": "red"}
    assert [part["type"] for part in first["content"]] == ["text", "media", "text"]
    assert base64.b64decode(first["content"][1]["data"]) == png()
    assert base64.b64decode(second["content"][1]["data"]) == npy(1, 2)


def test_refusals_are_counted_by_their_kind(load: LoadSpec) -> None:
    from dataclasses import replace

    wrong = replace(load, api_key="sk-wrong-key", prompts=load.prompts[:1])
    assert measured(wrong, 1, 2).as_json()["errors"] == {"401 invalid_api_key": 2}
    bad = replace(load, prompts=written_prompts(1, 3, [("image", b"no image")]))
    (kind,) = measured(bad, 1, 2).as_json()["errors"]
    assert kind.startswith("4")
    gone = replace(load, url="http://127.0.0.1:9")
    assert measured(gone, 1, 1).as_json()["errors"] == {"ConnectError": 1}


@contextmanager
def answering(
    body: bytes, kind: str = "text/event-stream", before: Callable[[], Any] = lambda: None
) -> Iterator[str]:
    """A server with the same response for every request; it calls `before` first."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            before()
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


CHUNK = b'data: {"choices": [{"delta": {"content": "a"}}], "usage": null}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (CHUNK + USAGE + b"data: [DONE]\n\n", None),
        (CHUNK + USAGE, "the stream ended without [DONE]"),
        (CHUNK + b"data: [DONE]\n\n", "no usage in the stream"),
        (
            CHUNK + b'data: {"error": {"code": "engine_failed"}}\n\ndata: [DONE]\n\n',
            "in the stream: engine_failed",
        ),
        (b"data: <html>\n\n", "not a stream of chat completions (JSONDecodeError)"),
    ],
)
def test_a_broken_stream_counts_as_an_error(body: bytes, fault: str | None, load: LoadSpec) -> None:
    with answering(body) as url:
        (request,) = measured(LoadSpec(url, "m", load.prompts), 1, 1).requests
    assert request.fault == fault and request.text == ("a" if body.startswith(CHUNK) else "")


def test_the_given_number_of_clients_asks_at_once(load: LoadSpec) -> None:
    together = threading.Barrier(3)  # no response before three clients have asked
    body = CHUNK + USAGE + b"data: [DONE]\n\n"
    with answering(body, before=lambda: together.wait(20)) as url:
        found = measured(LoadSpec(url, "m", load.prompts, timeout_s=30), 3, 9)
    assert len(found.answered) == 9


def test_the_script_prints_a_table_and_writes_json(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.npy").write_bytes(npy(1, 2, 3, 4, 5))
    out = tmp_path / "figures.json"
    arguments = ["--clients", "1,2", "--requests", "3", "--max-tokens", "4", "--api-key", KEY]
    media = ["--media", f"vector={tmp_path / 'v.npy'}", "--ignore-eos", "--out", str(out)]
    main([f"{server}/v1", *arguments, *media])
    printed = capsys.readouterr().out
    assert "3 of 3" in printed and "tokens/s" in printed
    figures = json.loads(out.read_text())
    assert figures["model"] == "tiny-run" and figures["max_tokens"] == 4
    assert [level["num_clients"] for level in figures["levels"]] == [1, 2]
    assert [level["completion_tokens"] for level in figures["levels"]] == [12, 12]
    assert KEY not in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clients", "0"], "--clients: expected numbers of 1 to 10000"),
        (["--clients", "1,x"], "--clients: expected numbers of 1 to 10000"),
        (["--api-key", "sk-wrong-key"], "asks for a key; give --api-key"),
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--rows", "x.jsonl", "--media", "image=x.png"], "--rows has its own items"),
    ],
)
def test_invalid_options_are_refused_with_a_sentence(
    arguments: list[str], sentence: str, server: str, tmp_path: Path
) -> None:
    given = arguments if "--api-key" in arguments else [*arguments, "--api-key", KEY]
    (tmp_path / "x.png").write_bytes(png())
    with pytest.raises(MultiTokenError) as refused:
        main([server, *given])
    assert sentence in str(refused.value)


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(MultiTokenError, match=r"expected a server at http://127.0.0.1:9/v1/models"):
        served_model("http://127.0.0.1:9", None)
    with (
        answering(b"<html>", "text/html") as url,
        pytest.raises(MultiTokenError, match="expected a list of models"),
    ):
        served_model(url, None)
