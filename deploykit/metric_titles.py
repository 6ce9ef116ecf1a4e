"""Name each metric for people."""

from __future__ import annotations

from collections.abc import Mapping

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "loss": "loss",
    "perplexity": "perplexity",
    "token_accuracy": "tokens right",
    "agreement": "agreement",
}
"""Of figures in tables, for people."""
