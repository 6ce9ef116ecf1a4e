"""Define the facts of an answerer, which go with it from fine-tuning to the server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from deploykit.errors import DataError
from deploykit.tasks.protocol import GraphKind

MAX_CONTEXT_CHARS = 16_000_000
"""Longest context that is accepted: a book has about a million characters."""

HEAD: Mapping[str, Any] = {"num_labels": 2}
"""The configuration of the head: a logit for start and end. A classifier's checkpoint, to train from, has another number."""

MOST_ANSWERS = 100
"""Most answers to one question."""


@dataclass(frozen=True)
class QuestionAnswering:
    """Facts of a model that answers questions: how windows are cut and spans chosen.

    Lengths are in tokens; ``max_length`` includes special ones. Neighbouring windows share ``doc_stride`` tokens of the
    context. ``question_first``: the question precedes the context. ``token_types``: the graph has token type ids. A
    span has at most ``max_answer_length`` tokens before it is extended to ``whole_words``. If the log-odds of no answer
    against the best span exceed ``no_answer_threshold`` there is no answer; with None every question is answered.
    ``by_characters``: measure answers by characters, as for Chinese.
    """

    name: ClassVar[str] = "question-answering"
    graph_kind: ClassVar[GraphKind] = "encoder"
    max_chars: ClassVar[int] = 2 * MAX_CONTEXT_CHARS  # of the JSON text; contexts have their own limit

    max_length: int
    doc_stride: int
    pad_token_id: int
    question_first: bool = True
    token_types: bool = True
    max_answer_length: int = 30
    whole_words: bool = True
    no_answer_threshold: float | None = None
    by_characters: bool = False

    @property
    def shape_limits(self) -> Mapping[str, int]:
        return {"length": self.max_length}

    @property
    def model_config(self) -> Mapping[str, Any]:
        return HEAD

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs."""
        return ("input_ids", "attention_mask", *(("token_type_ids",) if self.token_types else ()))


def as_text(question: str, context: str) -> str:
    """Return a question and its context as one text, a JSON object, for stages whose inputs are texts."""
    return json.dumps({"question": question, "context": context}, ensure_ascii=False)


def from_text(text: str) -> tuple[str, str]:
    """Return question and context of a text that ``as_text`` made. Raises DataError for any other."""
    try:
        record = json.loads(text)
        question, context = record["question"], record["context"]
    except (ValueError, KeyError, TypeError, RecursionError):
        question = context = None
    if not isinstance(question, str) or not isinstance(context, str):
        raise DataError(
            f"the text {text[:40]!r} is not a question with its context", 'write {"question": "...", "context": "..."}'
        )
    return question, context
