"""Analyse a language model's errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure
from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.errors import DataError
from deploykit.inspection.drift import drift
from deploykit.inspection.reliability import calibration
from deploykit.inspection.robustness import Noisy, robustness
from deploykit.inspection.rows import read_columns, texts_against
from deploykit.inspection.slices import Members, by_number, common_slices, sliced
from deploykit.inspection.worst_rows import worst_rows
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.protocol import Evaluation, Progress
from deploykit.tasks.text_generation.encode import EncodedRow
from deploykit.tasks.text_generation.evaluate import Measured, ask, evaluation, measure_file, measure_rows
from deploykit.tasks.text_generation.generator import Generated, LocalGenerator, TextGenerator, as_prompt
from deploykit.tasks.text_generation.metrics import answer_measure, exact_match, scored_measure, token_f1
from deploykit.tasks.text_generation.noise import noisy_prompt
from deploykit.tasks.types import ReportOptions

_ROBUST_ROWS = 100
"""Maximum rows whose prompts are answered with noise, three times each."""

Numbers = NDArray[np.float64]


def report(
    generator: TextGenerator,
    source: str,
    *,
    split: str,
    reading: Reading,
    columns: Mapping[str, Any],
    sampling: Sampling,
    options: ReportOptions,
    progress: Progress,
) -> tuple[Evaluation, dict[str, Any]]:
    """Measure, and return the analysis: slices and worst rows, for rows with a prompt also robustness and calibration; with
    ``options.against`` drift.

    Raises UsageError for a served model, DataError for a column to slice by that the rows do not have.
    """
    values_of = read_columns(
        source, options.slices, reading=reading, split=split
    )  # so that errors in the options show before the work
    measured, problems = measure_file(
        generator, source, sampling, split=split, reading=reading, columns=columns, progress=progress
    )
    assert isinstance(generator, LocalGenerator), "measure_file refuses others"
    rows, answers = measured.asked.rows, measured.answers
    values = values_of([row.origin for row in rows])
    asking = np.array([row.text is None for row in rows])
    at = np.cumsum(asking) - 1  # the answer of each row that asks something
    references = measured.some.references
    names = ("token_f1", "exact_match", "loss") if answers else ("loss", "token_accuracy")

    def measure_of(inside: NDArray[np.bool_]) -> Measure:
        some = np.flatnonzero(inside)
        scored = scored_measure([measured.scores[i] for i in some], [measured.texts[i] for i in some])
        own = np.flatnonzero(asking[some])
        if not len(own):
            return scored
        of_answers = at[some[own]]
        answered = answer_measure([answers[i].text for i in of_answers], [references[i] for i in of_answers])
        return lambda weights: {**scored(weights), **answered(np.maximum(weights[..., own], 1e-9))}

    def slices() -> Iterator[Members]:
        every = [*common_slices([row.prompt for row in rows], values, options.seen)]
        every += by_number("words of the right answer", [len(row.answer.split()) for row in rows], 3)
        every += by_number("messages", [len(row.messages) for row in rows], 3)
        if answers:
            finish = np.array(["" if not asks else answers[i].finish for asks, i in zip(asking, at)])
            every.append(("cut off at the longest length: yes", finish == "length"))
        # Answers are compared in each slice: one of plain texts alone has none.
        yield from ((name, inside & asking if answers else inside) for name, inside in every)

    evaluated = evaluation(measured, problems)
    record: dict[str, Any] = {
        "metrics": evaluated.metrics,
        "rows": evaluated.rows,
        "slices": sliced(measure_of, len(rows), slices(), names),
        "worst": [],
    }
    if answers:
        confidence = _confidence(generator, measured.some.prompts, answers)
        exact = np.array([exact_match(a.text, r) for a, r in zip(answers, references)])
        overlap = np.array([token_f1(a.text, r) for a, r in zip(answers, references)])
        record["robustness"] = _robustness(generator, measured, sampling, columns, names)
        own_rows = [row for row in rows if row.text is None]
        record["calibration"] = calibration(confidence, exact)
        record["worst"] = worst_rows(
            [row.origin for row in own_rows],
            [row.prompt for row in own_rows],
            references,
            [answer.text for answer in answers],
            {"token_f1": overlap, "exact_match": exact, "confidence": confidence},
        )
    if options.against is not None:
        texts = texts_against(generator.task, options.against, reading=reading, columns=columns, measured=len(rows))
        record["drift"] = drift(
            [row.prompt for row in rows], texts, _properties(generator, measured.some.prompts, answers, texts, sampling)
        )
    return evaluated, record


def _robustness(
    generator: LocalGenerator, measured: Measured, sampling: Sampling, columns: Mapping[str, Any], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure some rows as they are, and with noise in their prompts."""
    asking = [i for i, row in enumerate(measured.asked.rows) if row.text is None]
    some = evenly(asking, _ROBUST_ROWS)
    rows = [measured.asked.rows[i] for i in some]

    def noisy(rewrite: Noisy) -> Mapping[str, Any]:
        asked, _ = ask(generator.tokenizer, [noisy_prompt(row, rewrite) for row in rows], generator.task.max_length)
        regex, syntax = columns.get("answer_regex"), columns.get("syntax")
        return measure_rows(generator, asked, sampling, answer_regex=regex, syntax=syntax)[0].metrics()

    return robustness(measured.at(some).metrics(), noisy, names)


def _confidence(generator: LocalGenerator, prompts: Sequence[Sequence[int]], answers: Sequence[Generated]) -> Numbers:
    """Return the geometric mean probability of each answer's tokens."""
    rows = [EncodedRow.of_answer(prompt, answer.ids) for prompt, answer in zip(prompts, answers)]
    return np.array([math.exp(float(score.logprobs.mean())) for score in generator.score(rows)])


def _properties(
    generator: LocalGenerator,
    prompts: Sequence[list[int]],
    answers: Sequence[Generated],
    texts: Sequence[str],
    sampling: Sampling,
) -> dict[str, tuple[Any, Any]]:
    """Return the lengths of the answers and their confidence, of measured and new rows. Raises DataError if no new row is
    answered."""
    if not answers:
        return {}
    kept: list[list[int]] = []
    for text in texts:
        try:
            ids = generator.prompt_ids(as_prompt(generator, text))
            generator.check(ids, sampling)
        except DataError:
            continue
        kept.append(ids)
    if not kept:
        raise DataError("no new row has a prompt that the model accepts", "give other rows as --against")
    found = [one[0] for one in generator.generate(kept, dataclasses.replace(sampling, n=1))]
    return {
        "tokens of an answer": ([a.tokens for a in answers], [a.tokens for a in found]),
        "confidence": (_confidence(generator, prompts, answers), _confidence(generator, kept, found)),
    }
