"""Prometheus metrics, named as vLLM names them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.responses import PlainTextResponse, Response

from veneer.serve.http.state import State
from veneer.serve.server import Server

SHOWN = 100  # adapters with a line of their own; the others are counted together
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HISTOGRAMS = {
    "time_to_first_token_seconds": ("first", SECONDS, "Seconds from a request to its first token"),
    "e2e_request_latency_seconds": ("total", SECONDS, "Seconds from a request to its end"),
    "request_queue_time_seconds": ("queued", SECONDS, "Seconds that a request waited"),
    "request_time_per_output_token_seconds": ("per_token", SECONDS, "Seconds a token after the first"),
    "request_prompt_tokens": ("prompt", TOKENS, "Tokens of a prompt"),
    "request_generation_tokens": ("completion", TOKENS, "Tokens of an answer"),
}


class Metrics:
    """A registry of its own, which reads the engine when it is asked."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.registry = CollectorRegistry()
        self.histograms = {
            of: Histogram(f"veneer_{name}", help, ["model_name"], buckets=buckets, registry=self.registry)
            for name, (of, buckets, help) in HISTOGRAMS.items()
        }
        self.ended: Counter[str] = Counter()
        self.registry.register(self)

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's format."""
        for end in self.server.engine.stats.drain():
            after = end.total - end.first
            values = {
                **end._asdict(),
                "per_token": after / (end.completion - 1) if end.completion > 1 else math.nan,
            }
            for of, histogram in self.histograms.items():
                if not math.isnan(values[of]):
                    histogram.labels(self.server.name).observe(values[of])
            self.ended.update(end.adapters or ("",))
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Any]:
        """Yields gauges and counters, as prometheus_client asks for them."""
        e, r = self.server.engine, self.server.registry
        gauges = {
            "num_requests_running": (e.stats.running, "Requests in the batch"),
            "num_requests_waiting": (e.queued, "Requests that wait"),
            "kv_cache_usage_perc": (
                e.reserved / e.limits.cache_tokens,
                "Share of the cache that is reserved",
            ),
            "prefix_cache_bytes": (e.prefixes.bytes, "Bytes of kept prompt beginnings"),
            "adapters_in_bank": (len(e.slots.placed), "Adapters in the bank"),
            "adapters_in_memory_bytes": (r.memory.bytes, "Bytes of adapters in RAM"),
            "adapters_known": (len(r.names()), "Adapters that can be asked for"),
            "engine_up": (int(self.server.supervisor.is_alive), "1 if the engine runs"),
        }
        counters = {
            "prompt_tokens": (e.stats.prompt_tokens, "Prompt tokens computed"),
            "generation_tokens": (e.stats.generated_tokens, "Tokens generated"),
            "prefix_cache_queries": (e.prefixes.asked, "Prompt tokens looked up in the prefix cache"),
            "prefix_cache_hits": (e.prefixes.hit, "Prompt tokens found in the prefix cache"),
            "steps": (e.stats.steps, "Steps computed"),
            "step_seconds": (e.stats.busy, "Seconds in steps"),
            "adapter_evictions": (e.slots.evictions, "Adapters that lost their place in the bank"),
            "adapter_failures": (r.failures, "Adapters that could not be read"),
            "engine_restarts": (self.server.supervisor.restarts, "Restarts of the engine"),
        }
        for name, (value, help) in gauges.items():
            yield _one(GaugeMetricFamily, name, help, self.server.name, value)
        for name, (value, help) in counters.items():
            yield _one(CounterMetricFamily, name, help, self.server.name, value)
        yield from self._by_adapter()

    def _by_adapter(self) -> Iterable[Any]:
        running: Counter[str] = Counter()
        for v in list(self.server.engine.slots.placed.values()):
            running[v.name] += v.running
        kinds: list[tuple[Any, str, str, Counter[str]]] = [
            (GaugeMetricFamily, "adapter_requests_running", "Running requests by adapter", running),
            (CounterMetricFamily, "adapter_requests", "Requests that ended by adapter", self.ended),
            (
                CounterMetricFamily,
                "adapter_tokens",
                "Tokens generated by adapter",
                self.server.engine.stats.by_adapter,
            ),
        ]
        for kind, name, help, counts in kinds:
            family = kind(f"veneer_{name}", help, labels=["adapter"])
            shown = counts.most_common(SHOWN)
            for adapter, n in shown:
                family.add_metric([adapter], n)
            rest = sum(counts.values()) - sum(n for _, n in shown)
            if rest:
                family.add_metric(["(others)"], rest)
            yield family


def _one(kind: Any, name: str, help: str, model: str, value: float) -> Any:
    family = kind(f"veneer_{name}", help, labels=["model_name"])
    family.add_metric([model], value)
    return family


def router(state: State) -> APIRouter:
    """Returns the route /metrics."""
    routes, metrics = APIRouter(), Metrics(state.server)

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def scrape() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return routes
