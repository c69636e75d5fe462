"""What the service counts, for Prometheus: HTTP requests, images, scores, and the engines' steps."""

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from selma_ray.serving.guards import App, Message, Receive, Scope, Send

__all__ = ["MeasureRequests", "Metrics", "engines_exposition", "summed"]

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
# A judge's scores lie in [0, 1], ImageReward's around 0, PickScore's about 20.
_SCORE_BUCKETS = (-2, -1, -0.5, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.5, 2, 15, 17.5, 20, 22.5, 25)
_OCCUPANCY_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The API's own counts."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "selma_http_requests", "Requests answered", ("method", "route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "selma_http_request_seconds", "Time to the end of the answer", ("route",),
            buckets=_LATENCY_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self.in_progress = Gauge("selma_http_requests_in_progress", "Requests not yet answered", registry=registry)
        self.images = Counter("selma_images", "Images drawn and not streamed", registry=registry)
        self._scores = Histogram("selma_score", "Scores given", ("metric",), buckets=_SCORE_BUCKETS, registry=registry)

    def count_scores(self, scores: Mapping[str, float | None]) -> None:
        """Count the scores of an image that could be read."""
        for metric, score in scores.items():
            if score is not None:
                self._scores.labels(metric).observe(score)

    def exposition(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._registry)


def engines_exposition(generators: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the counts of each generator replica in Prometheus' text format."""
    engines = CollectorRegistry()
    engines.register(_Engines(generators))
    return generate_latest(engines)


def summed(expositions: Sequence[bytes]) -> bytes:
    """Return the counts of several replicas of the API as one: whichever answers a scrape, no counter goes back."""
    if len(expositions) == 1:
        return expositions[0]
    registry = CollectorRegistry()
    registry.register(_Sum(expositions))
    return generate_latest(registry)


class _Sum:
    """Sums of all samples that have one name and the same labels; the times at which series began are left out."""

    def __init__(self, expositions: Sequence[bytes]) -> None:
        self._expositions = expositions

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics, as prometheus_client's registries ask for them."""
        families: dict[str, Metric] = {}
        sums: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for exposition in self._expositions:
            for family in text_string_to_metric_families(exposition.decode()):
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known = sums.setdefault(family.name, {})
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        series = sample.name, tuple(sample.labels.items())
                        known[series] = known.get(series, 0.0) + sample.value
        for name, family in families.items():
            for (sample_name, labels), value in sums[name].items():
                family.add_sample(sample_name, dict(labels), value)
            if family.samples:
                yield family


class _Engines:
    """The engines' counts, one series a replica."""

    def __init__(self, generators: Sequence[Mapping[str, Any]]) -> None:
        self._generators = generators

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all replicas, as prometheus_client's registries ask for them."""
        gauges = {
            "in_flight": "Images accepted and not answered",
            "waiting": "Images waiting for their first step",
            "row_step_s": "Seconds of a denoising step of one row",
            "start_s": "Seconds that loading took",
            "swap_s": "Seconds that the last change of merged weights took",
        }
        counters = {
            "steps": "Denoising steps, each of a batch",
            "image_steps": "Denoising steps, counted for each image",
            "images": "Images finished",
            "busy_s": "Seconds spent in denoising steps",
        }
        for field, text in gauges.items():
            yield self._family(GaugeMetricFamily(_name(field), text, labels=["replica"]), field)
        for field, text in counters.items():
            yield self._family(CounterMetricFamily(_name(field), text, labels=["replica"]), field)
        speed = GaugeMetricFamily("selma_engine_steps_per_busy_second", "Mean speed while at work", labels=["replica"])
        occupancy = HistogramMetricFamily("selma_engine_batch_images", "Images that shared a step", labels=["replica"])
        for generator in self._generators:
            speed.add_metric([generator["replica"]], generator["steps"] / (generator["busy_s"] or 1))
            buckets = [
                (str(float(bound)), sum(steps for size, steps in generator["occupancy"].items() if size <= bound))
                for bound in _OCCUPANCY_BUCKETS
            ]
            occupancy.add_metric(
                [generator["replica"]], [*buckets, ("+Inf", generator["steps"])], sum_value=generator["image_steps"]
            )
        yield speed
        yield occupancy

    def _family(self, family: Any, field: str) -> Metric:
        for generator in self._generators:
            family.add_metric([generator["replica"]], generator[field])
        return family


def _name(field: str) -> str:
    return "selma_engine_" + (field.removesuffix("_s") + "_seconds" if field.endswith("_s") else field)


class MeasureRequests:
    """Counts requests by route and status, and how long they took."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = "none"
        started_s = time.monotonic()

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, send_noted)
        except asyncio.CancelledError:
            status = "499"  # the client has gone: nginx has this number for it
            raise
        finally:
            # A path that is no route of ours is a stranger's text, which must not become a series of its own.
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD") else "other"
            self._metrics.in_progress.dec()
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(route).observe(time.monotonic() - started_s)
