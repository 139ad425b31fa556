"""Numbers for Prometheus: requests, tokens, times, and the engine's own counts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from llava_drip.engine import Engine, Usage

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PREFIX = "llava_drip_"

disable_created_metrics()  # a second series for each, of when it was made


class EngineCounts:
    """Engine.stats() at the moment of each scrape. Gauges, for the engine says of none that it only grows."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in sorted(self.engine.stats().items()):
            if isinstance(value, (int, float)):
                yield GaugeMetricFamily(f"{PREFIX}engine_{name}", f"Engine.stats(): {name}.", value)


class Metrics:
    """One registry an app, so that several may live in one process."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCounts(engine))
        ProcessCollector(registry=registry)
        self._requests = Counter(
            f"{PREFIX}requests", "Requests answered.", ["route", "method", "status"], registry=registry
        )
        self._seconds = Histogram(
            f"{PREFIX}request_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            f"{PREFIX}first_token_seconds",
            "From the call of the engine, the queue included, to the first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            f"{PREFIX}tokens", "Tokens: prompt (visual ones too), visual, completion.", ["kind"], registry=registry
        )
        self._finished = Counter(f"{PREFIX}answers", "Answers by why they ended.", ["finish"], registry=registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        method = method if method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
        self._requests.labels(route, method, status).inc()
        self._seconds.labels(route).observe(seconds)

    def answer(self, usage: Usage) -> None:
        """usage: of an answer that has ended."""
        self._finished.labels(usage.finish).inc()
        for kind, count in (
            ("prompt", usage.prompt_tokens),
            ("visual", usage.visual_tokens),
            ("completion", usage.new_tokens),
        ):
            self._tokens.labels(kind).inc(count)
        if usage.first_token_ms is not None:
            self._first.observe((usage.waited_ms + usage.first_token_ms) / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)
