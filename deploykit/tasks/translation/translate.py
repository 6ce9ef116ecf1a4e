"""Translations of many rows, from any translator."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.texts import TextRow
from deploykit.errors import DataError, RequestError, UsageError
from deploykit.runtime.generation import Generation
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.rows import one_line, read_sources
from deploykit.tasks.translation.translated import Translated

_CHUNK = 512  # sentences that the decoder may choose from to keep its rows full


@dataclasses.dataclass(frozen=True)
class How:
    """How to translate: ``generation`` in place of the model's own, what becomes of texts too long for it, and which pieces
    of a text are translated one by one."""

    generation: Generation | None = None
    long_input: LongInput = "split"
    split: Split = "sentence"


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
    reading: Reading = AS_FOUND,
    force: bool = False,
    progress: Callable[[int, int], None],
) -> tuple[Answered, Counter[str]]:
    """Write a translation for each row of ``source``: JSON lines, or to a .txt a line of text; see ``answer_file``.

    A row that cannot be translated leaves an empty line in a .txt. The second value counts the rows that this run
    translated by why they ended: "eos" or "length".
    """
    as_json = out.suffix.lower() in JSON_LINES
    if not as_json and out.suffix.lower() != ".txt":
        raise UsageError(f"--output {out}: neither .txt nor .jsonl", "give it a name that ends in one of these")
    task = translator.task

    def rows() -> Iterator[TextRow]:
        return read_sources(source, column=column, source=task.source, prefer=task.source_column, reading=reading)

    finish: Counter[str] = Counter()

    def answer(part: Sequence[TextRow]) -> list[Line]:
        records = translations(translator, part, how, scored=as_json)
        finish.update(record["finish"] for record in records if "finish" in record)
        if as_json:
            return [json_line(record) for record in records]
        return [Line(one_line(record.get("translation", "")), "error" in record) for record in records]

    key = artifacts.digest_of(
        source_digest(source), column, dataclasses.asdict(reading), identity, dataclasses.asdict(how)
    )
    failed = is_error if as_json else lambda line: False
    done = answer_file(rows, answer, out, key=key, failed=failed, force=force, progress=progress, chunk=_CHUNK)
    return done, finish


def cut_off(finish: Mapping[str, int], how: How) -> str:
    """Say how many translations the length limit cut off, and what it is."""
    limit = f" of {how.generation.max_length - 1} tokens" if how.generation else ""
    return f"{finish['length']:,} of {sum(finish.values()):,} translations were cut off at the length limit{limit}"


def _translate(translator: TextTranslator, texts: Sequence[str], how: How, *, scored: bool) -> list[Translated | str]:
    """Translations, or why there is none: a text that is refused fails alone."""
    try:
        return list(
            translator.translate(texts, how.generation, long_input=how.long_input, split=how.split, scored=scored)
        )
    except (DataError, RequestError) as error:
        if isinstance(error, RequestError) and error.status != 400:
            raise
        if len(texts) == 1:
            return [f"{error.message.removeprefix('text 0: ')} ({error.remedy})" if error.remedy else error.message]
        return [answer for text in texts for answer in _translate(translator, [text], how, scored=scored)]
