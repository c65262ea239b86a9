"""Claims about what engines tell of their cache: its use, and what prompts find in it.

Border: a real server on a tiny model. That answers of a small cache are right: test_soft_tokens.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from multi_token.cli.serve import _settings
from multi_token.errors import MultiTokenError
from multi_token.serve.settings import ServeSettings
from tests.serve.asking import PICTURE, asked, fault_of, post
from tests.serve.running_server import RunningServer, running

PAGE_SIZE = 32
LONG = {"type": "text", "text": "What is a fruit? " * 12}


def gauge(http: httpx.Client, name: str) -> float | None:
    found = re.search(rf"^multi_token_{name} (\S+)$", http.get("/metrics").text, re.M)
    return float(found[1]) if found else None


@pytest.fixture(scope="module")
def paged(served_model: Any) -> Iterator[RunningServer]:
    with running(served_model, backend="continuous", num_cache_tokens=1024) as server:
        yield server


@pytest.fixture(scope="module")
def http(paged: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=paged.url, timeout=60) as client:
        yield client


@pytest.mark.slow
def test_a_prompt_that_comes_again_tells_how_much_of_it_was_there(http: httpx.Client) -> None:
    def usage(*parts: Any) -> tuple[int, int]:
        found = post(http, asked(*parts)).json()["usage"]
        return found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"]

    before = [gauge(http, f"prefix_cache_{name}_total") or 0 for name in ("queries", "hits")]
    num_prompt, num_cached = usage(PICTURE, LONG)
    assert num_cached == 0 and num_prompt > 2 * PAGE_SIZE
    again, num_cached = usage(PICTURE, LONG)
    assert again == num_prompt
    # whole pages, and never the whole prompt: its last token has to be read to go on
    assert num_cached == (num_prompt - 1) // PAGE_SIZE * PAGE_SIZE > 0
    other, of_other = usage(LONG, PICTURE)
    assert of_other % PAGE_SIZE == 0 and of_other < num_cached
    after = [gauge(http, f"prefix_cache_{name}_total") for name in ("queries", "hits")]
    assert after[0] == before[0] + 2 * num_prompt + other
    assert after[1] == before[1] + num_cached + of_other


@pytest.mark.slow
def test_the_use_of_the_cache_is_that_of_answers_which_are_being_written(
    paged: RunningServer, http: httpx.Client
) -> None:
    assert paged.wait_until(lambda: paged.service.engine.cache_usage == 0.0)
    body = {"messages": asked(LONG["text"]), "max_tokens": 300, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert paged.wait_until(lambda: paged.service.engine.cache_usage > 0.05)
        used = gauge(http, "kv_cache_usage_perc")
        assert used is not None and 0 < used <= 1
    assert paged.wait_until(lambda: paged.service.engine.cache_usage == 0.0)
    assert gauge(http, "kv_cache_usage_perc") == 0.0


@pytest.mark.slow
def test_a_prompt_that_the_cache_could_never_hold_is_refused_before_it_waits(
    served_model: Any,
) -> None:
    with (
        running(served_model, backend="continuous", num_cache_tokens=128) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        most = http.get("/v1/models").json()["data"][0]["max_model_len"]
        assert most <= 128
        answer = post(http, asked("x"), max_tokens=most)
        assert answer.status_code == 400
        assert fault_of(answer)["code"] == "context_length_exceeded"
        assert f"takes {most} for both" in fault_of(answer)["message"]
        assert post(http, asked("x"), max_tokens=most // 2).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("num_kept", [None, 0])
def test_the_static_engine_tells_what_it_kept_of_ended_answers(
    served_model: Any, num_kept: int | None
) -> None:
    with (
        running(served_model, num_cache_tokens=num_kept) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        usages = [post(http, asked(PICTURE, LONG)).json()["usage"] for _ in range(2)]
        found = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
        num_prompt = usages[0]["prompt_tokens"]
        expected = 0 if num_kept == 0 else num_prompt - 1
        assert found == [0, expected]
        assert gauge(http, "prefix_cache_queries_total") == (0 if num_kept == 0 else 2 * num_prompt)
        assert gauge(http, "prefix_cache_hits_total") == expected
        assert server.wait_until(lambda: server.service.engine.cache_usage == 0.0)
        assert gauge(http, "kv_cache_usage_perc") == 0.0


def test_the_size_of_the_cache_is_for_engines_that_are_here() -> None:
    assert ServeSettings(backend="continuous", num_cache_tokens=4096).num_cache_tokens == 4096
    assert ServeSettings(num_cache_tokens=0).num_cache_tokens == 0
    with pytest.raises(ValidationError, match="leave out --cache-tokens"):
        ServeSettings(backend="vllm", engine_urls=("http://x:1",), num_cache_tokens=4096)
    with pytest.raises(MultiTokenError, match="--cache-tokens 1 or more"):
        _settings(backend="continuous", num_cache_tokens=0)
