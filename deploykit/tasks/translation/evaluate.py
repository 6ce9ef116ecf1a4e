"""Measure a translator on pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploykit.data.reading import AS_FOUND, Reading
from deploykit.data.texts import unanswered
from deploykit.errors import DataError
from deploykit.runtime.generation import Generation
from deploykit.tasks.answer_each import answer_each
from deploykit.tasks.protocol import Evaluation, Grade
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.metrics import measure_of, metrics_with_intervals, translation_metrics
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.read_pairs import read_sources
from deploykit.tasks.translation.rows import Pair, PairColumns, load_pairs, one_line
from deploykit.tasks.translation.translated import Translated
from deploykit.text import is_blank

_TRANSLATED_AT_A_TIME = 256


@dataclass(frozen=True)
class TranslatedRows:
    """Pairs to measure on: as they are, duplicates included. ``problems`` as in ``Evaluation``."""

    pairs: list[Pair]
    problems: tuple[str, ...] = ()


def translated_rows(
    source: str,
    task: Translation,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
    reading: Reading = AS_FOUND,
    split: str = "test",
) -> TranslatedRows:
    """Read pairs in the task's languages. References are left as they are, not even normalized to NFC.

    Raises DataError when no row has both sides.
    """
    raw, _ = load_pairs(
        source,
        source=task.source,
        target=task.target,
        source_column=source_column,
        target_column=target_column,
        prefer=PairColumns(task.source_column, task.target_column),
        reading=reading,
        split=split,
    )
    pairs, problems = [], []
    for row in raw:
        text = one_line(row.source or "")
        if row.problem:
            problems.append(f"{row.origin}: {row.problem}")
        elif row.unusable:
            problems.append(f"{row.origin}: the entry is {row.unusable}")
        elif not text or not row.target or is_blank(row.target):
            problems.append(f"{row.origin}: the {'translation' if text else 'text'} is missing")
        else:
            pairs.append(Pair(text, row.target.strip(), row.origin))
    if not pairs:
        raise DataError(f"{source}: no row has both a text and its translation", "give a file of translated rows")
    return TranslatedRows(pairs, tuple(problems))


def evaluate_translator(
    translator: TextTranslator,
    rows: TranslatedRows,
    generation: Generation | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Evaluation:
    """Translate every row and compare. ``progress`` is called with (rows done, rows in all).

    Raises DataError when the model refuses every text.
    """
    pairs, translated, refused = translate_rows(translator, rows.pairs, generation, scored=False, progress=progress)
    hypotheses = [one.text for one in translated]
    return evaluation(translator.task, pairs, hypotheses, (*rows.problems, *refused))


def translate_rows(
    translator: TextTranslator,
    rows: Sequence[Pair],
    generation: Generation | None,
    *,
    scored: bool,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[Pair], list[Translated], list[str]]:
    """Translate every row. Returns the pairs that were translated, their translations, and a line for each refused row.

    Raises DataError when the model refuses every text.
    """
    pairs: list[Pair] = []
    translations, refused = [], []
    for start in range(0, len(rows), _TRANSLATED_AT_A_TIME):
        part = rows[start : start + _TRANSLATED_AT_A_TIME]
        found = answer_each(
            lambda texts: translator.translate(texts, generation, scored=scored), [pair.source for pair in part]
        )
        for pair, translated in zip(part, found):
            if isinstance(translated, Translated):
                pairs.append(pair)
                translations.append(translated)
            else:
                refused.append(f"{pair.origin}: {translated.message}")
        progress(start + len(part), len(rows))
    if not pairs:
        raise DataError(refused[0], "give other texts")
    return pairs, translations, refused


def evaluation(
    task: Translation, pairs: Sequence[Pair], hypotheses: Sequence[str], problems: tuple[str, ...]
) -> Evaluation:
    """Return the metrics of translated pairs."""
    references, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
    metrics = metrics_with_intervals(hypotheses, references, sources, task.target)
    return Evaluation(metrics, len(pairs), problems, measure=measure_of(hypotheses, references, task.target))


def grade(
    translator: TextTranslator, texts: Sequence[str], references: Sequence[str], generation: Generation | None
) -> Grade:
    """Translate every text and compare."""
    answers = [
        translated.text
        for i in range(0, len(texts), _TRANSLATED_AT_A_TIME)
        for translated in translator.translate(texts[i : i + _TRANSLATED_AT_A_TIME], generation, scored=False)
    ]
    target = translator.task.target
    metrics = translation_metrics(answers, references, texts, target)
    return Grade(None, tuple(answers), metrics, measure_of(answers, references, target))


def texts_and_references(
    source: str, task: Translation, source_column: str | None, target_column: str | None, reading: Reading
) -> list[tuple[str, str | None]]:
    """Read texts, with their translations if the source has them."""
    try:
        rows = translated_rows(source, task, source_column=source_column, target_column=target_column, reading=reading)
        return [(pair.source, pair.target) for pair in rows.pairs]
    except DataError as no_references:
        if target_column is not None:
            raise
        texts = read_sources(
            source, column=source_column, source=task.source, prefer=task.source_column, reading=reading
        )
        return unanswered([row.text for row in texts], no_references)
