"""The metrics of the OpenAI port, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the number of series

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class PortMetrics:
    """The metrics of one port. ``error`` of a request is the code of OpenAI's form, or its HTTP status."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        of_request = ("route", "model")
        self.requests = Counter(
            "deploykit_http_requests", "Requests answered", (*of_request, "status"), registry=registry
        )
        self.errors = Counter(
            "deploykit_http_errors", "Requests answered with an error", (*of_request, "error"), registry=registry
        )
        self.in_flight = Gauge("deploykit_http_requests_in_flight", "Requests that are open", registry=registry)
        self.seconds = Histogram(
            "deploykit_http_request_seconds", "Time from a request to the end of its answer", of_request,
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.first_token = Histogram(
            "deploykit_http_time_to_first_token_seconds", "Time from a request to the first token of a stream",
            ("model",), registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.prompt_tokens = Counter("deploykit_http_prompt_tokens", "Tokens of prompts", ("model",), registry=registry)
        self.completion_tokens = Counter(
            "deploykit_http_completion_tokens", "Tokens of answers", ("model",), registry=registry
        )
        self.triton_up = Gauge("deploykit_triton_up", "1 if Triton answers, 0 while it is restarted", registry=registry)
        self.triton_restarts = Counter(
            "deploykit_triton_restarts", "Starts of Triton after it ended", registry=registry
        )

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()
