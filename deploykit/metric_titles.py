"""Name each metric for people, and say how many points one of it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "pearson": "Pearson",
    "rmse": "RMSE",
    "agreement": "agreement",
}
"""Of figures in tables, for people."""

POINTS: Mapping[str, float] = {"macro_f1": 100.0, "bleu": 1.0, "chrf": 1.0}
"""The metrics that ``--max-drop`` limits, and how many points one of each is. A grader may name others."""


def title_of(metric: str) -> str:
    """Return the title of a metric; one that another package's task measures is called by its name."""
    return TITLES.get(metric, metric.replace("_", " "))


def points_of(metric: str) -> float:
    """Return how many points one of a metric is: a metric that is not in ``POINTS`` is a share from 0 to 1."""
    return POINTS.get(metric, 100.0)


def shown_metrics(metrics: Mapping[str, Any], headline: str) -> dict[str, str]:
    """Return the metrics that a table has room for, those with a title and the ``headline``, and their titles."""
    return {name: title_of(name) for name in (*TITLES, headline) if name in metrics}
