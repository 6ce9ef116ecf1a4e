"""Answer many rows with a model of any task, as records for ``deploykit predict``."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_file import (
    JSON_LINES,
    Answered,
    Part,
    Records,
    Spread,
    answer_file,
    in_process,
    source_digest,
    too_long,
)
from deploykit.data.answer_table import TABLES, write_table
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.texts import TextRow, row_columns
from deploykit.errors import DataError, UsageError
from deploykit.tasks.answer_each import answer_each
from deploykit.tasks.protocol import Answer, Predictor, Progress, TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.text import printable, without_surrogates


@dataclass(frozen=True)
class AnsweredRow:
    """The answer to the row at ``origin``, or an ``error`` with the reason why it has no answer."""

    origin: str
    text: str
    answer: Answer | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return origin, text and the answer's columns, or origin and error."""
        if self.answer is None:
            return {"origin": self.origin, "error": self.error}
        return {"origin": self.origin, "text": self.answer.asked or self.text, **self.answer.columns}

    def line(self) -> str:
        """Return the row for a terminal: the answer, and if it has a score, also score and text."""
        if self.answer is None:
            return f"{self.origin}: {self.error}"
        score = self.answer.columns.get("score")
        asked = printable(self.answer.asked or self.text)
        return self.answer.text if score is None else f"{self.answer.text or '-':<16} {score:.4f}  {asked}"


def rows_of(texts: Sequence[str | tuple[str, str]], facts: TaskFacts) -> list[TextRow]:
    """Return texts as rows, named by their numbers from 1.

    For a model of pairs, two texts are one input. Raises UsageError if the model reads one text.
    """
    task = task_of(facts)
    asked = (text if isinstance(text, str) else task.as_text(facts, *text) for text in texts)
    return [TextRow(f"text {i}", without_surrogates(text), None) for i, text in enumerate(asked, start=1)]


def answer_rows(predictor: Predictor, rows: Sequence[TextRow], generation: Any = None) -> list[AnsweredRow]:
    """Answer each row. A row that has a problem, is too long or is refused fails alone."""
    problems = [row.problem or too_long(row.text, predictor.task.max_chars) for row in rows]
    good = [row.text or "" for row, problem in zip(rows, problems) if problem is None]
    task = task_of(predictor.task)
    answers = iter(answer_each(lambda texts: task.answer(predictor, texts, generation), good))
    found = []
    for row, problem in zip(rows, problems):
        answer = None if problem is not None else next(answers)
        if isinstance(answer, Answer):
            found.append(AnsweredRow(row.origin, row.text or "", answer))
        else:
            found.append(AnsweredRow(row.origin, row.text or "", error=answer.message if answer else problem or ""))
    return found


def answer_source(
    predictor: Predictor,
    source: str,
    out: Path,
    *,
    identity: str,
    columns: Mapping[str, Any],
    generation: Any = None,
    reading: Reading = AS_FOUND,
    force: bool = False,
    progress: Progress,
    spread: Spread | None = None,
) -> Answered:
    """Write a record for each row of ``source`` to ``out``; see ``answer_file``.

    A .jsonl file has one object per line. A .csv, .tsv or .parquet file has the columns of ``source`` and the answer's.

    ``identity`` identifies the model: an unfinished file with the same identity, source and options is continued.
    ``spread`` answers the rows with other processes' models, which must have that identity too.
    """
    suffix = out.suffix.lower()
    if suffix not in (*JSON_LINES, *TABLES):
        raise UsageError(
            f"--output {out}: files of type {suffix!r} are not written",
            f"give one of {', '.join((*JSON_LINES, *TABLES))}",
        )
    task = task_of(predictor.task)

    def rows() -> Iterator[TextRow]:
        return task.read_inputs(source, predictor.task, reading=reading, columns=columns)

    if suffix in TABLES:
        _check_rows(rows(), source, reading, out)

    answer = functools.partial(spread or in_process(predictor), functools.partial(_records, generation=generation))

    def finish(answers: Path, out: Path) -> None:
        write_table(answers, lambda: row_columns(source, reading), out, task.answer_columns)

    key = artifacts.digest_of(source_digest(source), dict(columns), repr(generation), reading.key(), identity)
    return answer_file(
        rows, answer, out, key=key, on_error=reading.on_error, force=force, progress=progress,
        finish=finish if suffix in TABLES else None,
    )  # fmt: skip


def _records(predictor: Predictor, part: Part, generation: Any) -> Records:
    return [row.to_json() for row in answer_rows(predictor, part, generation)]


def _check_rows(rows: Iterator[TextRow], source: str, reading: Reading, out: Path) -> None:
    """Raise UsageError if ``source`` is not a table with one row per text, such as SQuAD's JSON."""
    count = sum(1 for _ in rows)
    try:
        same = count == sum(1 for _ in row_columns(source, reading))
    except DataError:
        same = False
    if not same:
        raise UsageError(
            f"--output {out}: {source} is not a table with a row for each text", "give it a name that ends in .jsonl"
        )
