"""Translations of many rows, from any translator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from deploykit.data.texts import TextRow
from deploykit.errors import DataError, RequestError, UsageError
from deploykit.runtime.generation import Generation
from deploykit.runtime.serving_settings import LongInput
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.rows import one_line, read_sources
from deploykit.tasks.translation.translated import Translated

_CHUNK = 512  # sentences that the decoder may choose from to keep its rows full


@dataclasses.dataclass(frozen=True)
class How:
    """How to translate: ``generation`` in place of the model's own, and what becomes of texts too long for it."""

    generation: Generation | None = None
    long_input: LongInput = "split"


def translations(
    translator: TextTranslator, rows: Sequence[TextRow], how: How, *, scored: bool = True
) -> list[dict[str, Any]]:
    """A record for each row: origin, text, translation, score, source_tokens, target_tokens and finish; or origin and error.

    An empty text has an empty translation. Without ``scored`` greedy search is faster and scores may be 0.
    """
    problems = [row.problem or too_long(row.text) for row in rows]
    good = [row.text or "" for row, problem in zip(rows, problems) if problem is None]
    answered = iter(_translate(translator, good, how, scored=scored))
    records: list[dict[str, Any]] = []
    for row, problem in zip(rows, problems):
        answer = problem if problem is not None else next(answered)
        if isinstance(answer, str):
            records.append({"origin": row.origin, "error": answer})
            continue
        fields = dataclasses.asdict(answer)
        translation, score = fields.pop("text"), round(fields.pop("score"), 6)
        records.append(
            {"origin": row.origin, "text": row.text or "", "translation": translation, "score": score, **fields}
        )
    return records


def translate_file(
    translator: TextTranslator,
    source: str,
    out: Path,
    how: How,
    *,
    identity: str,
    column: str | None = None,
    encoding: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None],
) -> Answered:
    """Write a translation for each row of ``source``: JSON lines, or to a .txt a line of text; see ``answer_file``.

    A row that cannot be translated leaves an empty line in a .txt.
    """
    as_json = out.suffix.lower() in JSON_LINES
    if not as_json and out.suffix.lower() != ".txt":
        raise UsageError(f"--output {out}: neither .txt nor .jsonl", "give it a name that ends in one of these")
    task = translator.task

    def rows() -> Iterator[TextRow]:
        return read_sources(source, column=column, source=task.source, prefer=task.source_column, encoding=encoding)

    def answer(part: Sequence[TextRow]) -> list[Line]:
        records = translations(translator, part, how, scored=as_json)
        if as_json:
            return [json_line(record) for record in records]
        return [Line(one_line(record.get("translation", "")), "error" in record) for record in records]

    key = artifacts.digest_of(source_digest(source), column, encoding, identity, dataclasses.asdict(how))
    failed = is_error if as_json else lambda line: False
    return answer_file(rows, answer, out, key=key, failed=failed, force=force, progress=progress, chunk=_CHUNK)


def _translate(translator: TextTranslator, texts: Sequence[str], how: How, *, scored: bool) -> list[Translated | str]:
    """Translations, or why there is none: a text that is refused fails alone."""
    try:
        return list(translator.translate(texts, how.generation, long_input=how.long_input, scored=scored))
    except (DataError, RequestError) as error:
        if isinstance(error, RequestError) and error.status != 400:
            raise
        if len(texts) == 1:
            return [error.message]
        return [answer for text in texts for answer in _translate(translator, [text], how, scored=scored)]
