"""Compute exact match and F1 of answers with numpy only, so that a serving machine can check its accuracy.

Source: the evaluation scripts of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016 and 2018) and of CMRC 2018 (Cui et al.,
2019).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.spans import Found

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_HAN = re.compile(r"[\u4e00-\u9fa5]")
# CMRC's list of punctuation.
_SEPARATE = frozenset("-:_*^/\\~`+=，。：？！“”；’《》……·、「」（）－～『』")
_LATIN_TOKEN = re.compile(r"\w+|[^\w\s]")

Score = Callable[[str, str], float]


def normalized(text: str) -> str:
    """Return an answer in lower case, without ASCII punctuation, English articles and extra white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """Return SQuAD's exact match: 1 if both are equal after normalization, else 0."""
    return float(normalized(answer) == normalized(truth))


def f1(answer: str, truth: str) -> float:
    """Return SQuAD's F1 over words; if either answer is empty, 1 if both are, else 0."""
    ours, theirs = normalized(answer).split(), normalized(truth).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def exact_match_by_characters(answer: str, truth: str) -> float:
    """Return CMRC's exact match: 1 if both are equal in lower case without punctuation, else 0."""
    return float(_without_punctuation(answer) == _without_punctuation(truth))


def f1_by_characters(answer: str, truth: str) -> float:
    """Return CMRC's F1 over the longest common run of Chinese characters and other words."""
    ours, theirs = _segments(answer), _segments(truth)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * _longest_common_run(ours, theirs) / (len(ours) + len(theirs))


def _without_punctuation(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _SEPARATE)


def _segments(text: str) -> list[str]:
    """Split into single Chinese characters, and the words and signs between them."""
    spaced = "".join(f" {c} " if _HAN.match(c) else c for c in _without_punctuation(text))
    return [token for part in spaced.split() for token in _LATIN_TOKEN.findall(part)]


def _longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    longest = 0
    lengths = [0] * (len(b) + 1)
    for x in a:
        lengths = [0, *(lengths[j] + 1 if x == y else 0 for j, y in enumerate(b))]
        longest = max(longest, *lengths)
    return longest


def is_chinese(texts: Sequence[str]) -> bool:
    """Return whether most texts have a Chinese character, so that answers are measured by characters."""
    return sum(_HAN.search(text) is not None for text in texts) > len(texts) / 2


def scores(
    task: QuestionAnswering, answers: Sequence[str], truths: Sequence[Sequence[str]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return exact match and F1 of each answer, float64 [rows]: the best over its right answers, which may be none.

    They are CMRC's for a model trained on Chinese, or if most right answers are Chinese.
    """
    if task.by_characters or is_chinese([text for truth in truths for text in truth]):
        return _best(exact_match_by_characters, answers, truths), _best(f1_by_characters, answers, truths)
    return _best(exact_match, answers, truths), _best(f1, answers, truths)


def _best(score: Score, answers: Sequence[str], truths: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    # As in SQuAD's script, ignore right answers of articles and punctuation only.
    kept = ([t for t in truth if normalized(t)] or [""] for truth in truths)
    return np.array([max(score(answer, t) for t in truth) for answer, truth in zip(answers, kept)], np.float64)


def answer_metrics(task: QuestionAnswering, found: Sequence[Found], examples: Sequence[Example]) -> dict[str, Any]:
    """Compute metrics with stable keys, as fractions of 1.

    Keys: exact_match, f1, intervals (bootstrap 95 % intervals over questions), rows. If some questions have no answer also
    has_answer and no_answer (exact_match, f1, rows of each; intervals has "has_answer.f1"), and best_exact_match, best_f1
    and best_f1_threshold, with the threshold that is best on these rows.
    """
    answers = [each.decide(task.no_answer_threshold).text for each in found]
    truths = [example.answers.text for example in examples]
    exact, overlap = scores(task, answers, truths)
    metrics: dict[str, Any] = {
        "exact_match": float(exact.mean()),
        "f1": float(overlap.mean()),
        "intervals": intervals(mean_scores(exact, overlap), len(examples)),
        "rows": len(examples),
    }
    answerable = np.array([bool(truth) for truth in truths])
    if answerable.all():
        return metrics
    for name, which in (("has_answer", answerable), ("no_answer", ~answerable)):
        if which.any():
            metrics[name] = {
                "exact_match": float(exact[which].mean()),
                "f1": float(overlap[which].mean()),
                "rows": int(which.sum()),
            }
            own = intervals(mean_scores(exact[which], overlap[which]), int(which.sum()))
            metrics["intervals"] |= {f"{name}.{metric}": found for metric, found in own.items()}
    best_exact, best_f1 = scores(task, [each.spans[0].text if each.spans else "" for each in found], truths)
    none = np.array([each.none for each in found])
    metrics["best_exact_match"], _ = best_threshold(none, best_exact, answerable)
    metrics["best_f1"], metrics["best_f1_threshold"] = best_threshold(none, best_f1, answerable)
    return metrics


def measure_of(task: QuestionAnswering, found: Sequence[Found], examples: Sequence[Example]) -> Measure:
    """Return exact match and F1 as functions of the questions' weights."""
    answers = [each.decide(task.no_answer_threshold).text for each in found]
    return mean_scores(*scores(task, answers, [example.answers.text for example in examples]))


def mean_scores(exact: NDArray[np.float64], overlap: NDArray[np.float64]) -> Measure:
    """Return the means of exact match and F1, [rows] each, as functions of the rows' weights."""

    def measure(weights: NDArray[np.float64]) -> dict[str, Any]:
        total = weights.sum(axis=-1)
        return {"exact_match": weights @ exact / total, "f1": weights @ overlap / total}

    return measure


def best_threshold(
    none: NDArray[np.float64], score: NDArray[np.float64], answerable: NDArray[np.bool_]
) -> tuple[float, float]:
    """Return the highest mean score over all thresholds, and its threshold.

    ``score`` is that of the best span, which may be empty. A question is answered if its log-odds ``none`` do not exceed
    the threshold. A question without an answer scores 1 if it is not answered.
    """
    order = np.argsort(none, kind="stable")
    gains = np.where(answerable, score, score - 1.0)[order]
    totals = np.concatenate([[0.0], np.cumsum(gains)]) + (~answerable).sum()
    totals[1:-1][np.diff(none[order]) == 0] = -1  # equal log-odds are all answered or none
    best = int(totals.argmax())
    threshold = float(none[order[best - 1]]) if best else float(none.min()) - 1.0
    return float(totals[best] / len(none)), threshold
