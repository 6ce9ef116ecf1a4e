"""Map metrics to their titles in tables, and to points."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "exact_match": "exact match",
    "f1": "F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "pearson": "Pearson",
    "rmse": "RMSE",
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "token accuracy",
    "agreement": "agreement",
}
"""Metric -> title in tables."""

POINTS: Mapping[str, float] = {"macro_f1": 100.0, "bleu": 1.0, "chrf": 1.0, "loss": -100.0}
"""Metrics that ``--max-drop`` limits -> number of points of a metric of 1. A grader may name others. A loss is better
if lower; a point of it is 1 % of perplexity.
"""

_DIGITS: Mapping[str, int] = {"bleu": 2, "chrf": 2, "perplexity": 2}
"""Decimal places of metrics that are not shares."""

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "rmse", "mae", "expected_calibration_error"})
"""Metrics of errors."""


def lower_is_better(metric: str) -> bool:
    """Return whether a metric, named with or without dots, is an error."""
    return metric.rpartition(".")[2] in LOWER_IS_BETTER


def title_of(metric: str) -> str:
    """Return the title of a metric, named with or without dots: ``per_class.spam.f1`` is "F1 of spam".

    A metric of another package's task has its own name as title.
    """
    if metric.startswith("per_class."):
        _, _, label = metric.rpartition(".")[0].partition(".")
        return f"{title_of(metric.rpartition('.')[2])} of {label}"
    part, _, name = metric.rpartition(".")
    title = TITLES.get(name, name.replace("_f1", "-F1").replace("_", " "))
    return f"{title}, {part.replace('_', ' ')}" if part else title


def points_of(metric: str) -> float:
    """Return the number of points of a metric of 1; a metric that is not in ``POINTS`` is a share from 0 to 1."""
    return POINTS.get(metric, 100.0)


def with_interval(metrics: Mapping[str, Any], name: str, *, digits: int = 4) -> str:
    """Return a metric, and its 95 % interval in brackets if it was measured: 0.8123 [0.7911, 0.8330]."""
    return value_text(metrics[name], metrics.get("intervals", {}).get(name), _DIGITS.get(name, digits))


def value_text(value: float, interval: Sequence[float] | None, digits: int = 4) -> str:
    """Return a value, and its 95 % interval in brackets if there is one."""
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def verdict(differences: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> str:
    """Say whether two models differ in metrics, by ``differences`` of ``deploykit.bootstrap``."""
    beyond = [name for name in names if differences.get(name, {}).get("beyond_noise")]
    told = (f"{title_of(name)} {differences[name]['difference']:+.{_DIGITS.get(name, 4)}f}" for name in beyond)
    return f"beyond noise: {', '.join(told)}" if beyond else "within noise"


def models_of(metrics: Mapping[str, Any], held_out: str) -> dict[str, Mapping[str, Any]]:
    """Return the metrics of a run's held-out rows with those of the checkpoint "before" and of the "teacher", if they were
    measured; the run's own are under "after", or "" if they are alone."""
    found = {name: found for name in ("before", "teacher") if (found := metrics.get(name, {}).get(held_out))}
    return {**found, "after" if found else "": metrics[held_out]}


def compared_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return a line for each model that a run was compared with: whether they differ beyond noise."""
    compared = metrics.get("differences", {})
    return [f"against {name} (paired bootstrap, 95 %): {verdict(found, TITLES)}" for name, found in compared.items()]


def shown_metrics(metrics: Mapping[str, Any], headline: str) -> dict[str, str]:
    """Return the metrics to show in a table, those with a title and the ``headline``, with their titles."""
    return {name: title_of(name) for name in (*TITLES, headline) if name in metrics}


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among metrics, under dotted names: per_class.spam.f1."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= flat_metrics(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def main_metric(metrics: Mapping[str, float], headline: str) -> str:
    """Return the metric that a run is judged by: the task's ``headline``, or RMSE or the loss if it was not measured."""
    return next(name for name in (headline, "rmse", "loss", *metrics) if name in metrics)
