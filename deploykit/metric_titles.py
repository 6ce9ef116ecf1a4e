"""Titles of metrics in tables."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "agreement": "agreement",
}
"""Metric -> title in tables."""
