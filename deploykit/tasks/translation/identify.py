"""Identify the language of a text with py3langid's model of 97 languages (Lui and Baldwin, ACL 2012)."""

from __future__ import annotations

from functools import cache
from typing import Any

from deploykit.errors import MissingDependencyError

# Languages that short texts cannot distinguish.
_KIN = (("no", "nn", "nso", "da"), ("hr", "sr", "bs"), ("id", "ms"), ("zh", "wuu", "yue"), ("ar", "ary", "arz"),
        ("cs", "sk"), ("gl", "es", "ext", "pt"), ("uz", "uzs"), ("fa", "ps"), ("hi", "mr", "ne"))  # fmt: skip


def covers(base: str) -> bool:
    """Return whether the model knows the language with ISO 639-1 code ``base``."""
    return base in _labels()


def probabilities(text: str) -> dict[str, float]:
    """Return the probability of each language that the model knows; they sum to 1."""
    return {str(label): float(p) for label, p in _model().rank(text)}


def akin(one: str, other: str) -> bool:
    """Return whether two languages are the same, or too similar to distinguish in short texts."""
    return one == other or any(one in group and other in group for group in _KIN)


@cache
def _labels() -> frozenset[str]:
    return frozenset(map(str, _model().nb_classes))


@cache
def _model() -> Any:
    try:
        from py3langid import langid
    except ImportError as error:
        raise MissingDependencyError(
            "telling languages apart needs py3langid, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error
    return langid.LanguageIdentifier.from_pickled_model(langid.MODEL_FILE, norm_probs=True)
