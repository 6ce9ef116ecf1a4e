"""Answer texts, and measure a token classifier on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.data.reading import Reading
from deploykit.data.texts import unanswered
from deploykit.errors import DataError
from deploykit.tasks.protocol import Answer, Evaluation, Grade, Progress
from token_classification.entities import entities, entity_metrics
from token_classification.facts import TokenClassification, words_of
from token_classification.rows import Example, check_labels, load_examples, read_inputs
from token_classification.tagger import TextTagger

_CHUNK = 256


@dataclass(frozen=True)
class LabelledRows:
    """Rows to measure on, duplicates included. ``problems`` name the rows without."""

    examples: list[Example]
    problems: tuple[str, ...]


def labelled_rows(
    source: str, task: TokenClassification, words: str | None, labels: str | None, reading: Reading, split: str
) -> LabelledRows:
    """Read rows whose labels the model knows. Raises DataError for another label, or no usable row."""
    raw, _ = load_examples(source, words, labels, reading=reading, split=split)
    examples = [
        Example(" ".join(row.words), " ".join(row.labels), row.origin)
        for row in raw
        if row.words and row.labels and len(row.words) == len(row.labels)
    ]
    if not examples:
        raise DataError(f"{source}: no row has both words and as many labels", "give a file of labelled rows")
    check_labels(examples, task.labels, source)
    used = {example.origin for example in examples}
    problems = tuple(f"{row.origin}: words or labels are missing" for row in raw if row.origin not in used)
    return LabelledRows(examples, problems)


def texts_and_labels(
    source: str, task: TokenClassification, words: str | None, labels: str | None, reading: Reading
) -> list[tuple[str, str | None]]:
    """Read texts, with their labels if the source has them."""
    try:
        rows = labelled_rows(source, task, words, labels, reading, "test")
        return [(row.words, row.labels) for row in rows.examples]
    except DataError as no_labels:
        if labels is not None:
            raise
        return unanswered([row.text for row in read_inputs(source, words, task.words_column, reading)], no_labels)


def answers(tagger: TextTagger, texts: Sequence[str]) -> list[Answer]:
    """Return the labels of each text's words, and the entities that they mark."""
    found = []
    for text, labels in zip(texts, tagger.tag(texts)):
        words = words_of(text)
        marked = [
            {"type": e.kind, "text": " ".join(words[e.start : e.end]), "start": e.start, "end": e.end}
            for e in entities(labels)
        ]
        found.append(Answer(" ".join(labels), fields={"words": words, "labels": labels, "entities": marked}))
    return found


def grade(tagger: TextTagger, texts: Sequence[str], truth: Sequence[str], progress: Progress | None = None) -> Grade:
    """Label every text and compare with ``truth``, labels joined by spaces. Raises DataError for unknown labels."""
    check_labels([Example(*row, "a row") for row in zip(texts, truth)], tagger.task.labels, "the data")
    predicted: list[list[str]] = []
    for start in range(0, len(texts), _CHUNK):
        predicted += tagger.tag(texts[start : start + _CHUNK])
        if progress is not None:
            progress(len(predicted), len(texts))
    metrics = entity_metrics([labels.split() for labels in truth], predicted)
    return Grade(None, tuple(" ".join(labels) for labels in predicted), metrics)


def evaluate(tagger: TextTagger, rows: LabelledRows, progress: Progress) -> Evaluation:
    """Label every row and compare."""
    examples = rows.examples
    graded = grade(tagger, [row.words for row in examples], [row.labels for row in examples], progress)
    return Evaluation(dict(graded.metrics), len(examples), rows.problems)
