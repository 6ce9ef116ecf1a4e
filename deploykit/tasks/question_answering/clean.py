"""Keep the rows whose answers are in their contexts, and count the repaired and dropped ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from deploykit.data.cleaning import cleaning_lines
from deploykit.tasks.question_answering.facts import MAX_CONTEXT_CHARS
from deploykit.tasks.question_answering.rows import Example, RawRow, RightAnswers
from deploykit.text import is_blank, printable


@dataclass(frozen=True)
class CleaningReport:
    """Counts of rows by the result of cleaning. ``rows_read`` is ``rows_kept`` plus all dropped rows.

    The last four count what was kept: answers moved to the only place where they occur, answers without a position,
    rows with control characters or lone surrogates, and rows without an answer.
    """

    rows_read: int
    missing_text: int
    empty_text: int
    too_long: int
    unlabelled: int
    misplaced_answer: int
    duplicates: int
    conflicting_duplicates: int
    rows_kept: int
    answers_moved: int
    answers_located: int
    unicode_repaired: int
    without_answer: int

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the report as text: one line for each step that affected a row."""
        dropped = (
            (self.missing_text, "without question or context dropped"),
            (self.empty_text, "with an empty question or context dropped"),
            (self.too_long, f"with a context of more than {MAX_CONTEXT_CHARS:,} characters dropped"),
            (self.unlabelled, "that say nothing about an answer dropped"),
            (self.misplaced_answer, "whose answer does not stand at its place, nor once elsewhere, dropped"),
            (self.duplicates, "duplicate questions dropped (their answers are kept with the first)"),
            (self.conflicting_duplicates, "duplicate questions, one with an answer and one without, dropped"),
        )
        repaired = (
            (self.answers_moved, "answers moved to the one place where they stand"),
            (self.answers_located, "answers without a place, found in the context"),
            (self.unicode_repaired, "with repaired Unicode"),
        )
        *lines, kept = cleaning_lines(self.rows_read, dropped, repaired, self.rows_kept)
        without = f", {self.without_answer:,} of them without an answer" if self.without_answer else ""
        return [*lines, kept + without]


class _Counts:
    def __init__(self) -> None:
        self.moved = self.located = 0

    def place(self, context: str, text: str, start: int | None) -> tuple[str, int] | None:
        """Return an answer without outer white space and its position; None if that is unknown.

        If the answer is not at ``start``, use the only other place where it occurs. Without a ``start``, use the first.
        """
        stripped = text.strip()
        if not stripped:
            return None
        if start is not None:
            start += len(text) - len(text.lstrip())
            if start >= 0 and context.startswith(stripped, start):
                return stripped, start
        first = context.find(stripped)
        if first < 0 or (start is not None and context.find(stripped, first + 1) >= 0):
            return None
        self.moved += start is not None
        self.located += start is None
        return stripped, first


def clean(
    raw: Iterable[RawRow], tell: Callable[[str], None] = lambda problem: None
) -> tuple[list[Example], CleaningReport]:
    """Drop unusable rows, and answers without a position; join the answers of duplicate questions.

    A row is dropped if none of its answers has a position: it is not a question without an answer. ``tell`` is called with the
    name of each row that is dropped, duplicates aside, and the reason.
    """
    counts = _Counts()
    repaired_context = cache(printable)  # many questions share a context
    rows_read = missing = empty = too_long = unlabelled = misplaced = repaired = 0
    by_question: dict[tuple[str, str], list[Example]] = {}
    for row in raw:
        rows_read += 1
        if row.question is None or row.context is None:
            missing += 1
            tell(f"{row.origin}: {row.problem or f'the {_missing(row)} is missing'}")
            continue
        question, context = printable(row.question), repaired_context(row.context)
        if is_blank(question) or is_blank(context):
            empty += 1
            tell(f"{row.origin}: the question or the context is empty")
            continue
        if len(context) > MAX_CONTEXT_CHARS:
            too_long += 1
            tell(f"{row.origin}: the context has {len(context):,} characters, more than {MAX_CONTEXT_CHARS:,}")
            continue
        if not row.labelled:
            unlabelled += 1
            tell(f"{row.origin}: it says nothing about an answer")
            continue
        placed = [counts.place(context, printable(text), start) for text, start in row.answers]
        found = list(dict.fromkeys(answer for answer in placed if answer is not None))
        if row.answers and not found:
            misplaced += 1
            tell(f"{row.origin}: the answer does not stand at its place, nor once elsewhere")
            continue
        repaired += question != row.question or context != row.context
        answers = RightAnswers(tuple(text for text, _ in found), tuple(start for _, start in found))
        example = Example(question, context, answers, row.id or row.origin, row.origin)
        by_question.setdefault((" ".join(question.casefold().split()), context), []).append(example)
    kept: list[Example] = []
    duplicates = conflicting = 0
    for same in by_question.values():
        if len({bool(example.answers.text) for example in same}) > 1:
            conflicting += len(same)
            for example in same:
                tell(f"{example.origin}: the question is asked twice, once with an answer and once without")
            continue
        kept.append(_joined(same))
        duplicates += len(same) - 1
    return kept, CleaningReport(
        rows_read=rows_read,
        missing_text=missing,
        empty_text=empty,
        too_long=too_long,
        unlabelled=unlabelled,
        misplaced_answer=misplaced,
        duplicates=duplicates,
        conflicting_duplicates=conflicting,
        rows_kept=len(kept),
        answers_moved=counts.moved,
        answers_located=counts.located,
        unicode_repaired=repaired,
        without_answer=sum(not example.answers.text for example in kept),
    )


def _missing(row: RawRow) -> str:
    return "question" if row.question is None else "context"


def _joined(same: Sequence[Example]) -> Example:
    """Return the first of several equal questions, with the answers of all."""
    pairs = dict.fromkeys(pair for e in same for pair in zip(e.answers.text, e.answers.answer_start))
    answers = RightAnswers(tuple(text for text, _ in pairs), tuple(start for _, start in pairs))
    return dataclasses.replace(same[0], answers=answers)
