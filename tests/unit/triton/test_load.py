"""Metrics are read as Prometheus writes them, and a load is what changed between two readings."""

from __future__ import annotations

import math

import pytest

from deploykit.errors import ServerError
from deploykit.openai.metrics import PortMetrics
from deploykit.triton.load import Reading, model_loads, parse, port_load, read_metrics


def reading(time: float, requests: int, seconds: tuple[float, ...] = ()) -> Reading:
    """A server whose model "m" answered so many requests, each of 2 rows, one in two rows a batch."""
    port = PortMetrics()
    for one in seconds:
        port.seconds.labels("/v1/classify", "m").observe(one)
        port.requests.labels("/v1/classify", "m", 200).inc()
    port.errors.labels("/v1/classify", "m", "queue_full").inc(requests)
    port.in_flight.set(3)
    tritons = f"""# HELP nv_inference_request_success Number
nv_inference_request_success{{model="m",version="1"}} {requests}
nv_inference_request_failure{{model="m",reason="REJECTED",version="1"}} 0
nv_inference_count{{model="m",version="1"}} {requests * 2}
nv_inference_exec_count{{model="m",version="1"}} {requests / 2}
nv_inference_queue_duration_us{{model="m",version="1"}} {requests * 3000}
"""
    return Reading(tuple(parse(tritons + port.text())), time)


def test_rates_and_means_are_of_the_time_between() -> None:
    before, after = reading(10.0, 100, (0.02,)), reading(12.0, 120, (0.02, 0.02, 0.3))
    [load] = model_loads(before, after)
    assert (load.model, load.requests, load.failures, load.batch_rows, load.queue_ms) == ("m", 10, 0, 4, 3)
    assert (load.p50_seconds, load.p99_seconds) == (0.025, 0.5)
    assert math.isnan(load.kv_cache)
    port = port_load(before, after)
    assert port is not None
    assert (port.requests, port.errors, port.in_flight) == (1, {"queue_full": 10}, 3)


def test_a_server_that_started_again_counts_from_zero() -> None:
    [load] = model_loads(reading(0.0, 100), reading(1.0, 8))
    assert load.requests == 8
    [load] = model_loads(reading(0.0, 8), reading(1.0, 8))
    assert math.isnan(load.batch_rows)
    assert math.isnan(load.p99_seconds)


def test_escaped_label_values_are_read() -> None:
    port = PortMetrics()
    port.prompt_tokens.labels('a "b"').inc(2)
    [sample] = [sample for sample in parse(port.text()) if sample.name == "deploykit_http_prompt_tokens_total"]
    assert (sample.labels["model"], sample.value) == (r"a \"b\"", 2), "as it is written"


def test_no_server_is_an_error() -> None:
    with pytest.raises(ServerError, match="sends no metrics"):
        read_metrics("127.0.0.1:1")
