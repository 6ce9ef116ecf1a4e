"""Compute the metrics of a language model: of its probabilities, and of its answers.

Each comes with a bootstrap 95 % interval over rows (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals, sacrebleu_score
from deploykit.errors import MissingDependencyError, UsageError
from deploykit.tasks.text_generation.generator import RowScore
from deploykit.tasks.text_generation.syntax import Syntax, parses


def scored_metrics(scores: Sequence[RowScore], texts: Sequence[str]) -> dict[str, Any]:
    """Return metrics of the probabilities of right answers: loss (nats a token), perplexity, bits_per_byte, token_accuracy.

    ``texts`` are the supervised texts, whose UTF-8 bytes ``bits_per_byte`` is of. ``intervals`` holds a low and a high
    value for each metric.
    """
    tokens = sum(len(score.logprobs) for score in scores)
    return {**_with_intervals(scored_measure(scores, texts), len(scores)), "tokens": tokens}


def scored_measure(scores: Sequence[RowScore], texts: Sequence[str]) -> Measure:
    """Return the same as functions of the rows' weights."""
    nats = np.array([-float(score.logprobs.sum()) for score in scores])
    tokens = np.array([len(score.logprobs) for score in scores], float)
    right = np.array([float(score.best.sum()) for score in scores])
    size = np.array([len(text.encode()) for text in texts], float)

    def measure(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        loss = weights @ nats / (weights @ tokens)
        return {
            "loss": loss,
            "perplexity": np.exp(loss),
            "bits_per_byte": weights @ nats / math.log(2) / np.maximum(weights @ size, 1),
            "token_accuracy": weights @ right / (weights @ tokens),
        }

    return measure


def answer_metrics(
    answers: Sequence[str], references: Sequence[str], *, answer_regex: str | None = None, syntax: Syntax | None = None
) -> dict[str, Any]:
    """Return metrics of generated answers: exact_match, token_f1, rouge_l from 0 to 1, chrf from 0 to 100.

    ``first_word`` is the share whose first word is the reference's: of a command, the program. With ``answer_regex``
    also ``extracted_match``: whether the last match (its first group, if it has one) is that of the reference. With
    ``syntax`` also ``parses``: the share of answers that parse; nothing is run.
    """
    measure = answer_measure(answers, references, answer_regex=answer_regex, syntax=syntax)
    return _with_intervals(measure, len(answers))


def answer_measure(
    answers: Sequence[str], references: Sequence[str], *, answer_regex: str | None = None, syntax: Syntax | None = None
) -> Measure:
    """Return the same as functions of the rows' weights."""
    rows = {
        "exact_match": [exact_match(a, r) for a, r in zip(answers, references)],
        "token_f1": [token_f1(a, r) for a, r in zip(answers, references)],
        "first_word": [float(a.split()[:1] == r.split()[:1]) for a, r in zip(answers, references)],
        "rouge_l": _rouge_l(answers, references),
    }
    if answer_regex is not None:
        pattern = compiled(answer_regex)
        found = [(extracted(pattern, a), extracted(pattern, r)) for a, r in zip(answers, references)]
        rows["extracted_match"] = [float(a is not None and a == r) for a, r in found]
    if syntax is not None:
        rows["parses"] = [float(parses(answer, syntax)) for answer in answers]
    values = {name: np.array(per_row) for name, per_row in rows.items()}
    chrf = sacrebleu_score(_chrf(), answers, references)
    return lambda weights: {
        **{name: weights @ v / weights.sum(-1) for name, v in values.items()},
        "chrf": chrf(weights),
    }


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both are equal apart from white space at the ends, else 0."""
    return float(answer.strip() == reference.strip())


def token_f1(answer: str, reference: str) -> float:
    """Return SQuAD's F1 of words without case, punctuation and articles (Rajpurkar et al., 2016)."""
    found, wanted = Counter(_words(answer)), Counter(_words(reference))
    if not found or not wanted:
        return float(found == wanted)
    same = (found & wanted).total()
    return 2 * same / (found.total() + wanted.total())


def extracted(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the last match of ``pattern`` in ``text``, without commas and outer white space: "1,000" is "1000"."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found = matches[-1].group(1 if pattern.groups else 0)
    return (found or "").replace(",", "").strip()


def _words(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def compiled(regex: str) -> re.Pattern[str]:
    """Return ``--answer-regex`` as a pattern. Raises UsageError for what is not a regular expression."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise UsageError(f"--answer-regex is not a regular expression: {error}", "correct it") from error


def _rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingDependencyError(
            "ROUGE-L needs rouge-score, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error
    scorer = RougeScorer(["rougeL"])
    return [float(scorer.score(r, a)["rougeL"].fmeasure) for a, r in zip(answers, references)]


def _chrf() -> Any:
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MissingDependencyError(
            "chrF needs sacrebleu, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error
    return CHRF()


def _with_intervals(measure: Measure, rows: int) -> dict[str, Any]:
    """Return metrics with intervals. ``measure`` takes weights of the rows, [rows] or [resamples, rows], and returns values by name."""
    whole = measure(np.ones(rows))
    return {**{name: _round(value) for name, value in whole.items()}, "intervals": intervals(measure, rows)}


def _round(value: Any) -> float:
    return round(float(value), 6)
