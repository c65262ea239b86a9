"""Prometheus metrics of one server, named as vLLM and OpenTelemetry name theirs.

Border: counts and times that others hand in. Labels are senses of the run, statuses and reasons of
ours: nothing that a client writes becomes one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

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
    """Its own registry: two servers in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, modalities: Collection[str]) -> None:
        self.registry = CollectorRegistry()
        self._modalities = frozenset(modalities)
        common = {"namespace": _PREFIX, "registry": self.registry}
        self.requests = Counter("requests", "Requests by HTTP status.", ["status"], **common)
        self.rejections = Counter(
            "admission_rejections", "Requests that were refused a place.", ["reason"], **common
        )
        self.aborted = Counter(
            "requests_aborted", "Answers that were not completed.", ["reason"], **common
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, media's too.", **common)
        self.generation_tokens = Counter("generation_tokens", "Tokens of answers.", **common)
        self.media_tokens = Counter(
            "media_tokens", "Tokens of media in prompts.", ["modality"], **common
        )
        self.engine_restarts = Counter("engine_restarts", "Starts of a dead engine.", **common)
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first token of its answer.",
            buckets=_SECONDS,
            **common,
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds",
            "Mean time of an answer's tokens behind its first.",
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
            "From bytes of an item to inputs of its encoder.",
            ["modality"],
            buckets=_SECONDS,
            **common,
        )
        self.encoder = Histogram(
            "encoder_seconds",
            "From inputs of encoders to projected tokens, of one request.",
            buckets=_SECONDS,
            **common,
        )

    def add_gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        gauge = Gauge(name, help, namespace=_PREFIX, registry=self.registry)
        gauge.set_function(value)

    def add_counter(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A counter that somebody else counts, read when somebody asks."""
        self.registry.register(_CallbackCounter(f"{_PREFIX}_{name}", help, value))

    def add_labelled_counter(
        self, name: str, help: str, label: str, values: Mapping[str, float]
    ) -> None:
        """Counters by a label, in a mapping that somebody else counts up."""
        self.registry.register(_LabelledCallbackCounter(f"{_PREFIX}_{name}", help, label, values))

    def modality_label(self, name: str) -> str:
        """A label for a sense, of the run's own names only."""
        return name if name in self._modalities else "other"

    def render(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self.registry)
