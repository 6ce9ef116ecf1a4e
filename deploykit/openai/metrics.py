"""Count the requests of the OpenAI port, in Prometheus' text format.

Source: Prometheus, "Exposition formats" and "Metric and label naming".
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metric:
    """A counter or gauge, with a value for each combination of label values."""

    kind = "counter"

    def __init__(self, name: str, description: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self._description = description
        self._labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self._description}"
        yield f"# TYPE {self.name} {self.kind}"
        yield from self._samples()

    def _samples(self) -> Iterator[str]:
        for values, value in self._values.items():
            yield f"{self.name}{self._set(values)} {value:g}"

    def _set(self, values: Sequence[str], **more: str) -> str:
        pairs = {**dict(zip(self._labels, values, strict=True)), **more}
        return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items()) + "}" if pairs else ""


class Gauge(Metric):
    kind = "gauge"

    def set(self, value: float) -> None:
        self._values[()] = value


class Histogram(Metric):
    """Seconds, counted in buckets."""

    kind = "histogram"

    def __init__(self, name: str, description: str, labels: Sequence[str]) -> None:
        super().__init__(name, description, labels)
        self._buckets: defaultdict[tuple[str, ...], list[int]] = defaultdict(lambda: [0] * (len(_SECONDS) + 1))

    def observe(self, seconds: float, *labels: str) -> None:
        self._buckets[labels][bisect_left(_SECONDS, seconds)] += 1
        self.add(seconds, *labels)

    def _samples(self) -> Iterator[str]:
        for values, counts in self._buckets.items():
            total = 0
            for bound, count in zip((*_SECONDS, math.inf), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{self._set(values, le='+Inf' if bound == math.inf else f'{bound:g}')} {total}"
            yield f"{self.name}_sum{self._set(values)} {self._values[values]:g}"
            yield f"{self.name}_count{self._set(values)} {total}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class PortMetrics:
    """The metrics of one port. ``error`` of a request is the code of OpenAI's form, or its HTTP status."""

    def __init__(self) -> None:
        of_request = ("route", "model")
        self.requests = Metric("deploykit_http_requests_total", "Requests answered", (*of_request, "status"))
        self.errors = Metric("deploykit_http_errors_total", "Requests answered with an error", (*of_request, "error"))
        self.in_flight = Gauge("deploykit_http_requests_in_flight", "Requests that are open")
        self.seconds = Histogram(
            "deploykit_http_request_seconds", "Time from a request to the end of its answer", of_request
        )
        self.first_token = Histogram(
            "deploykit_http_time_to_first_token_seconds",
            "Time from a request to the first token of a stream",
            ("model",),
        )
        self.prompt_tokens = Metric("deploykit_http_prompt_tokens_total", "Tokens of prompts", ("model",))
        self.completion_tokens = Metric("deploykit_http_completion_tokens_total", "Tokens of answers", ("model",))
        self.triton_up = Gauge("deploykit_triton_up", "1 if Triton answers, 0 while it is restarted")
        self.triton_restarts = Metric("deploykit_triton_restarts_total", "Starts of Triton after it ended")

    def text(self) -> str:
        """Return all metrics in Prometheus' text format."""
        metrics = [one for one in vars(self).values() if isinstance(one, Metric)]
        return "".join(f"{line}\n" for metric in metrics for line in metric.lines())
