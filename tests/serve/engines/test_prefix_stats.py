"""Statistics of the prefix cache and the KV cache, over HTTP.

A real server on a tiny model. That prompts with a cached prefix are right: test_prefix_cache.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from multi_token.serve.settings import ServeSettings
from tests.serve.asking import IMAGE, asked, post
from tests.serve.running_server import RunningServer, running

LONG = {"type": "text", "text": "What is a fruit? " * 12}


def gauge(http: httpx.Client, name: str) -> float | None:
    found = re.search(rf"^multi_token_{name} (\S+)$", http.get("/metrics").text, re.M)
    return float(found[1]) if found else None


@pytest.fixture(scope="module")
def local(served_model: Any) -> Iterator[RunningServer]:
    with running(served_model) as server:
        yield server


@pytest.fixture(scope="module")
def http(local: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=local.url, timeout=60) as client:
        yield client


@pytest.mark.slow
def test_usage_and_metrics_count_the_cached_tokens_of_each_prompt(http: httpx.Client) -> None:
    def usage(*parts: Any) -> tuple[int, int]:
        found = post(http, asked(*parts)).json()["usage"]
        return found["prompt_tokens"], found["prompt_tokens_details"]["cached_tokens"]

    before = [gauge(http, f"prefix_cache_{name}_total") or 0 for name in ("queries", "hits")]
    num_prompt, num_cached = usage(IMAGE, LONG)
    assert num_cached == 0
    again, num_again = usage(IMAGE, LONG)
    # never the complete prompt: prefill runs on its last token at least
    assert (again, num_again) == (num_prompt, num_prompt - 1)
    other, num_other = usage(LONG, IMAGE)
    assert num_other < num_again
    after = [gauge(http, f"prefix_cache_{name}_total") for name in ("queries", "hits")]
    assert after[0] == before[0] + 2 * num_prompt + other
    assert after[1] == before[1] + num_again + num_other


@pytest.mark.slow
def test_cache_usage_is_that_of_running_requests(local: RunningServer, http: httpx.Client) -> None:
    assert local.wait_until(lambda: local.service.engine.cache_usage == 0.0)
    body = {"messages": asked(LONG["text"]), "max_tokens": 300, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert local.wait_until(lambda: local.service.engine.cache_usage > 0.001)
        used = gauge(http, "kv_cache_usage_perc")
        assert used is not None and 0 < used <= 1
    assert local.wait_until(lambda: local.service.engine.cache_usage == 0.0)
    assert gauge(http, "kv_cache_usage_perc") == 0.0


@pytest.mark.slow
def test_a_prefix_cache_of_no_tokens_counts_nothing(served_model: Any) -> None:
    with (
        running(served_model, prefix_cache_tokens=0) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        usages = [post(http, asked(IMAGE, LONG)).json()["usage"] for _ in range(2)]
        assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 0]
        assert gauge(http, "prefix_cache_queries_total") == 0
        assert gauge(http, "prefix_cache_hits_total") == 0


def test_the_size_of_the_prefix_cache_is_a_setting_of_the_local_engine() -> None:
    assert ServeSettings(prefix_cache_tokens=0).prefix_cache_tokens == 0
    assert ServeSettings(prefix_cache_tokens=4096).prefix_cache_tokens == 4096
    with pytest.raises(ValidationError, match="leave out --prefix-cache-tokens"):
        ServeSettings(engine_urls=("http://x:1",), prefix_cache_tokens=4096)
    with pytest.raises(ValidationError, match="prefix_cache_tokens"):
        ServeSettings(prefix_cache_tokens=-1)
