"""Task metrics: of labels from probabilities, in numpy alone, so that a serving machine can check its
own accuracy; of translations by sacrebleu."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import MissingDependencyError
from deploykit.tasks import Classification

TITLES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "agreement": "agreement",
}
"""Of figures in tables, for people."""

_CALIBRATION_BINS = 15
_PLACEHOLDER = re.compile(
    r"""
      %\(\w+\)[-+ #0]*\d*(?:\.\d+)?[a-zA-Z]                  # %(name)s
    | %(?:\d+\$)?[-+#0]*\d*(?:\.\d+)?(?:hh?|ll?|[zjtLq])?[diouxXeEfFgGcrsp@](?![a-zA-Z])  # %s %1$d %.2f %ld
    | %%
    | \$\{\w[\w.]*\}                                       # ${name}
    | \{\{\s*\w[\w.]*\s*\}\}                              # {{ name }}
    | \{\w*(?:[.\[][\w.\[\]]*)?(?:![rsa])?(?::[^{}\s]*)?\}  # {} {0} {name} {x.y} {n:.2f}
    | </?[a-zA-Z][\w:-]*(?:\s[^<>]*)?/?>                     # <b> </a> <br/> <a href="...">
    | &(?:\#\d+|\#x[\da-fA-F]+|[a-zA-Z]\w{1,30});           # &amp; &#39;
    """,
    re.VERBOSE,
)
_PLACEHOLDER_EXAMPLES = 5


def classification_metrics(
    task: Classification, truth: NDArray[np.bool_], scores: NDArray[np.float32]
) -> dict[str, Any]:
    """Metrics with stable keys, as fractions of 1.

    Args:
        truth: [rows, labels]; one true a row unless the task is multi-label.
        scores: probabilities [rows, labels].

    Keys: accuracy (multi-label: rows answered exactly), macro_precision, macro_recall, macro_f1,
    micro_f1, per_class (label -> precision, recall, f1, support), confusion_matrix (rows truth,
    columns answer; multi-label: label -> [[tn, fp], [fn, tp]]), expected_calibration_error (15 equal
    bins; Naeini et al., AAAI 2015). A ratio with nothing in its denominator is 0, as in
    scikit-learn. The macro averages run over the labels that occur in truth or answers.
    """
    if task.multi_label:
        answers = scores >= task.threshold
        confidence, correct = np.maximum(scores, 1 - scores).ravel(), (answers == truth).ravel()
    else:
        answers = np.zeros_like(truth)
        answers[np.arange(len(scores)), scores.argmax(axis=1)] = True
        confidence, correct = scores.max(axis=1), (answers & truth).any(axis=1)
    hits, answered, actual = (answers & truth).sum(axis=0), answers.sum(axis=0), truth.sum(axis=0)
    precision, recall = _ratio(hits, answered), _ratio(hits, actual)
    f1 = _ratio(2 * hits, answered + actual)
    seen = (answered + actual) > 0
    return {
        "accuracy": float((answers == truth).all(axis=1).mean()),
        "macro_precision": float(precision[seen].mean()),
        "macro_recall": float(recall[seen].mean()),
        "macro_f1": float(f1[seen].mean()),
        "micro_f1": float(_ratio(2 * hits.sum(), answered.sum() + actual.sum())),
        "expected_calibration_error": _calibration_error(confidence, correct),
        "per_class": {
            label: {
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(actual[i]),
            }
            for i, label in enumerate(task.labels)
        },
        "confusion_matrix": _confusion(task, truth, answers),
    }


def _confusion(task: Classification, truth: NDArray[np.bool_], answers: NDArray[np.bool_]) -> Any:
    if not task.multi_label:
        return (truth.astype(int).T @ answers.astype(int)).tolist()
    return {
        label: [
            [int((~t & ~a).sum()), int((~t & a).sum())],
            [int((t & ~a).sum()), int((t & a).sum())],
        ]
        for label, t, a in zip(task.labels, truth.T, answers.T)
    }


def _calibration_error(confidence: NDArray[np.float32], correct: NDArray[np.bool_]) -> float:
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    error = 0.0
    for b in range(_CALIBRATION_BINS):
        inside = bins == b
        if inside.any():
            error += float(inside.mean() * abs(correct[inside].mean() - confidence[inside].mean()))
    return error


def _ratio(numerator: Any, denominator: Any) -> NDArray[np.float64]:
    return np.divide(
        numerator, denominator, out=np.zeros(np.shape(numerator), np.float64), where=np.asarray(denominator) > 0
    )


def translation_metrics(hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """Metrics with stable keys; bleu and chrf from 0 to 100, as sacrebleu gives them (Post, WMT 2018).

    Keys: bleu, chrf, signatures (metric -> how exactly it was computed), placeholders (checked: those
    in the sources; kept: those of them found in the translations as often; examples: some rows that
    lost one). Raises MissingDependencyError without sacrebleu.
    """
    metrics = _sacrebleu()
    scores = {name: _corpus_score(metric, hypotheses, references) for name, metric in metrics.items()}
    return {
        **scores,
        "signatures": {name: str(metric.get_signature()) for name, metric in metrics.items()},
        "placeholders": _placeholders(hypotheses, sources),
    }


def bleu_and_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The two scores alone, from 0 to 100."""
    return {name: _corpus_score(metric, hypotheses, references) for name, metric in _sacrebleu().items()}


def placeholders(text: str) -> Counter[str]:
    """What must come through a translation as it is: ``%s``, ``%(name)d``, ``{0}``, ``${x}``, ``<b>``, ``&amp;``.

    Tags count by their names: attributes may hold text to translate.
    """
    return Counter(_tag(found[0]) for found in _PLACEHOLDER.finditer(text))


def _sacrebleu() -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MissingDependencyError(
            "BLEU and chrF need sacrebleu, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error
    return {"bleu": BLEU(force=True), "chrf": CHRF()}  # force: no warning of text that looks tokenized


def _corpus_score(metric: Any, hypotheses: Sequence[str], references: Sequence[str]) -> float:
    return round(float(metric.corpus_score(list(hypotheses), [list(references)]).score), 4)


def _placeholders(hypotheses: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    checked = kept = 0
    examples: list[dict[str, Any]] = []
    for hypothesis, source in zip(hypotheses, sources):
        wanted = placeholders(source)
        lost = wanted - placeholders(hypothesis)
        checked += wanted.total()
        kept += wanted.total() - lost.total()
        if lost and len(examples) < _PLACEHOLDER_EXAMPLES:
            examples.append({"source": source, "translation": hypothesis, "lost": sorted(lost.elements())})
    return {"checked": checked, "kept": kept, "examples": examples}


def _tag(placeholder: str) -> str:
    return re.sub(r"\s[^<>]*?(/?)>$", r"\1>", placeholder) if placeholder[0] == "<" else placeholder
