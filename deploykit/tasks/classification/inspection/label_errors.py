"""Find likely wrong labels, and words that occur with one label more often than by chance."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.attribution.words import split_words
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.rows import Example, label_parts

_MOST = 50
_LEAST_TEXTS = 5
_LEAST_Z = 4.5
"""Number of standard deviations from chance, large enough for thousands of tested words."""


def likely_label_errors(
    task: Classification, examples: Sequence[Example], truth: NDArray[Any], scores: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Return the rows that confident learning finds (Northcutt et al., JAIR 2021), the most likely errors first.

    A row is a likely error if the model gives another label at least the probability that rows of that label get on average, and
    more than the row's own label. cleanlab does the same, but would add pandas and scikit-learn as dependencies.
    """
    counts = truth.sum(axis=0)
    sums = np.where(truth, scores, 0.0).sum(axis=0)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    own = np.where(truth, scores, 0.0).sum(axis=1)
    confident = np.where(~truth & (scores >= thresholds), scores, -1.0)
    other = confident.argmax(axis=1)
    margin = confident.max(axis=1) - own
    rows = np.argsort(-margin, kind="stable")
    return [
        {
            "origin": examples[i].origin,
            "text": examples[i].asked,
            "label": examples[i].label,
            "likely": task.labels[other[i]],
            "probability": round(float(scores[i, other[i]]), 6),
        }
        for i in rows[:_MOST]
        if margin[i] > 0
    ]


def tied_words(task: Classification, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the 50 words whose texts have one label far more often than all texts, the least likely first.

    ``z`` is the distance from chance in standard deviations.
    """
    labels = Counter(name for e in examples for name in label_parts(e.label, multi_label=task.multi_label))
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    for example in examples:
        words = {example.asked[a:b].lower() for a, b in split_words(example.asked)}
        for word in words:
            totals[word] += 1
            texts[word].update(label_parts(example.label, multi_label=task.multi_label))
    found: list[dict[str, Any]] = []
    for word, total in totals.items():
        if total < _LEAST_TEXTS or not any(character.isalnum() for character in word):
            continue
        for label, count in texts[word].items():
            chance = labels[label] / len(examples)
            z = (count - total * chance) / math.sqrt(max(total * chance * (1 - chance), 1e-9))
            if z > _LEAST_Z:
                found.append({"word": word, "label": label, "texts": total, "share": count / total, "chance": chance,
                              "z": round(z, 2)})  # fmt: skip
    return sorted(found, key=lambda one: -one["z"])[:_MOST]
