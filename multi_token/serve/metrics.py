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

from multi_token.serve.engines.base import Engine, SupportsPrefixStats, SupportsReplicas

if TYPE_CHECKING:
    from multi_token.serve.admission import Admission
    from multi_token.serve.media.pool import MediaPool
    from multi_token.serve.media_embeddings import MediaEmbedder
    from multi_token.serve.openai.output import RequestOutput

_PREFIX = "multi_token"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(frozen=True)
class _CallbackCounter(Collector):
    name: str
    help: str
    value: Callable[[], float]

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.help, value=self.value())


@dataclass(frozen=True, eq=False)
class _LabelledCallbackCounter(Collector):
    name: str
    help: str
    label: str
    values: Mapping[str, float]

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self.name, self.help, labels=[self.label])
        for kind, value in sorted(dict(self.values).items()):
            family.add_metric([kind], value)
        yield family


class Metrics:
    """Metrics in a registry of their own, so that two servers in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, modalities: Collection[str]) -> None:
        self.registry = CollectorRegistry()
        self._modalities = frozenset(modalities)
        common = {"namespace": _PREFIX, "registry": self.registry}
        self.requests = Counter("requests", "Requests by HTTP status.", ["status"], **common)
        self.rejections = Counter(
            "admission_rejections",
            "Requests refused at admission, by reason.",
            ["reason"],
            **common,
        )
        self.aborted = Counter(
            "requests_aborted", "Requests that did not complete, by reason.", ["reason"], **common
        )
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens, media included.", **common)
        self.generation_tokens = Counter("generation_tokens", "Generated tokens.", **common)
        self.media_tokens = Counter(
            "media_tokens", "Media embeddings in prompts, by modality.", ["modality"], **common
        )
        self.engine_restarts = Counter("engine_restarts", "Restarts of a dead engine.", **common)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            **common,
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds",
            "Mean time of a request's tokens after its first.",
            buckets=_TOKEN_SECONDS,
            **common,
        )
        self.latency = Histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its end.",
            buckets=_SECONDS,
            **common,
        )
        self.queue_time = Histogram(
            "request_queue_time_seconds",
            "From a prompt's submission to its first token.",
            buckets=_SECONDS,
            **common,
        )
        self.media_decode = Histogram(
            "media_decode_seconds",
            "From an item's bytes to its encoder's inputs.",
            ["modality"],
            buckets=_SECONDS,
            **common,
        )
        self.encoder = Histogram(
            "encoder_seconds",
            "From encoder inputs to media embeddings, of one request.",
            buckets=_SECONDS,
            **common,
        )

    def watch(
        self,
        engine: Engine,
        admission: Admission,
        media_pool: MediaPool,
        media_embedder: MediaEmbedder,
    ) -> None:
        """Add gauges and counters that read a server's parts at each scrape."""
        gauge, counter = self.add_gauge, self.add_counter
        gauge("num_requests_running", "Requests in the engine.", lambda: engine.num_running)
        gauge("num_requests_waiting", "Requests in its queue.", lambda: engine.num_waiting)
        gauge("num_requests_admitted", "Admitted requests.", lambda: admission.num_admitted)
        gauge("num_media_waiting", "Items to be decoded.", lambda: media_pool.num_waiting)
        cache = media_embedder
        gauge("media_cache_bytes", "Cached media embeddings.", lambda: cache.num_bytes)
        counter("media_cache_queries", "Items looked up.", lambda: cache.num_queries)
        counter("media_cache_hits", "Items found in the cache.", lambda: cache.num_hits)
        if isinstance(engine, SupportsPrefixStats):
            stats = engine.prefix_stats
            gauge("kv_cache_usage_perc", "Share in use, 0 to 1.", lambda: engine.cache_usage)
            counter("prefix_cache_queries", "Prompt tokens.", lambda: stats.num_queries)
            counter("prefix_cache_hits", "Prompt tokens in the cache.", lambda: stats.num_hits)
        if isinstance(engine, SupportsReplicas):
            gauge("engines_alive", "vLLM servers that are up.", lambda: engine.num_replicas)
            self.add_labelled_counter(
                "engine_retries", "Prompts sent to a second server.", "reason", engine.retries
            )

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
        # the choices of one request are generated side by side, so their tokens share the time
        if output.num_tokens > output.num_choices:
            seconds = now - output.first_token_time
            per_choice = output.num_tokens / output.num_choices
            self.per_token.observe(seconds / max(1.0, per_choice - 1))

    def add_gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read at each scrape."""
        gauge = Gauge(name, help, namespace=_PREFIX, registry=self.registry)
        gauge.set_function(value)

    def add_counter(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a counter whose value is read at each scrape."""
        self.registry.register(_CallbackCounter(f"{_PREFIX}_{name}", help, value))

    def add_labelled_counter(
        self, name: str, help: str, label: str, values: Mapping[str, float]
    ) -> None:
        """Add counters by label, read from a mapping at each scrape."""
        self.registry.register(_LabelledCallbackCounter(f"{_PREFIX}_{name}", help, label, values))

    def modality_label(self, name: str) -> str:
        """Return a modality's label: one of the run's names, or `other`."""
        return name if name in self._modalities else "other"

    def render(self) -> bytes:
        """Return the body of `/metrics`."""
        return generate_latest(self.registry)
