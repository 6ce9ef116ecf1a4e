"""Tell the language of a text, by py3langid's model of 97 languages (Lui and Baldwin, ACL 2012)."""

from __future__ import annotations

from functools import cache
from typing import Any

from deploykit.errors import MissingDependencyError

# Languages that short texts do not tell apart: a verdict between them would be a guess.
_KIN = (("no", "nn", "nso", "da"), ("hr", "sr", "bs"), ("id", "ms"), ("zh", "wuu", "yue"), ("ar", "ary", "arz"),
        ("cs", "sk"), ("gl", "es", "ext", "pt"), ("uz", "uzs"), ("fa", "ps"), ("hi", "mr", "ne"))  # fmt: skip


def covers(base: str) -> bool:
    """Return whether the model knows a language (its ISO 639-1 code)."""
    return base in _labels()


def probabilities(text: str) -> dict[str, float]:
    """Return how likely ``text`` is in each language that the model knows; they add up to 1."""
    return {str(label): float(p) for label, p in _model().rank(text)}


def akin(one: str, other: str) -> bool:
    """Return whether two languages are the same, or too alike for a verdict on short texts."""
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
