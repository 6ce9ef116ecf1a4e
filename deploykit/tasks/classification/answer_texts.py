"""Answer texts with a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.tasks.classification.facts import from_text
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.protocol import Answer


def answer_texts(predictor: TextClassifier, texts: Sequence[str]) -> list[Answer]:
    """Return for each text the label, its ``score`` (multi-label: the highest of any label) and the ``scores`` of all."""
    scores = predictor.scores(texts)
    names = predictor.task.labels
    return [
        Answer(
            label,
            fields={
                "label": label,
                "score": round(float(row.max()), 6),
                "scores": {name: round(float(score), 6) for name, score in zip(names, row)},
            },
            asked=" | ".join(from_text(text)) if predictor.task.pair else "",
        )
        for label, row, text in zip(predictor.task.decide(scores), scores, texts)
    ]
