"""Analyse the errors of a model that answers questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.inspection.drift import drift
from deploykit.inspection.reliability import calibration
from deploykit.inspection.robustness import MOST_ROWS, Noisy, robustness
from deploykit.inspection.rows import read_columns, texts_against
from deploykit.inspection.slices import Members, by_number, by_value, common_slices, sliced
from deploykit.inspection.worst_rows import worst_rows
from deploykit.tasks.protocol import Evaluation, Progress
from deploykit.tasks.question_answering.evaluate import ask_all, evaluation, found_for, labelled_questions
from deploykit.tasks.question_answering.facts import as_text, from_text
from deploykit.tasks.question_answering.metrics import mean_scores, scores
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.tasks.question_answering.spans import Found
from deploykit.tasks.types import ReportOptions

NONE = "(no answer)"


def report(
    predictor: TextAnswerer,
    source: str,
    *,
    split: str,
    reading: Reading,
    columns: Mapping[str, Any],
    options: ReportOptions,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure, and return the analysis: slices, robustness, calibration, worst rows; with ``options.against`` drift.

    Raises DataError for a column to slice by that the rows do not have.
    """
    task = predictor.task
    rows = labelled_questions(source, reading=reading, split=split)
    reading.stop_at(rows.problems)
    values_of = read_columns(source, options.slices, reading=reading, split=split)
    rows, found = ask_all(predictor, rows, progress)
    examples = rows.examples
    values = values_of([e.origin for e in examples])
    spans = [one.decide(task.no_answer_threshold) for one in found]
    truths = [e.answers.text for e in examples]
    exact, overlap = scores(task, [span.text for span in spans], truths)
    score = np.array([span.score for span in spans])

    def measure_of(inside: NDArray[np.bool_]) -> Measure:
        return mean_scores(exact[inside], overlap[inside])

    def slices() -> Iterator[Members]:
        texts, passed = zip(*((f"{e.question} {e.context}", as_text(e.question, e.context)) for e in examples))
        yield from common_slices(texts, values, options.seen, passed)
        yield from by_number("words of the question", [len(e.question.split()) for e in examples], 3)
        yield from by_number("words of the right answer", [len((t or ("",))[0].split()) for t in truths], 3)
        yield from by_value("question begins with", [e.question.split()[0].lower() for e in examples])
        if not all(truths):
            answerable = np.array([bool(truth) for truth in truths])
            yield "has an answer: yes", answerable
            yield "has an answer: no", ~answerable

    def metrics_of(questions: Sequence[int], answers: Sequence[Found]) -> Mapping[str, Any]:
        asked = dataclasses.replace(rows, examples=[examples[i] for i in questions])
        return evaluation(task, asked, answers).metrics

    def noisy(rewrite: Noisy) -> Mapping[str, Any]:
        asked = [(rewrite(examples[i].question), examples[i].context) for i in some]
        return metrics_of(some, found_for(predictor, asked, lambda done, of: None))

    some = evenly(range(len(examples)), MOST_ROWS)
    evaluated = evaluation(task, rows, found)
    record: dict[str, Any] = {
        "metrics": evaluated.metrics,
        "rows": evaluated.rows,
        "slices": sliced(measure_of, len(examples), slices(), ("f1", "exact_match")),
        "robustness": robustness(metrics_of(some, [found[i] for i in some]), noisy, ("f1", "exact_match")),
        "calibration": calibration(score, exact),
        "worst": worst_rows(
            [e.origin for e in examples],
            [e.question for e in examples],
            [" · ".join(dict.fromkeys(truth)) or NONE for truth in truths],
            [span.text or NONE for span in spans],
            {"f1": overlap, "exact_match": exact, "score": score},
        ),
    }
    if options.against is not None:
        texts = texts_against(task, options.against, reading=reading, columns=columns, measured=len(examples))
        pairs = [from_text(text) for text in texts]
        new = found_for(predictor, pairs, lambda done, of: None)
        own = [(e.question, e.context) for e in examples]
        record["drift"] = drift(
            [" ".join(pair) for pair in own],
            [" ".join(pair) for pair in pairs],
            _properties(task, own, found, pairs, new),
        )
    return evaluated, record


def _properties(
    task: Any, pairs: list[tuple[str, str]], found: list[Found], new: list[tuple[str, str]], found_new: list[Found]
) -> dict[str, tuple[Any, Any]]:
    """Return the lengths of questions and answers, and the scores, of measured and new rows."""
    sides = []
    for questions, results in ((pairs, found), (new, found_new)):
        spans = [one.decide(task.no_answer_threshold) for one in results]
        sides.append(
            (
                [len(question.split()) for question, _ in questions],
                [len(span.text.split()) for span in spans],
                [span.score for span in spans],
            )
        )
    names = ("words of the question", "words of the answer", "score")
    return dict(zip(names, zip(*sides)))
