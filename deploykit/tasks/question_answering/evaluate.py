"""Measure an answerer on questions with known answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploykit.data.reading import AS_FOUND, Reading
from deploykit.errors import DataError
from deploykit.runtime.finite import NoNumberError
from deploykit.tasks.protocol import Evaluation, Grade
from deploykit.tasks.question_answering.clean import clean
from deploykit.tasks.question_answering.facts import QuestionAnswering, as_text, from_text
from deploykit.tasks.question_answering.metrics import answer_metrics, measure_of
from deploykit.tasks.question_answering.predictor import TextAnswerer
from deploykit.tasks.question_answering.rows import Example, RightAnswers, read_rows
from deploykit.tasks.question_answering.spans import Found, Span
from deploykit.text import is_blank

_CHUNK = 256
_SURE = -1e9
"""Log-odds of no answer that are below any threshold."""


@dataclass(frozen=True)
class LabelledQuestions:
    """Questions to measure on, each once. ``problems`` as in ``Evaluation``."""

    examples: list[Example]
    problems: tuple[str, ...] = ()


def labelled_questions(source: str, *, reading: Reading = AS_FOUND, split: str = "test") -> LabelledQuestions:
    """Read questions with right answers, or without any. Raises DataError when none is left after cleaning."""
    problems: list[str] = []
    examples, report = clean(read_rows(source, reading=reading, split=split), problems.append)
    if not examples:
        raise DataError(
            f"{source}: no row has a question, a context and an answer that occurs in it", "; ".join(report.lines())
        )
    return LabelledQuestions(examples, tuple(problems))


def evaluate(
    predictor: TextAnswerer, rows: LabelledQuestions, *, progress: Callable[[int, int], None] = lambda done, of: None
) -> Evaluation:
    """Answer every question and compare. A question that is refused counts as answered with "no answer".

    Raises DataError if the model computes no number for any question.
    """
    return evaluation(predictor.task, *ask_all(predictor, rows, progress))


def ask_all(
    predictor: TextAnswerer, rows: LabelledQuestions, progress: Callable[[int, int], None]
) -> tuple[LabelledQuestions, list[Found]]:
    """Answer every question. Returns the questions for which the model computes numbers, with a problem for each other one,
    and their answers. Raises DataError if there is no such question."""
    results = predictor.try_all([(e.question, e.context) for e in rows.examples], progress=progress)
    broken = {i for i, result in enumerate(results) if isinstance(result, NoNumberError)}
    refused = [f"{rows.examples[i].origin}: {NoNumberError().message}" for i in sorted(broken)]
    if len(broken) == len(results):
        raise DataError(refused[0], NoNumberError().remedy)
    kept = [example for i, example in enumerate(rows.examples) if i not in broken]
    found = as_found([result for i, result in enumerate(results) if i not in broken])
    return LabelledQuestions(kept, (*rows.problems, *refused)), found


def evaluation(task: QuestionAnswering, rows: LabelledQuestions, found: Sequence[Found]) -> Evaluation:
    """Return the metrics of answered questions."""
    metrics = answer_metrics(task, found, rows.examples)
    return Evaluation(metrics, len(rows.examples), rows.problems, measure=measure_of(task, found, rows.examples))


def found_for(
    predictor: TextAnswerer, pairs: Sequence[tuple[str, str]], progress: Callable[[int, int], None]
) -> list[Found]:
    """Answer every pair; see ``as_found``."""
    return as_found(predictor.try_all(pairs, progress=progress))


def as_found(results: Sequence[Found | DataError]) -> list[Found]:
    """Return the answers to measure. A refused pair has no spans; one for which the model computes no number has a wrong
    answer, since "no answer" may be right."""
    nothing, wrong = Found((), 0.0, 0.0), Found((Span("\ufffd", 0, 0, 0.0),), _SURE, 0.0)
    return [
        result if isinstance(result, Found) else wrong if isinstance(result, NoNumberError) else nothing
        for result in results
    ]


def grade(predictor: TextAnswerer, texts: Sequence[str], truth: Sequence[str]) -> Grade:
    """Answer every text and compare. ``truth`` has a JSON list of right answers each; raises DataError for anything
    else."""
    pairs = [from_text(text) for text in texts]
    examples = [Example(*pair, RightAnswers(_right_answers(right)), "", "") for pair, right in zip(pairs, truth)]
    found: list[Found] = []
    for start in range(0, len(pairs), _CHUNK):
        found += found_for(predictor, pairs[start : start + _CHUNK], lambda done, of: None)
    answers = tuple(each.decide(predictor.task.no_answer_threshold).text for each in found)
    metrics, measure = answer_metrics(predictor.task, found, examples), measure_of(predictor.task, found, examples)
    return Grade(None, answers, metrics, measure)


def texts_and_answers(source: str, reading: Reading) -> list[tuple[str, str | None]]:
    """Read questions with contexts as texts, and their right answers, a JSON list, where the source has them."""
    raw = list(read_rows(source, reading=reading, split="test"))
    if any(row.labelled for row in raw):
        examples, _ = clean(raw)
        if examples:
            return [(as_text(e.question, e.context), json.dumps(e.answers.text, ensure_ascii=False)) for e in examples]
    pairs = [(row.question, row.context) for row in raw]
    texts: list[tuple[str, str | None]] = [
        (as_text(question, context), None)
        for question, context in pairs
        if question and context and not is_blank(question) and not is_blank(context)
    ]
    if not texts:
        raise DataError(f"{source}: no row has a question and a context", "name the columns question and context")
    return texts


def _right_answers(text: str) -> tuple[str, ...]:
    try:
        answers = json.loads(text)
    except ValueError:
        answers = None
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{text[:40]!r} is not a list of right answers", 'write ["..."], or [] for none')
    return tuple(answers)
