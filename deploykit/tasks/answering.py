"""Answer many rows with a model of any task: the records that ``deploykit predict`` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit import artifacts
from deploykit.data.answer_file import (
    JSON_LINES,
    Answered,
    Line,
    answer_file,
    is_error,
    json_line,
    source_digest,
    too_long,
)
from deploykit.data.answer_table import TABLES
from deploykit.data.texts import TextRow, row_columns
from deploykit.errors import DataError, RequestError, UsageError
from deploykit.tasks.protocol import Answer, Predictor, Progress, TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.text import printable


@dataclass(frozen=True)
class AnsweredRow:
    """The answer to the row at ``origin``; without one, ``error`` says why."""

    origin: str
    text: str
    answer: Answer | None = None
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return origin, text and the answer's columns; or origin and error."""
        if self.answer is None:
            return {"origin": self.origin, "error": self.error}
        return {"origin": self.origin, "text": self.answer.asked or self.text, **self.answer.columns}

    def line(self) -> str:
        """Return the row for a terminal: the answer; of one with a score, the answer, its score and the text."""
        if self.answer is None:
            return f"{self.origin}: {self.error}"
        score = self.answer.columns.get("score")
        asked = self.answer.asked or self.text
        return self.answer.text if score is None else f"{self.answer.text or '-':<16} {score:.4f}  {asked}"


def rows_of(texts: Sequence[str | tuple[str, str]], facts: TaskFacts) -> list[TextRow]:
    """Return texts as rows, named by their numbers from 1; one without a character has a problem.

    Two texts are one input of a model of pairs. Raises UsageError where the model reads one.
    """
    task = task_of(facts)
    asked = (text if isinstance(text, str) else task.as_text(facts, *text) for text in texts)
    return [
        TextRow(f"text {i}", text or None, None if text else "the text is empty")
        for i, text in enumerate((printable(text).strip() for text in asked), start=1)
    ]


def answer_rows(predictor: Predictor, rows: Sequence[TextRow], generation: Any = None) -> list[AnsweredRow]:
    """Answer each row. A row that has a problem, is too long or is refused fails alone."""
    problems = [row.problem or too_long(row.text, predictor.task.max_chars) for row in rows]
    good = [row.text or "" for row, problem in zip(rows, problems) if problem is None]
    answers = iter(_answer(predictor, good, generation) if good else ())
    found = []
    for row, problem in zip(rows, problems):
        answer = problem if problem is not None else next(answers)
        if isinstance(answer, str):
            found.append(AnsweredRow(row.origin, row.text or "", error=answer))
        else:
            found.append(AnsweredRow(row.origin, row.text or "", answer))
    return found


def answer_source(
    predictor: Predictor,
    source: str,
    out: Path,
    *,
    identity: str,
    columns: Mapping[str, Any],
    generation: Any = None,
    encoding: str | None = None,
    force: bool = False,
    progress: Progress,
) -> Answered:
    """Write a record for each row of ``source`` to ``out``; see ``answer_file``.

    A .jsonl file has an object a line. A .csv, .tsv or .parquet file has the columns of ``source`` and the answer's.

    ``identity`` stands for the model: with it, the source and the options, an unfinished file is continued.
    """
    suffix = out.suffix.lower()
    if suffix not in (*JSON_LINES, *TABLES):
        raise UsageError(
            f"--output {out}: files of type {suffix!r} are not written",
            f"give one of {', '.join((*JSON_LINES, *TABLES))}",
        )
    task = task_of(predictor.task)

    def rows() -> Iterator[TextRow]:
        return task.read_inputs(source, predictor.task, encoding=encoding, columns=columns)

    if suffix in TABLES:
        _check_rows(rows(), source, encoding, out)

    def answer(part: Sequence[TextRow]) -> list[Line]:
        return [json_line(row.to_json()) for row in answer_rows(predictor, part, generation)]

    key = artifacts.digest_of(source_digest(source), dict(columns), repr(generation), encoding, identity)
    table = (lambda: row_columns(source, encoding)) if suffix in TABLES else None
    return answer_file(rows, answer, out, key=key, failed=is_error, force=force, progress=progress, table=table)


def _check_rows(rows: Iterator[TextRow], source: str, encoding: str | None, out: Path) -> None:
    """Raise UsageError if ``source`` is not a table whose rows are those to answer, as SQuAD's JSON is not."""
    count = sum(1 for _ in rows)
    try:
        same = count == sum(1 for _ in row_columns(source, encoding))
    except DataError:
        same = False
    if not same:
        raise UsageError(
            f"--output {out}: {source} is not a table with a row for each text", "give it a name that ends in .jsonl"
        )


def _answer(predictor: Predictor, texts: Sequence[str], generation: Any) -> list[Answer | str]:
    """Return answers, or why there is none: a text that is refused fails alone."""
    try:
        return list(task_of(predictor.task).answer(predictor, texts, generation))
    except (DataError, RequestError) as error:
        if isinstance(error, RequestError) and error.status != 400:
            raise
        if len(texts) == 1:
            return [error.message]
        half = len(texts) // 2
        return [*_answer(predictor, texts[:half], generation), *_answer(predictor, texts[half:], generation)]
