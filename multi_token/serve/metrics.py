"""Prometheus metrics of one server, named as vLLM and OpenTelemetry name theirs.

Labels are the run's modalities, HTTP statuses and reasons from our own code. A text from a client
never becomes a label: each new value would be a time series forever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from multi_token.serve.engines.engine import Engine

if TYPE_CHECKING:
    from multi_token.serve.admission import Admission
    from multi_token.serve.media.pool import MediaPool
    from multi_token.serve.media_embeddings import MediaEmbedder
    from multi_token.serve.openai.output import RequestOutput

_PREFIX = "multi_token"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(frozen=True, eq=False)
class _CallbackCounter(Collector):
    """Counter whose values, by label, are read at each scrape; prometheus_client has none."""

    name: str
    help: str
    values: Callable[[], Mapping[str, float]]
    label: str | None = None

    def collect(self) -> Iterator[CounterMetricFamily]:
        labels = [self.label] if self.label else []
        family = CounterMetricFamily(f"{_PREFIX}_{self.name}", self.help, labels=labels)
        # A copy: other threads add labels while this one iterates.
        for value, number in sorted(dict(self.values()).items()):
            family.add_metric([value] if self.label else [], number)
        yield family


class Metrics:
    """Metrics in a registry of their own, so that two servers in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, modalities: Collection[str]) -> None:
        self.registry = CollectorRegistry()
        self._modalities = frozenset(modalities)
        counter, seconds = self._counter, self._histogram
        self.requests = counter("requests", "Requests by HTTP status.", "status")
        self.rejections = counter(
            "admission_rejections", "Requests refused at admission, by reason.", "reason"
        )
        self.aborted = counter(
            "requests_aborted", "Requests that did not complete, by reason.", "reason"
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens, media included.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.media_tokens = counter(
            "media_tokens", "Media embeddings in prompts, by modality.", "modality"
        )
        self.engine_restarts = counter("engine_restarts", "Restarts of a dead engine.")
        self.first_token = seconds(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self.per_token = seconds(
            "time_per_output_token_seconds",
            "Mean time of a request's tokens after its first.",
            buckets=_TOKEN_SECONDS,
        )
        self.latency = seconds(
            "e2e_request_latency_seconds", "From a request's arrival to its end."
        )
        self.queue_time = seconds(
            "request_queue_time_seconds", "From a prompt's submission to its first token."
        )
        self.media_decode = seconds(
            "media_decode_seconds", "From an item's bytes to its encoder's inputs.", "modality"
        )
        self.encoder = seconds(
            "encoder_seconds", "From encoder inputs to media embeddings, of one item."
        )

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(name, help, labels, namespace=_PREFIX, registry=self.registry)

    def _histogram(
        self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = _SECONDS
    ) -> Histogram:
        return Histogram(
            name, help, labels, namespace=_PREFIX, registry=self.registry, buckets=buckets
        )

    def _watch_gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        Gauge(name, help, namespace=_PREFIX, registry=self.registry).set_function(value)

    def _watch_counter(self, name: str, help: str, value: Callable[[], float]) -> None:
        self.registry.register(_CallbackCounter(name, help, lambda: {"": value()}))

    def watch(
        self,
        engine: Engine,
        admission: Admission,
        media_pool: MediaPool,
        cache: MediaEmbedder,
    ) -> None:
        """Add gauges and counters that read a server's parts at each scrape."""
        gauge, counter = self._watch_gauge, self._watch_counter
        gauge("num_requests_running", "Requests in the engine.", lambda: engine.num_running)
        gauge("num_requests_waiting", "Requests in its queue.", lambda: engine.num_waiting)
        gauge("num_requests_admitted", "Admitted requests.", lambda: admission.num_admitted)
        gauge("num_media_waiting", "Items to be decoded.", lambda: media_pool.num_waiting)
        gauge("media_memory_bytes", "Bodies and media held.", lambda: media_pool.memory.num_bytes)
        gauge("media_cache_bytes", "Cached media embeddings.", lambda: cache.num_bytes)
        counter("media_cache_queries", "Items looked up.", lambda: cache.num_queries)
        counter("media_cache_hits", "Items found in the cache.", lambda: cache.num_hits)
        if engine.is_remote:
            gauge("engines_alive", "vLLM servers that are up.", lambda: engine.num_replicas)
            retries = _CallbackCounter(
                "engine_retries",
                "Prompts sent to a second server.",
                lambda: engine.retries,
                "reason",
            )
            self.registry.register(retries)
        else:
            stats = engine.prefix_stats
            gauge("kv_cache_usage_perc", "Share in use, 0 to 1.", lambda: engine.cache_usage)
            counter("prefix_cache_queries", "Prompt tokens.", lambda: stats.num_queries)
            counter("prefix_cache_hits", "Prompt tokens in the cache.", lambda: stats.num_hits)

    def record_output(self, output: RequestOutput, *, arrived: float, submitted: float) -> None:
        """Count a request that has ended.

        `arrived`, `submitted`: `time.monotonic` of the request, and of its prompt in the engine.
        """
        now = time.monotonic()
        usage = output.usage()
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.generation_tokens.inc(usage["completion_tokens"])
        for name, number in usage["prompt_tokens_details"]["media_tokens"].items():
            self.media_tokens.labels(self.modality_label(name)).inc(number)
        self.latency.observe(now - arrived)
        if not output.is_complete:
            self.aborted.labels(output.failure or "client_gone").inc()
        if output.first_token_time is None:
            return
        self.first_token.observe(output.first_token_time - arrived)
        self.queue_time.observe(output.first_token_time - submitted)
        # The choices of one request are generated side by side, so their tokens share the time.
        if output.num_tokens > output.num_choices:
            seconds = now - output.first_token_time
            per_choice = output.num_tokens / output.num_choices
            self.per_token.observe(seconds / max(1.0, per_choice - 1))

    def modality_label(self, name: str) -> str:
        """Return a modality's label: one of the run's names, or `other`."""
        return name if name in self._modalities else "other"

    def render(self) -> bytes:
        """Return the body of `/metrics`."""
        return generate_latest(self.registry)
