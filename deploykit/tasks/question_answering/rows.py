"""Read questions with their contexts and answers: SQuAD's JSON, rows of Hugging Face's squad, CSV, JSON lines,
Parquet."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.data.open_text import plain_suffix, read_lines
from deploykit.data.read import read_records
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.record import Record, malformed
from deploykit.data.texts import TextRow, listed, peek, scalar, without_dates
from deploykit.errors import DataError
from deploykit.tasks.question_answering.facts import as_text
from deploykit.text import normalize

_COLUMNS = "name the columns question, context and answers (or answer, answer_start)"


@dataclass(frozen=True)
class RightAnswers:
    """The right answers to a question and their start positions in the context, in code points; empty for no answer.

    Has the fields of Hugging Face's squad.
    """

    text: tuple[str, ...] = ()
    answer_start: tuple[int, ...] = ()


@dataclass(frozen=True)
class RawRow:
    """A row as read. ``answers`` are texts with their positions, None if the row has no answers; ``labelled`` is False if
    the source says nothing about answers. A row with a ``problem`` is malformed."""

    question: str | None
    context: str | None
    answers: tuple[tuple[str, int | None], ...]
    labelled: bool
    id: str
    origin: str
    problem: str = ""


@dataclass(frozen=True)
class Example:
    """A usable row: every answer is at its position in ``context``."""

    question: str
    context: str
    answers: RightAnswers
    id: str
    origin: str

    def __post_init__(self) -> None:
        if isinstance(self.answers, dict):  # read from JSON
            object.__setattr__(self, "answers", RightAnswers(*(tuple(v) for v in self.answers.values())))


def read_rows(source: str, *, reading: Reading = AS_FOUND, split: str = "train") -> Iterator[RawRow]:
    """Stream the rows of ``source`` (see ``read_records``), or of a .json file, also compressed, as SQuAD versions 1 and 2
    write it.

    Raises DataError naming file, row and field of a malformed value.
    """
    if Path(source).is_file() and plain_suffix(Path(source)) == ".json":
        text = "".join(read_lines(Path(source), reading.encoding, newline=""))
        if text.lstrip().startswith("{") and not _is_json_lines(text):
            reading.allow(source)
            yield from _squad(source, text)
            return
    records, names = peek(read_records(source, reading, split=split), source)
    for column in ("question", "context"):
        if column not in names:
            raise DataError(f"{source}: has no column {column!r}; {listed(names)}", _COLUMNS)
    labelled = "answers" in names or "answer" in names
    for record in records:
        try:
            yield _row(without_dates(record, ("question", "context", "answer"), reading), labelled)
        except DataError as error:
            bad = malformed(record.origin, error, reading, named=record.origin)
            yield RawRow(None, None, (), labelled, "", bad.origin, bad.problem)


def _is_json_lines(text: str) -> bool:
    """Return whether the first of several lines is a complete JSON object of one row."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and "data" not in json.loads(first)
    except ValueError:
        return False


def read_inputs(source: str, reading: Reading = AS_FOUND) -> Iterator[TextRow]:
    """Stream questions with their contexts as texts (``as_text``), a row for every row of ``source``."""
    for row in read_rows(source, reading=reading):
        missing = next((name for name in ("question", "context") if getattr(row, name) is None), None)
        if row.question is None or row.context is None:
            yield TextRow(row.origin, None, row.problem or f"the {missing} is missing")
        else:
            yield TextRow(row.origin, as_text(row.question, row.context), None)


def _squad(source: str, text: str) -> Iterator[RawRow]:
    name = normalize(Path(source).name)
    try:
        articles = json.loads(text)["data"]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: is not JSON: {error}", "correct it, or copy it again") from None
    except KeyError:
        raise DataError(
            f"{source}: is a JSON object without 'data'", "give SQuAD's JSON, an array of rows, or name it .jsonl"
        ) from None
    number = 0
    for a, article in enumerate(_items(articles, f"{name}: data"), start=1):
        where = f"{name}: article {a}"
        for p, paragraph in enumerate(_items(_field(article, "paragraphs", where), f"{where}: paragraphs"), start=1):
            where_paragraph = f"{where}, paragraph {p}"
            context = _string(_field(paragraph, "context", where_paragraph), f"{where_paragraph}: context")
            for qa in _items(_field(paragraph, "qas", where_paragraph), f"{where_paragraph}: qas"):
                number += 1
                origin = f"{name}:{number}"
                question = _string(_field(qa, "question", origin), f"{origin}: question")
                impossible = _impossible(qa, origin)
                answers = () if impossible else _answers(qa.get("answers", []), origin)
                yield RawRow(
                    question, context, answers, "answers" in qa or impossible, scalar(qa.get("id")) or "", origin
                )


def _row(record: Record, labelled: bool) -> RawRow:
    """Return a row of a table. If ``answers`` is empty, ``answer`` is used."""
    values, origin = record.values, record.origin
    impossible = _impossible(values, origin)
    if values.get("answers") not in (None, ""):
        answers = _answers(values["answers"], origin)
        if answers and not any(place is not None for _, place in answers):
            answers = tuple(
                zip((text for text, _ in answers), _places(values.get("answer_start"), len(answers), origin))
            )
    else:
        given, start = values.get("answer"), values.get("answer_start")
        text = scalar(given)
        if given is not None and text is None:
            raise DataError(f"{origin}: answer is not a text", "give one text, or a column answers")
        answers = ((text, _place(start, origin)),) if text else ()
    return RawRow(
        _cell(values, "question", origin), _cell(values, "context", origin),
        () if impossible else answers, labelled or impossible,
        scalar(values.get("id")) or "", origin, record.problem,
    )  # fmt: skip


def _impossible(values: Mapping[str, Any], origin: str) -> bool:
    """Return whether a row says that its question has no answer. Raises DataError for a value that is neither true nor false."""
    value = values.get("is_impossible")
    known = {"": False, "false": False, "true": True}
    text = "" if value is None else str(value).strip().lower()
    if text not in known:
        raise DataError(f"{origin}: is_impossible is {value!r}", "write true or false")
    return known[text]


def _cell(values: Mapping[str, Any], name: str, origin: str) -> str | None:
    """Return a cell as text; None if it is missing. Raises DataError for a list or an object."""
    value = values.get(name)
    if isinstance(value, list | Mapping):
        found = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{origin}: {name} is {found}, not a text", f"write one text as {name}")
    return scalar(value)


def _answers(value: Any, origin: str) -> tuple[tuple[str, int | None], ...]:
    """Parse {"text": [...], "answer_start": [...]}, or a list of {"text": ..., "answer_start": ...} or of texts; in a table's
    cell, the JSON of either."""
    if isinstance(value, str):
        try:
            value = json.loads(value.strip() or "[]")
        except (ValueError, RecursionError):
            raise DataError(
                f"{origin}: answers is {value[:40]!r}, which is not JSON",
                "save the rows as JSON lines or Parquet, or give the columns answer and answer_start",
            ) from None
    if isinstance(value, Mapping):
        texts = value.get("text", [])
        starts = value.get("answer_start", [None] * len(texts) if isinstance(texts, list) else None)
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise DataError(
                f"{origin}: answers needs lists text and answer_start of one length",
                'write {"text": ["..."], "answer_start": [0]}',
            )
        pairs = list(zip(texts, starts))
    elif isinstance(value, list):
        pairs = [(a.get("text"), a.get("answer_start")) if isinstance(a, Mapping) else (a, None) for a in value]
    else:
        raise DataError(f"{origin}: answers is neither an object nor a list", 'write {"text": [], "answer_start": []}')
    return tuple((_string(text, f"{origin}: an answer's text"), _place(start, origin)) for text, start in pairs)


def _places(value: Any, count: int, origin: str) -> list[int | None]:
    """Parse the column answer_start beside a list of ``count`` answers: a list, its JSON, or the place of a single answer."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or value == "" or value != value:
        return [None] * count
    starts = value if isinstance(value, list) else [value]
    if len(starts) != count:
        raise DataError(
            f"{origin}: there are {count} answers and {len(starts)} places in answer_start", "give a place for each"
        )
    return [_place(start, origin) for start in starts]


def _place(value: object, origin: str) -> int | None:
    if value is None or value == "" or value != value:  # NaN: pandas writes columns of integers with gaps as float
        return None
    text = scalar(value) or ""
    number = re.fullmatch(r"\s*([+-]?\d{1,18})(\.0*)?\s*", text)
    if number is None:
        raise DataError(f"{origin}: answer_start is {value!r}", "give the number of code points before it")
    return int(number[1])


def _field(value: Any, key: str, where: str) -> Any:
    if not isinstance(value, Mapping) or key not in value:
        raise DataError(f"{where} has no {key!r}", "give a file in SQuAD's format")
    return value[key]


def _items(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where} is not a list", "give a file in SQuAD's format")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is not a text", "correct that row")
    return value
