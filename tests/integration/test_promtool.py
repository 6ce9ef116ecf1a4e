"""Prometheus' own tool reads the alert rules, the dashboard's queries and the autoscaler's metric, and computes them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploykit.triton.kubernetes import write_kubernetes
from deploykit.triton.monitoring import ALERTS, DASHBOARD

PROMTOOL = Path(os.environ.get("PROMTOOL_FOLDER", "/tmp/deploykit-promtool")) / "usr/bin/promtool"
pytestmark = pytest.mark.skipif(not PROMTOOL.is_file(), reason=f"{PROMTOOL} is missing: make interop fetches it")

OF_MODEL = '{namespace="n",pod="a",instance="i",model="m"}'
HEALTHY = {
    "nv_inference_count" + OF_MODEL: "0+600x30",
    "nv_inference_request_success" + OF_MODEL: "0+600x30",
    "nv_inference_queue_duration_us" + OF_MODEL: "0+12000000x30",
    "deploykit_running_sequences" + OF_MODEL: "8x30",
    "deploykit_waiting_sequences" + OF_MODEL: "2x30",
    "deploykit_kv_cache_usage_ratio" + OF_MODEL: "0.5x30",
    'deploykit_triton_up{instance="i"}': "1x30",
    'deploykit_triton_restarts_total{instance="i"}': "0x30",
    'deploykit_http_requests_total{instance="i",status="200"}': "0+600x30",
}
"""Series of a server, each with the value at the start and its change in each minute."""


def promtool(*words: object) -> None:
    done = subprocess.run([PROMTOOL, *map(str, words)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def computes(folder: Path, rules: Path, series: Mapping[str, str], query: str, expected: Mapping[str, float]) -> None:
    """Check what ``query`` gives 25 minutes after the start, by labels."""
    samples = [{"labels": labels, "value": value} for labels, value in expected.items()]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "25m", "exp_samples": samples}],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}))
    promtool("test", "rules", file)


def write_rules(folder: Path, queries: list[str]) -> Path:
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(queries)]
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", file)
    return file


@pytest.mark.parametrize(
    ("alert", "changed"),
    [
        ("", {}),
        ("TritonAway", {"nv_inference_count" + OF_MODEL: "_x30"}),
        ("TritonDown", {'deploykit_triton_up{instance="i"}': "0x30"}),
        ("TritonRestarts", {'deploykit_triton_restarts_total{instance="i"}': "0+1x30"}),
        ("ModelFails", {'nv_inference_request_failure{instance="i",model="m",reason="BACKEND"}': "0+60x30"}),
        ("", {'nv_inference_request_failure{instance="i",model="m",reason="CANCELED"}': "0+60x30"}),
        ("QueueSlow", {"nv_inference_queue_duration_us" + OF_MODEL: "0+600000000x30"}),
        ("CachesFull", {"deploykit_kv_cache_usage_ratio" + OF_MODEL: "0.99x30"}),
        ("SequencesWait", {"deploykit_waiting_sequences" + OF_MODEL: "40x30"}),
        ("PortFails", {'deploykit_http_requests_total{instance="i",status="503"}': "0+60x30"}),
        ("RequestsRejected", {'deploykit_http_errors_total{instance="i",error="queue_full"}': "0+6x30"}),
        ("KeysRefused", {'deploykit_http_errors_total{instance="i",error="invalid_api_key"}': "0+120x30"}),
        (
            "FirstTokenSlow",
            {
                f'deploykit_http_time_to_first_token_seconds_bucket{{instance="i",model="m",le="{le}"}}': f"0+{n}x30"
                for le, n in (("1", 0), ("10", 600), ("+Inf", 600))
            },
        ),
    ],
)
def test_an_alert_fires_at_its_fault_alone(alert: str, changed: dict[str, str], tmp_path: Path) -> None:
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    expected = {f'{{alertname="{alert}"}}': 1.0} if alert else {}
    computes(tmp_path, ALERTS, {**HEALTHY, **changed}, firing, expected)


def test_prometheus_reads_the_queries_of_the_dashboard(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 20
    write_rules(tmp_path, [query.replace("$__rate_interval", "5m").replace("$model", ".*") for query in queries])


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"deploykit_waiting_sequences" + OF_MODEL: "_x30"}, 20_000),
        ({}, 20_000 + 2e6 / 10),  # 2 sequences wait, and 10 requests arrive each second
        (dict.fromkeys(HEALTHY, "0x30"), 0),  # nothing to do
    ],
    ids=["in Triton", "in the model too", "idle"],
)
def test_the_autoscalers_metric_is_the_time_in_queues(changed: dict[str, str], expected: float, tmp_path: Path) -> None:
    write_kubernetes("tweets", tmp_path, gpus=0)
    values: dict[str, Any] = yaml.safe_load((tmp_path / "prometheus-adapter.yaml").read_text())
    [rule] = values["rules"]["custom"]
    query = (
        rule["metricsQuery"].replace("<<.GroupBy>>", "namespace, pod").replace("<<.LabelMatchers>>", 'namespace="n"')
    )
    rules = write_rules(tmp_path, [query.replace("[1m]", "[2m]")])  # the series have a value each minute
    computes(tmp_path, rules, {**HEALTHY, **changed}, "query:0", {'query:0{namespace="n",pod="a"}': expected})
