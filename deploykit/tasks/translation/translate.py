"""Translate many rows with any translator."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.texts import TextRow
from deploykit.errors import UsageError
from deploykit.runtime.generation import Generation
from deploykit.runtime.serving_settings import LongInput, Split
from deploykit.tasks.answer_each import Refusal, answer_each
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.rows import one_line, read_sources
from deploykit.tasks.translation.translated import Translated

_CHUNK = 512  # enough sentences to choose from for the decoder to keep its rows full


@dataclasses.dataclass(frozen=True)
class TranslateOptions:
    """Options of translating. ``generation`` replaces the model's own; ``long_input`` says what to do with texts that
    are too long, and ``split`` which pieces of a text are translated one by one."""

    generation: Generation | None = None
    long_input: LongInput = "split"
    split: Split = "sentence"


def translations(
    translator: TextTranslator, rows: Sequence[TextRow], how: TranslateOptions, *, scored: bool = True
) -> list[dict[str, Any]]:
    """Return a record for each row: origin, text, translation, score, source_tokens, target_tokens and finish; or
    origin and error.

    An empty text has an empty translation. Without ``scored`` greedy search is faster and scores may be 0.
    """
    problems = [row.problem or too_long(row.text) for row in rows]
    good = [row.text or "" for row, problem in zip(rows, problems) if problem is None]

    def translate(texts: Sequence[str]) -> list[Translated]:
        return translator.translate(texts, how.generation, long_input=how.long_input, split=how.split, scored=scored)

    answered = iter(answer_each(translate, good))
    records: list[dict[str, Any]] = []
    for row, problem in zip(rows, problems):
        answer = None if problem is not None else next(answered)
        if not isinstance(answer, Translated):
            records.append({"origin": row.origin, "error": problem or _told(answer)})
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
    how: TranslateOptions,
    *,
    identity: str,
    column: str | None = None,
    reading: Reading = AS_FOUND,
    force: bool = False,
    progress: Callable[[int, int], None],
    spread: Spread | None = None,
) -> tuple[Answered, Counter[str]]:
    """Write a translation for each row of ``source``, as JSON lines or as lines of a .txt file; see ``answer_file``.

    A row that cannot be translated leaves an empty line in a .txt file. The second value counts the rows that this run
    translated by finish reason: "eos" or "length".
    """
    as_json = out.suffix.lower() in JSON_LINES
    if not as_json and out.suffix.lower() != ".txt":
        raise UsageError(f"--output {out}: neither .txt nor .jsonl", "give it a name that ends in one of these")
    task = translator.task

    def rows() -> Iterator[TextRow]:
        return read_sources(source, column=column, source=task.source, prefer=task.source_column, reading=reading)

    finish: Counter[str] = Counter()

    def answer(parts: Iterator[Part]) -> Iterator[Records]:
        function = functools.partial(translations, how=how, scored=as_json)
        for records in (spread or in_process(translator))(function, parts):
            finish.update(record["finish"] for record in records if "finish" in record)
            yield records

    key = artifacts.digest_of(source_digest(source), column, reading.key(), identity, dataclasses.asdict(how))
    done = answer_file(
        rows, answer, out, key=key, on_error=reading.on_error, force=force, progress=progress, chunk=_CHUNK,
        finish=None if as_json else _write_text,
    )  # fmt: skip
    return done, finish


def _write_text(answers: Path, out: Path) -> None:
    """Write the translations of a file of JSON lines to ``out``, a line each; an empty one for a row that failed."""
    with (
        answers.open(encoding="utf-8") as lines,
        artifacts.new_file(out) as path,
        path.open("w", encoding="utf-8") as file,
    ):
        file.writelines(one_line(json.loads(line).get("translation", "")) + "\n" for line in lines)


def cut_off(finish: Mapping[str, int], how: TranslateOptions) -> str:
    """Return a message: how many translations were cut off at the length limit."""
    limit = f" of {how.generation.max_length - 1} tokens" if how.generation else ""
    return f"{finish['length']:,} of {sum(finish.values()):,} translations were cut off at the length limit{limit}"


def _told(error: Refusal | None) -> str:
    """Return why a text was refused, with the remedy."""
    assert error is not None
    message = error.message.removeprefix("text 0: ")
    return f"{message} ({error.remedy})" if error.remedy else message
