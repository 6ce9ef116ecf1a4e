"""Compare new rows with measured ones: lengths, words, and other properties that a task compares.

The Kolmogorov-Smirnov test is that of scipy.stats.ks_2samp; serving machines, where models are evaluated too, have no scipy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.words import split_words

_LEAST_P = 0.01
_MOST_WORDS = 20
_LEAST_TEXTS = 3


def drift(texts: Sequence[str], new: Sequence[str], properties: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Compare new rows with those that were measured: their texts, and other ``properties`` (values in both).

    ``tests`` has for each property its mean in both, the Kolmogorov-Smirnov statistic and its p-value; ``drifts`` if
    that is below 0.01, divided by the number of tests. ``words`` are the words that became much more frequent.
    """
    known = [_words(text) for text in texts]
    found = [_words(text) for text in new]
    vocabulary = set().union(*known) if known else set()
    # Half of the known rows is searched for words that the other half does not have, because any rows have new words.
    halves = [set().union(*known[i::2]) if known[i::2] else set() for i in (0, 1)]
    properties = {
        "words of a text": ([len(text.split()) for text in texts], [len(text.split()) for text in new]),
        "share of unknown words": (
            [_unknown(words, halves[1 - i % 2]) for i, words in enumerate(known)],
            [_unknown(words, halves[i % 2]) for i, words in enumerate(found)],
        ),
        **properties,
    }
    tests = []
    for name, (before, after) in properties.items():
        a, b = np.asarray(before, float), np.asarray(after, float)
        statistic = ks_statistic(a, b)
        p = ks_p_value(statistic, len(a), len(b))
        tests.append({"property": name, "before": float(a.mean()), "after": float(b.mean()), "statistic": round(statistic, 4),
                      "p": p, "drifts": p < _LEAST_P / len(properties)})  # fmt: skip
    return {
        "rows": len(new),
        "tests": tests,
        "words": _risen(known, found),
        "unknown_words": len(set().union(*found) - vocabulary),
    }


def ks_statistic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the largest distance between the distribution functions of two samples."""
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def ks_p_value(statistic: float, a: int, b: int) -> float:
    """Return the asymptotic probability of a distance as large by chance, of samples of ``a`` and ``b`` values."""
    size = math.sqrt(a * b / (a + b))
    scaled = (size + 0.12 + 0.11 / size) * statistic  # Stephens, 1970
    if scaled < 0.2:
        return 1.0
    terms = (math.copysign(math.exp(-2 * (k * scaled) ** 2), 1 if k % 2 else -1) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * math.fsum(terms)))


def _words(text: str) -> set[str]:
    return {text[a:b].lower() for a, b in split_words(text)}


def _unknown(words: set[str], known: set[str]) -> float:
    return len(words - known) / max(1, len(words))


def _risen(known: Sequence[set[str]], found: Sequence[set[str]]) -> list[dict[str, Any]]:
    """Return the words whose share of texts rose most, in standard deviations of chance."""
    before, after = (Counter(word for words in texts for word in words) for texts in (known, found))
    risen: list[dict[str, Any]] = []
    for word, count in after.items():
        if count < _LEAST_TEXTS:
            continue
        a, b = before[word] / len(known), count / len(found)
        both = (before[word] + count) / (len(known) + len(found))
        z = (b - a) / math.sqrt(max(both * (1 - both) * (1 / len(known) + 1 / len(found)), 1e-12))
        if z > 3:
            risen.append({"word": word, "before": a, "after": b, "z": round(z, 2)})
    return sorted(risen, key=lambda one: -one["z"])[:_MOST_WORDS]
