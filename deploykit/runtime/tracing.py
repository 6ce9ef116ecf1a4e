"""Trace with OpenTelemetry: forward the context of a trace, and record the stages of an answer as spans."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploykit.errors import MissingDependencyError, UsageError

ENDPOINT_VARIABLE = "DEPLOYKIT_OTLP_ENDPOINT"
"""Environment variable that tells Triton's stubs where to send their spans."""
Stage = tuple[str, int, int]
"""Name, begin and end, in ns since 1970."""

_local = threading.local()
stage_cpu_ns: Counter[str] = Counter()
"""CPU time of all threads of this process during each stage so far. A model's process runs one stage at a time."""


def trace_headers() -> dict[str, str]:
    """Return the headers that make the receiver of a request part of the caller's trace (W3C Trace Context)."""
    headers: dict[str, str] = {}
    if propagate := sys.modules.get("opentelemetry.propagate"):  # without the package no trace can have begun
        propagate.inject(headers)
    return headers


def traces_url(endpoint: str) -> str:
    """Return the URL at which the collector at ``endpoint`` receives spans by OTLP over HTTP."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def tracer_provider(endpoint: str, service: str) -> Any:
    """Return a provider whose spans go to the collector at ``endpoint`` by OTLP over HTTP. Raises UsageError for an
    endpoint that is no URL; MissingDependencyError.

    Its ``shutdown`` sends the remaining spans.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--otlp-endpoint {endpoint}: is not an HTTP address", "write it like http://localhost:4318")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingDependencyError("OpenTelemetry is not installed", "pip install 'deploykit[otel]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(traces_url(endpoint))))
    return provider


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the CPU time of the block, and note its begin and end if this thread records its stages."""
    stages: list[Stage] | None = getattr(_local, "stages", None)
    begin, cpu = time.time_ns(), time.process_time_ns()
    try:
        yield
    finally:
        stage_cpu_ns[name] += time.process_time_ns() - cpu
        if stages is not None:
            stages.append((name, begin, time.time_ns()))


class StageSpans:
    """The spans of a model's process. It makes none unless ``ENDPOINT_VARIABLE`` is set."""

    def __init__(self) -> None:
        endpoint = os.environ.get(ENDPOINT_VARIABLE)
        self._provider = tracer_provider(endpoint, "deploykit-model") if endpoint else None

    @contextlib.contextmanager
    def of(self, requests: Sequence[Any]) -> Iterator[None]:
        """Make each stage of the block a span of every traced request, because the requests are answered together."""
        parents = [parent for request in requests if (parent := self.parent_of(request))]
        if not parents:
            yield
            return
        _local.stages = []
        try:
            yield
        finally:
            stages, _local.stages = _local.stages, None
            for parent in parents:
                self.add(parent, stages)

    def parent_of(self, request: Any) -> Mapping[str, str]:
        """Return the headers of Triton's span of a request; none if it is not traced."""
        if self._provider is None:
            return {}
        context = request.trace().get_context()
        return dict(json.loads(context)) if context else {}

    def add(self, parent: Mapping[str, str], stages: Sequence[Stage]) -> None:
        """Make each stage of a request a span; none if it has no ``parent``."""
        if self._provider is None or not parent:
            return
        from opentelemetry import propagate

        tracer, context = self._provider.get_tracer("deploykit"), propagate.extract(parent)
        for name, begin, end in stages:
            tracer.start_span(name, context=context, start_time=begin).end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()


@functools.cache
def stage_spans() -> StageSpans:
    """Return those of this process."""
    return StageSpans()
