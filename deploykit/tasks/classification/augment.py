"""Make noisy copies of rows: of training rows to learn from, and of measured rows to see the effect of noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.data.noise import BACK_TRANSLATION, MASK, NOISES, SYNONYMS, Noise, changed_copies, parse_noise
from deploykit.data.synonyms import read_synonyms, replace_words
from deploykit.errors import UsageError
from deploykit.inspection import robustness as inspection
from deploykit.inspection.robustness import Noisy
from deploykit.runtime.served import DEFAULT_URL
from deploykit.tasks.answer_each import Refusal, answer_each
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.classification.resampling import metrics_with_intervals
from deploykit.tasks.classification.rows import Example
from deploykit.tasks.opening import open_translator
from deploykit.training.kept_answers import kept_answers
from deploykit.training.rows import Say

if TYPE_CHECKING:
    from deploykit.tasks.translation.predictor import TextTranslator

Rewriter = Callable[[Sequence[str], float, Random], Sequence[str]]
"""Adds noise to each text at a rate."""


def augmented(
    rows: Sequence[Example], noises: Sequence[str], seed: int, rewriters: Mapping[str, Rewriter]
) -> dict[str, list[Example]]:
    """Return noise ("typos=0.1") -> a copy of each row with this noise, if it changes the row."""
    return changed_copies(rows, noises, seed, lambda name, rate, random: _noisy(rows, rewriters[name], rate, random))


@contextmanager
def rewriters(options: ClassificationOptions, work: Path, say: Say) -> Iterator[dict[str, Rewriter]]:
    """Yield noise -> the function that adds it, with its models open. Translations are kept in ``work``.

    Raises UsageError for translators that are not in opposite directions, and for a model that is not a masked language model.
    """
    names = {name for name, _ in map(parse_noise, options.augment)}
    found = {name: _each(NOISES[name]) for name in names if name in NOISES}
    if SYNONYMS in names:
        assert options.synonyms is not None
        known = read_synonyms(Path(options.synonyms))
        found[SYNONYMS] = _each(lambda text, rate, random: replace_words(text, rate, random, known))
    if MASK in names:
        from deploykit.tasks.classification.masking import MaskedWords

        found[MASK] = MaskedWords(options.mask_model or options.origin).rewrite
    with ExitStack() as opened:
        if BACK_TRANSLATION in names:
            there, back = (
                opened.enter_context(closing(open_translator(target, url=DEFAULT_URL)))
                for target in options.back_translate
            )
            if (there.task.source, there.task.target) != (back.task.target, back.task.source):
                raise UsageError(
                    f"--back-translate: the first translates {there.task.source} to {there.task.target}, and the second "
                    f"{back.task.source} to {back.task.target}",
                    "give one to another language, and one from that back",
                )
            found[BACK_TRANSLATION] = _back_translation(there, back, work, say)
        yield found


def robustness(
    predictor: TextClassifier, rows: Sequence[Example], truth: NDArray[Any], scores: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Measure rows as they are and with typos, in the other case, and with unseen punctuation, with intervals."""
    task = predictor.task

    def measured(noisy: Noisy) -> Mapping[str, Any]:
        asked = [row.asked for row in _noisy(rows, lambda texts, *_: list(map(noisy, texts)), 1.0, Random())]
        return metrics_with_intervals(task, truth, predictor.scores(asked))

    names = ("rmse", "mae") if task.regression else ("accuracy", "macro_f1")
    return inspection.robustness(metrics_with_intervals(task, truth, scores), measured, names)


def _noisy(rows: Sequence[Example], rewrite: Rewriter, rate: float, random: Random) -> list[Example]:
    texts = [text for row in rows for text in (row.text, row.text_pair) if text is not None]
    rewritten = iter(rewrite(texts, rate, random))
    return [
        dataclasses.replace(row, text=next(rewritten), text_pair=None if row.text_pair is None else next(rewritten))
        for row in rows
    ]


def _each(noise: Noise) -> Rewriter:
    return lambda texts, rate, random: [noise(text, rate, random) for text in texts]


def _back_translation(there: TextTranslator, back: TextTranslator, work: Path, say: Say) -> Rewriter:
    """Return a function that translates a share of the texts there and back; a text without a translation stays unchanged."""

    def translated(texts: Sequence[str]) -> Sequence[str]:
        for translator in (there, back):
            answers = answer_each(partial(translator.translate, scored=False), texts)
            texts = ["" if isinstance(answer, Refusal) else answer.text for answer in answers]
        return texts

    def rewrite(texts: Sequence[str], rate: float, random: Random) -> list[str]:
        chosen = [i for i in range(len(texts)) if random.random() < rate]
        found = list(texts)
        asked = [texts[i] for i in chosen]
        answers = kept_answers(
            work / f"back-translation.{digest_of(asked)[:12]}.jsonl",
            asked,
            translated,
            "translated there and back",
            say,
        )
        for i, answer in zip(chosen, answers):
            found[i] = answer or found[i]
        return found

    return rewrite
