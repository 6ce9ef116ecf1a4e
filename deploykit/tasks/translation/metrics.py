"""Compute the metrics of translations, with sacrebleu."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from deploykit.errors import MissingDependencyError

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
