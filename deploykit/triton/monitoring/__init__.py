"""A Grafana dashboard and Prometheus alert rules for the metrics of ``deploykit serve`` and of NVIDIA's container."""

from __future__ import annotations

from pathlib import Path

DASHBOARD = Path(__file__).parent / "dashboard.json"
ALERTS = Path(__file__).parent / "alerts.yaml"
