"""Parts of the Triton backend for tasks that decode: metrics of the load, and answers that are sent later."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from deploykit.errors import QueueFullError
from deploykit.runtime.decode_loop import Client, DecodeLoop, Load, Unit
from deploykit.runtime.tracing import Stage, stage_spans
from deploykit.runtime.triton_requests import CancelledError, FailedError, RefusedError


class LoadMetrics:
    """Triton metrics of the model with this ``config``, in addition to the standard ones."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        def metric(kind: int, what: str, description: str) -> Any:
            family = pb_utils.MetricFamily(name=f"deploykit_{what}", description=description, kind=kind)
            self._families.append(family)  # keep the family alive: its metrics die with it
            return family.Metric(labels={"model": str(config["name"])})

        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        self._families: list[Any] = []
        self._running = metric(gauge, "running_sequences", "Sentences or answers being decoded")
        self._waiting = metric(gauge, "waiting_sequences", "Sentences or answers that wait for room in the batch")
        self._cache_use = metric(gauge, "kv_cache_usage_ratio", "Share of the key-value caches in use, 0 to 1")
        self._tokens = metric(counter, "generated_tokens_total", "Tokens generated")
        self._cancelled = metric(counter, "cancelled_requests_total", "Requests whose client left before the answer")
        self._instances = sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in config["instance_group"])
        self._reported = Load(0, 0, 0, 0, 0.0)

    def report(self, load: Load) -> None:
        last, self._reported = self._reported, load
        # Report changes, not values: instances of one model share its metrics.
        for metric, change in (
            (self._running, load.running - last.running),
            (self._waiting, load.waiting - last.waiting),
            (self._cache_use, (load.cache_use - last.cache_use) / self._instances),
            (self._tokens, load.tokens - last.tokens),
            (self._cancelled, load.cancelled - last.cancelled),
        ):
            if change:
                metric.increment(change)


class RequestTrace:
    """The trace of a request that is answered later. Its first stage begins with it."""

    def __init__(self, request: Any) -> None:
        self._parent = stage_spans().parent_of(request)
        self._begin = time.time_ns()

    def add(self, stages: Sequence[Stage]) -> None:
        """Make the decode loop's stages spans, after "tokenize", all before them."""
        _, submitted, _ = stages[0]
        stage_spans().add(self._parent, [("tokenize", self._begin, submitted), *stages])


def send_last(sender: Any, response: Any = None) -> None:
    """Send a request's last response; None: only that no more will come."""
    if response is None:
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    else:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def send_failure(sender: Any, error: Exception | None) -> None:
    """Send ``error`` as a request's last response; None: the client cancelled it."""
    send_last(sender, (CancelledError() if error is None else FailedError(error)).response())


def submit(loop: DecodeLoop[Any], client: Client, units: Sequence[Unit]) -> None:
    """Queue ``units``. Raises RefusedError when the queue is full."""
    try:
        loop.submit(client, units)
    except QueueFullError as full:
        raise RefusedError(full.message, pb_utils.TritonError.UNAVAILABLE) from None


def log_error(error: Exception) -> None:
    """Log an error for the operator."""
    pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
