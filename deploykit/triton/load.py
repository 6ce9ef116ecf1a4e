"""Read a server's metrics, and compute what its models did between two readings.

prometheus_client, which has a parser, is installed with servers only; ``deploykit top`` also runs elsewhere.

Source: Prometheus, "Exposition formats"; Triton, "Metrics".
"""

from __future__ import annotations

import http.client
import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from deploykit.errors import ServerError, UsageError
from deploykit.runtime.serving_settings import API_KEY_VARIABLE

_SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Reading:
    """The metrics of a server at ``time``, in seconds of the monotonic clock."""

    samples: tuple[Sample, ...]
    time: float

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of ``name`` that have these labels."""
        return sum(s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items())

    def values(self, label: str) -> list[str]:
        """Return the values of a label, in order."""
        return sorted({s.labels[label] for s in self.samples if s.labels.get(label)})


@dataclass(frozen=True)
class ModelLoad:
    """A model's work between two readings: rates a second, means a request; NaN where there was nothing to count.

    ``p50_seconds`` and ``p99_seconds`` are of the OpenAI port's requests: the bounds of the histogram's buckets, so
    approximate. ``kv_cache`` is from 0 to 1; NaN for a model without such caches.
    """

    model: str
    requests: float
    failures: float
    batch_rows: float
    queue_ms: float
    request_ms: float
    waiting: float
    running: float
    tokens: float
    kv_cache: float
    p50_seconds: float
    p99_seconds: float


@dataclass(frozen=True)
class PortLoad:
    """The work of the OpenAI port: rates a second, and requests that are open now."""

    requests: float
    errors: Mapping[str, float]
    in_flight: float


def read_metrics(url: str, api_key: str | None = None) -> Reading:
    """Return the metrics at ``url``, of a metrics port or an OpenAI port. Raises UsageError or ServerError."""
    address = url if re.match(r"https?://", url) else f"http://{url}"
    address = address.rstrip("/").removesuffix("/v1").removesuffix("/metrics") + "/metrics"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with build_opener(ProxyHandler({})).open(Request(address, headers=headers), timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except HTTPError as error:
        if error.code == 401:
            raise UsageError(f"{address}: needs an API key", f"give --api-key, or set {API_KEY_VARIABLE}") from None
        raise ServerError(
            f"{address}: answers status {error.code}", "give the metrics port or the OpenAI port"
        ) from None
    except (URLError, OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise ServerError(
            f"{address}: sends no metrics: {reason}", "give the metrics port of deploykit serve"
        ) from None
    samples = tuple(parse(text))
    if not any(sample.name.startswith(("nv_", "deploykit_")) for sample in samples):
        raise ServerError(f"{address}: has no metrics of Triton", "give the metrics port of deploykit serve")
    return Reading(samples, time.monotonic())


def parse(text: str) -> Iterable[Sample]:
    """Yield the samples of Prometheus' text format."""
    for line in text.splitlines():
        if found := _SAMPLE.fullmatch(line):
            yield Sample(found["name"], dict(_LABEL.findall(found["labels"] or "")), float(found["value"]))


def model_loads(before: Reading, after: Reading) -> list[ModelLoad]:
    """Return what each model did between two readings."""
    seconds = after.time - before.time

    def load(model: str) -> ModelLoad:
        def change(name: str) -> float:
            # A restarted server counts from 0.
            now, past = after.sum(name, model=model), before.sum(name, model=model)
            return now - past if now >= past else now

        succeeded = change("nv_inference_request_success")
        buckets = _buckets(before, after, model)
        has_cache = any(
            s.name == "deploykit_kv_cache_usage_ratio" and s.labels["model"] == model for s in after.samples
        )
        return ModelLoad(
            model,
            succeeded / seconds,
            change("nv_inference_request_failure") / seconds,
            _ratio(change("nv_inference_count"), change("nv_inference_exec_count")),
            _ratio(change("nv_inference_queue_duration_us"), succeeded) / 1000,
            _ratio(change("nv_inference_request_duration_us"), succeeded) / 1000,
            after.sum("nv_inference_pending_request_count", model=model)
            + after.sum("deploykit_waiting_sequences", model=model),
            after.sum("deploykit_running_sequences", model=model),
            change("deploykit_generated_tokens_total") / seconds,
            after.sum("deploykit_kv_cache_usage_ratio", model=model) if has_cache else math.nan,
            _quantile(0.5, buckets),
            _quantile(0.99, buckets),
        )

    return [load(model) for model in after.values("model")]


def port_load(before: Reading, after: Reading) -> PortLoad | None:
    """Return what the OpenAI port did; None if these are not its metrics."""
    if not any(sample.name == "deploykit_http_requests_in_flight" for sample in after.samples):
        return None
    seconds = after.time - before.time

    def rate(name: str, **labels: str) -> float:
        return max(after.sum(name, **labels) - before.sum(name, **labels), 0.0) / seconds

    errors = {kind: rate("deploykit_http_errors_total", error=kind) for kind in after.values("error")}
    return PortLoad(
        rate("deploykit_http_requests_total"),
        {kind: value for kind, value in errors.items() if value},
        after.sum("deploykit_http_requests_in_flight"),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _buckets(before: Reading, after: Reading, model: str) -> list[tuple[float, float]]:
    """Return upper bounds and the number of requests up to each."""
    name = "deploykit_http_request_seconds_bucket"
    bounds = sorted({s.labels["le"] for s in after.samples if s.name == name}, key=float)
    return [(float(le), after.sum(name, model=model, le=le) - before.sum(name, model=model, le=le)) for le in bounds]


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    """Return the upper bound of the bucket that has the quantile; NaN if nothing was counted."""
    total = buckets[-1][1] if buckets else 0.0
    return next((bound for bound, count in buckets if total and count >= share * total), math.nan)
