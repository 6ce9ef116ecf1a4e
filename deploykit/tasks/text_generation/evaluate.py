"""Measure a language model on rows: the probabilities of the right answers, and its own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deploykit.bootstrap import Measure, differences
from deploykit.data.reading import Reading
from deploykit.data.sample import evenly
from deploykit.data.texts import read_texts, unanswered
from deploykit.errors import DataError, UsageError
from deploykit.runtime.finite import NoNumberError
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.protocol import Evaluation, Grade
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import Generated, LocalGenerator, RowScore, TextGenerator, as_prompt
from deploykit.tasks.text_generation.metrics import (
    answer_measure,
    answer_metrics,
    compiled,
    scored_measure,
    scored_metrics,
)
from deploykit.tasks.text_generation.rows import Columns, Row, load_rows, role_problem
from deploykit.tasks.text_generation.syntax import check_syntax

_LEAST_ROOM = 16


@dataclasses.dataclass(frozen=True)
class EvaluationRows:
    """Rows to measure on. ``encoded`` has all tokens of each, ``prompts`` the ids that the model continues;
    plain texts have no prompts."""

    rows: list[Row]
    encoded: list[EncodedRow]
    prompts: list[list[int]]

    @property
    def references(self) -> list[str]:
        return [row.answer for row in self.rows if row.text is None]

    @property
    def asking(self) -> list[int]:
        """The places of the rows that have a prompt."""
        return [i for i, row in enumerate(self.rows) if row.text is None]

    def some(self, count: int) -> EvaluationRows:
        """Return ``count`` of the rows, evenly over their order."""
        return self.at(evenly(range(len(self.rows)), count))

    def at(self, places: Sequence[int]) -> EvaluationRows:
        """Return the rows at ``places``."""
        prompt = {row: i for i, row in enumerate(self.asking)}
        return EvaluationRows(
            [self.rows[i] for i in places],
            [self.encoded[i] for i in places],
            [self.prompts[prompt[i]] for i in places if i in prompt],
        )


def ask(tokenizer: ChatTokenizer, rows: Sequence[Row], max_length: int) -> tuple[EvaluationRows, list[str]]:
    """Encode rows; return those that fit the context of ``max_length`` tokens, and a line for each other row: its name, and
    that it does not fit or why the template refuses it."""
    kept, encoded, prompts, problems = [], [], [], []
    for row in rows:
        try:
            ids = tokenizer.encode_row(row)
            prompt = [] if row.text is not None else tokenizer.encode_prompt(row.messages[:-1], row.tools)
        except DataError as error:
            problems.append(f"{row.origin}: {error.message}")
            continue
        if len(ids.ids) <= max_length and len(prompt) < max_length and ids.supervised[1:].any():
            kept.append(row)
            encoded.append(ids)
            prompts += [prompt] if row.text is None else []
        else:
            problems.append(f"{row.origin}: prompt and answer do not fit {max_length:,} tokens, or the answer is empty")
    return EvaluationRows(kept, encoded, prompts), problems


def read_asked(
    source: str, generator: LocalGenerator, *, split: str, reading: Reading, columns: Mapping[str, Any]
) -> tuple[EvaluationRows, list[str]]:
    """Read a file's rows in the format that the training rows had, or that its columns show. Returns also a line for each
    row that cannot be used. Raises DataError when none can."""
    raw, _ = load_rows(
        source, prompt_column=columns.get("prompt_column"), completion_column=columns.get("completion_column"),
        prefer=columns_of(generator.task), reading=reading, split=split,
    )  # fmt: skip
    usable, problems = [], []
    for item in raw:
        problem = item.problem or (None if item.row.text else role_problem(item.row.messages))
        if problem is None:
            usable.append(item.row)
        else:
            problems.append(f"{item.row.origin}: {problem}")
    asked, refused = ask(generator.tokenizer, usable, generator.task.max_length)
    if not asked.rows:
        raise DataError(f"{source}: no row has a prompt and an answer that fit the context", "give other rows")
    return asked, problems + refused


def columns_of(task: TextGeneration) -> Columns | None:
    return Columns(*task.columns) if task.columns else None  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's results on rows: the ``scores`` of all their right answers, whose ``texts`` these are, and its own ``answers``
    to ``some`` of the rows, with their tokens, to be compared by ``options``."""

    asked: EvaluationRows
    some: EvaluationRows
    scores: list[RowScore]
    texts: list[str]
    answers: list[Generated]
    options: Mapping[str, Any]

    def at(self, places: Sequence[int]) -> Measured:
        """Return the results on some rows, all of which ask something and were answered."""
        asking = {i: n for n, i in enumerate(self.asked.asking)}
        asked = self.asked.at(places)
        scores, texts = [self.scores[i] for i in places], [self.texts[i] for i in places]
        answers = [self.answers[asking[i]] for i in places]
        return Measured(asked, asked, scores, texts, answers, self.options)

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the scores and of the answers, with intervals."""
        metrics = scored_metrics(self.scores, self.texts)
        if not self.answers:
            return metrics
        own = answer_metrics([answer.text for answer in self.answers], self.some.references, **self.options)
        intervals = {**metrics["intervals"], **own.pop("intervals")}
        return {**metrics, **own, "intervals": intervals, "answered": len(self.answers)}

    def measure(self) -> Measure:
        """Return the same as functions of the weights of all rows; each row that asks something must be among ``some``."""
        scored = scored_measure(self.scores, self.texts)
        if not self.answers:
            return scored
        answers = [answer.text for answer in self.answers]
        own = answer_measure(answers, self.some.references, **self.options)
        at = self.asked.asking
        # A draw without any row that asks something counts them alike.
        return lambda weights: {**scored(weights), **own(np.maximum(weights[..., at], 1e-9))}

    def differences(self, scores: Sequence[RowScore], answers: Sequence[str]) -> dict[str, Any]:
        """Compare with another model's ``scores`` and ``answers`` of the same rows (paired bootstrap)."""
        found = differences(scored_measure(self.scores, self.texts), scored_measure(scores, self.texts), len(scores))
        if answers:
            own = [answer.text for answer in self.answers]
            ours, theirs = (answer_measure(each, self.some.references, **self.options) for each in (own, answers))
            found |= differences(ours, theirs, len(answers))
        return found


def measure_rows(
    generator: LocalGenerator, asked: EvaluationRows, sampling: Sampling | None = None, *, answer_regex: str | None = None,
    syntax: str | None = None, answered: int | None = None, progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Measured, list[str]]:  # fmt: skip
    """Score all rows, and answer ``answered`` of them (None: all). Returns the results of the rows for which the model
    computes numbers, and a line for each other row. Raises DataError if there is no such row."""
    parser = None if syntax is None else check_syntax(syntax)
    if answer_regex is not None:
        compiled(answer_regex)
    chosen = range(len(asked.rows)) if answered is None else evenly(range(len(asked.rows)), answered)
    some = asked.at(chosen)
    total, done = len(asked.rows) + len(some.prompts), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    scores = []
    for score in generator.score(asked.encoded):
        scores.append(score)
        step(1)
    sampling = dataclasses.replace(sampling or generator.task.sampling, n=1)
    found = generator.try_generate(some.prompts, sampling, progress=step) if some.prompts else []
    answers = {chosen[i]: answer for i, answer in zip(some.asking, found)}
    broken = {i for i, score in enumerate(scores) if not np.isfinite(score.logprobs).all()}
    broken |= {i for i, answer in answers.items() if isinstance(answer, NoNumberError)}
    refused = [f"{asked.rows[i].origin}: {NoNumberError().message}" for i in sorted(broken)]
    if len(broken) == len(scores):
        raise DataError(refused[0], NoNumberError().remedy)
    kept = asked.at([i for i in range(len(scores)) if i not in broken])
    measured = Measured(
        kept,
        asked.at([i for i in chosen if i not in broken]),
        [score for i, score in enumerate(scores) if i not in broken],
        [generator.tokenizer.decode(row.ids[row.supervised].tolist()) for row in kept.encoded],
        [answer[0] for i, answer in answers.items() if i not in broken and not isinstance(answer, NoNumberError)],
        {"answer_regex": answer_regex, "syntax": parser},
    )
    return measured, refused


def room_for(tokenizer: ChatTokenizer, asked: EvaluationRows) -> int:
    """Return the most tokens worth generating: twice what nine of ten right answers have."""
    lengths = [len(tokenizer.tokenizer.encode(text).ids) for text in asked.references]
    return max(2 * int(np.percentile(lengths, 90)) if lengths else 0, _LEAST_ROOM)


def evaluate_file(
    generator: TextGenerator, source: str, sampling: Sampling, *, split: str, reading: Reading,
    columns: Mapping[str, Any], progress: Callable[[int, int], None],
) -> Evaluation:  # fmt: skip
    """Measure on the rows of a file. Raises UsageError for a served model, which scores no given answers."""
    measured, problems = measure_file(
        generator, source, sampling, split=split, reading=reading, columns=columns, progress=progress
    )
    return evaluation(measured, problems)


def evaluation(measured: Measured, problems: Sequence[str]) -> Evaluation:
    return Evaluation(measured.metrics(), len(measured.asked.rows), tuple(problems), measure=measured.measure())


def measure_file(
    generator: TextGenerator, source: str, sampling: Sampling, *, split: str, reading: Reading,
    columns: Mapping[str, Any], progress: Callable[[int, int], None],
) -> tuple[Measured, list[str]]:  # fmt: skip
    """Score and answer the rows of a file. Returns also a line for each row that cannot be used."""
    if not isinstance(generator, LocalGenerator):
        raise UsageError("a served language model cannot be evaluated", "give the export or the packaged version")
    asked, problems = read_asked(source, generator, split=split, reading=reading, columns=columns)
    reading.stop_at(problems)
    regex, syntax = columns.get("answer_regex"), columns.get("syntax")
    measured, refused = measure_rows(generator, asked, sampling, answer_regex=regex, syntax=syntax, progress=progress)
    return measured, problems + refused


def answers_to(generator: TextGenerator, texts: Sequence[str], sampling: Sampling | None) -> list[Generated]:
    """Answer each text: the user's message where the model has a chat template, otherwise a text to continue. Raises
    DataError for the first that is refused."""
    answers = []
    for found in generator.reply([as_prompt(generator, text) for text in texts], sampling):
        if isinstance(found, DataError):
            raise found
        answers.append(found[0])
    return answers


def grade(
    generator: TextGenerator, texts: Sequence[str], references: Sequence[str], sampling: Sampling | None
) -> Grade:
    """Answer every text and compare."""
    answers = [answer.text for answer in answers_to(generator, texts, sampling)]
    return Grade(None, tuple(answers), answer_metrics(answers, references), answer_measure(answers, references))


def texts_and_references(
    source: str, generation: TextGeneration, reading: Reading, columns: Mapping[str, Any]
) -> list[tuple[str, str | None]]:
    """Read prompts, and their answers where the source has them: of dialogs, the first message of the user."""
    try:
        raw, _ = load_rows(
            source, prompt_column=columns.get("prompt_column"), completion_column=columns.get("completion_column"),
            prefer=columns_of(generation), reading=reading, split="test",
        )  # fmt: skip
    except DataError as no_answers:
        return unanswered([row.text for row in read_texts(source, reading=reading, split="test")], no_answers)
    return [(r.row.prompt, r.row.answer) for r in raw if r.problem is None and len(r.row.messages) == 2]
