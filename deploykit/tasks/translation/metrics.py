"""Compute the metrics of translations, with sacrebleu."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.bootstrap import Measure, intervals, sacrebleu_score
from deploykit.errors import MissingDependencyError
from deploykit.tasks.translation.languages import parse_language

PLACEHOLDER = re.compile(
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


def translation_metrics(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str], target: str
) -> dict[str, Any]:
    """Compute metrics with stable keys; bleu and chrf from 0 to 100, by sacrebleu (Post, WMT 2018).

    ``target`` is the language code of the translations, by which BLEU's tokenizer is chosen: see ``bleu_tokenizer``.
    Keys: bleu, chrf, signatures (metric -> sacrebleu's signature), placeholders (checked: number in the sources; kept:
    number of those that the translations have too; examples: some rows that lost one). Raises MissingDependencyError
    without sacrebleu.
    """
    metrics = _sacrebleu(target, references)
    scores = {name: _corpus_score(metric, hypotheses, references) for name, metric in metrics.items()}
    return {
        **scores,
        "signatures": {name: str(metric.get_signature()) for name, metric in metrics.items()},
        "placeholders": _placeholders(hypotheses, sources),
    }


def metrics_with_intervals(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str], target: str
) -> dict[str, Any]:
    """Return ``translation_metrics`` with "intervals": bleu and chrf -> low and high."""
    metrics = translation_metrics(hypotheses, references, sources, target)
    return {**metrics, "intervals": intervals(measure_of(hypotheses, references, target), len(references))}


def measure_of(hypotheses: Sequence[str], references: Sequence[str], target: str) -> Measure:
    """Return BLEU and chrF as functions of the rows' weights."""
    scores = {
        name: sacrebleu_score(metric, hypotheses, references) for name, metric in _sacrebleu(target, references).items()
    }
    return lambda weights: {name: score(weights) for name, score in scores.items()}


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """Return chrF of each translation."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    return np.array([metric.sentence_score(h, [r]).score for h, r in zip(hypotheses, references)])


def bleu_and_chrf(hypotheses: Sequence[str], references: Sequence[str], target: str) -> dict[str, float]:
    """Compute the two scores only, from 0 to 100."""
    metrics = _sacrebleu(target, references)
    return {name: _corpus_score(metric, hypotheses, references) for name, metric in metrics.items()}


def bleu_tokenizer(target: str) -> str:
    """Return the name of sacrebleu's tokenizer for a language: 13a if words are separated by spaces, zh for Chinese.

    Japanese is tokenized by MeCab if installed (``pip install 'sacrebleu[ja]'``). Other languages without spaces (Thai,
    Khmer, Lao, Burmese, Tibetan) are tokenized by the SentencePiece model of FLORES-200 if sacrebleu has it
    (``sacrebleu --tokenize flores200`` downloads it). Without these, each character counts as a word.
    """
    language = parse_language(target)
    if language.has_spaces:
        return "13a"
    if language.base == "zh":
        return "zh"
    if language.base == "ja":
        return "ja-mecab" if find_spec("MeCab") and find_spec("ipadic") else "char"
    return "flores200" if _flores_model().is_file() else "char"


def placeholders(text: str) -> Counter[str]:
    """Count the placeholders that a translation must keep: ``%s``, ``%(name)d``, ``{0}``, ``${x}``, ``<b>``, ``&amp;``.

    Tags are compared by name: attributes may hold text to translate.
    """
    return Counter(_tag(found[0]) for found in PLACEHOLDER.finditer(text))


def _sacrebleu(target: str, references: Sequence[str]) -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise MissingDependencyError(
            "BLEU and chrF need sacrebleu, which is not installed", "pip install 'deploykit[finetune]'"
        ) from error
    # force: do not warn about text that looks tokenized.
    bleu = BLEU(force=True, tokenize=bleu_tokenizer(target))
    if not any(len(bleu.tokenizer(text).split()) >= bleu.max_ngram_order for text in references):
        # Texts too short for 4-grams would score 0 even if identical: count the n-grams that exist.
        bleu = BLEU(force=True, tokenize=bleu_tokenizer(target), effective_order=True)
    return {"bleu": bleu, "chrf": CHRF()}


def _flores_model() -> Path:
    from sacrebleu.tokenizers.tokenizer_spm import SPM_MODELS
    from sacrebleu.utils import SACREBLEU_DIR

    return Path(SACREBLEU_DIR, "models", Path(SPM_MODELS["flores200"]["url"]).name)


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
