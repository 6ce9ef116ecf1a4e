"""Rows answered by a model of any task: single failures, records and lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from deploykit.data.texts import TextRow
from deploykit.errors import RequestError
from deploykit.tasks.answering import AnsweredRow, answer_rows, rows_of
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.protocol import Answer
from deploykit.text import MAX_TEXT_CHARS


class Refusing:
    """A classifier that refuses every call with a text "bad" in it, with a status."""

    task = Classification(("no", "yes"), 8, 0)

    def __init__(self, status: int) -> None:
        self._status = status

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if "bad" in texts:
            raise RequestError("the text is bad", self._status)
        return np.array([[0.25, 0.75]] * len(texts), np.float32)

    def close(self) -> None: ...


ROWS = [
    TextRow("a:1", "fine", None),
    TextRow("a:2", None, "the text is missing"),
    TextRow("a:3", "bad", None),
    TextRow("a:4", "x" * (MAX_TEXT_CHARS + 1), None),
    TextRow("a:5", "good", None),
]


def test_a_row_that_is_refused_fails_alone() -> None:
    records = [row.to_json() for row in answer_rows(Refusing(400), ROWS)]
    answer = {"label": "yes", "score": 0.75, "scores": {"no": 0.25, "yes": 0.75}}
    assert records == [
        {"origin": "a:1", "text": "fine", **answer},
        {"origin": "a:2", "error": "the text is missing"},
        {"origin": "a:3", "error": "the text is bad"},
        {"origin": "a:4", "error": "the text has 1,000,001 characters, more than 1,000,000"},
        {"origin": "a:5", "text": "good", **answer},
    ]


def test_an_overloaded_server_is_an_error() -> None:
    with pytest.raises(RequestError, match="the text is bad"):
        answer_rows(Refusing(503), ROWS)


def test_a_model_is_not_called_if_all_rows_are_bad() -> None:
    assert [row.answer for row in answer_rows(Refusing(503), ROWS[1:2])] == [None]


@pytest.mark.parametrize(
    ("row", "line", "record"),
    [
        (AnsweredRow("a:1", "t", Answer("yes")), "yes", {"origin": "a:1", "text": "t", "answer": "yes"}),
        (AnsweredRow("a:1", "t", Answer("", fields={"label": "", "score": 0.25})), f"{'-':<16} 0.2500  t",
         {"origin": "a:1", "text": "t", "label": "", "score": 0.25}),
        (AnsweredRow("a:1", "", error="why"), "a:1: why", {"origin": "a:1", "error": "why"}),
    ],
)  # fmt: skip
def test_a_row_is_a_line_and_a_record(row: AnsweredRow, line: str, record: dict[str, object]) -> None:
    assert (row.line(), row.to_json()) == (line, record)


def test_a_record_shows_the_question_without_its_context() -> None:
    row = AnsweredRow("a:1", '{"question": "q ?", "context": "c"}', Answer("c", fields={"score": 0.5}, asked="q ?"))
    assert row.to_json() == {"origin": "a:1", "text": "q ?", "score": 0.5}
    assert row.line().endswith("0.5000  q ?")


def test_texts_stay_as_they_are_for_a_prompt_may_end_with_a_line_break() -> None:
    texts = ["e\u0301t\u00e9", " a\tb:\n\n"]
    assert [row.text for row in rows_of([*texts, "half \ud83d"], Classification(("no", "yes"), 8, 0))] == [
        *texts,
        "half \ufffd",
    ]


def test_a_line_writes_no_control_characters_to_the_terminal() -> None:
    assert AnsweredRow("a:1", "\x1b[2Jx", Answer("yes", fields={"score": 0.5})).line().endswith("0.5000   [2Jx")


def test_an_empty_text_is_answered_like_any_other() -> None:
    facts = Classification(("no", "yes"), 8, 0)
    answered = answer_rows(Refusing(400), rows_of(["", " ", "fine"], facts))
    assert [row.answer is not None for row in answered] == [True] * 3
