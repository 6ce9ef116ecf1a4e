"""Compare graphs on the same forced tokens: free translations diverge after the first token that differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.quantization.next_token import log_softmax
from deploykit.runtime.engines.protocol import DecodeModel
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Translator

_STEPS = 32


@dataclass(frozen=True)
class ForcedTranslation:
    """Token ids of a sentence and of the beginning of its translation, without the start token."""

    source: Sequence[int]
    target: Sequence[int]


def greedy_translations(translator: Translator, texts: Sequence[str]) -> list[ForcedTranslation]:
    """Translate each sentence of ``texts`` greedily, up to 32 tokens."""
    generation = dataclasses.replace(translator.task.generation, beam_size=1)
    jobs = translator.begin(texts, generation, scored=False)
    sentences = [sentence for job in jobs for sentence in job.sentences]
    translator.decoder.run(sentences)
    return [
        ForcedTranslation(s.token_ids, s.result.tokens[:_STEPS].tolist()) for s in sentences if s.result is not None
    ]


def log_probabilities(model: DecodeModel, task: Translation, pairs: Sequence[ForcedTranslation]) -> NDArray[np.float32]:
    """Return the log-probability of each token of the translations given those before it, [tokens of all], clipped to
    finite values."""
    steps = (model.best.of(logits, right) for logits, right in _forced(model, task, pairs))
    found = np.stack(list(steps), axis=1)
    return np.nan_to_num(found[_inside(pairs)], nan=-1e4, neginf=-1e4)


def divergences(
    model: DecodeModel, reference: DecodeModel, task: Translation, pairs: Sequence[ForcedTranslation]
) -> NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of the next token's distribution from that of ``reference`` before each token of the
    translations, in nats, [tokens of all]; NaN where ``model`` computes no number."""
    both = zip(_forced(reference, task, pairs), _forced(model, task, pairs), strict=True)
    steps = [_divergence(log_softmax(right), log_softmax(ours)) for (right, _), (ours, _) in both]
    return np.stack(steps, axis=1)[_inside(pairs)]


def _forced(
    model: DecodeModel, task: Translation, pairs: Sequence[ForcedTranslation]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield the logits of each step, [pairs, vocabulary], and the token of each translation that comes next."""
    model.admit(model.encode([pair.source for pair in pairs]), [len(pair.source) for pair in pairs], [1] * len(pairs))
    steps = max(len(pair.target) for pair in pairs)
    tokens = np.full((len(pairs), steps + 1), task.pad_token_id, np.int64)
    tokens[:, 0] = task.decoder_start_token_id
    for row, pair in enumerate(pairs):
        tokens[row, 1 : 1 + len(pair.target)] = pair.target
    for step in range(steps):
        yield model.step(tokens[:, step]), tokens[:, step + 1]
    model.remove(np.arange(len(pairs)))


def _inside(pairs: Sequence[ForcedTranslation]) -> NDArray[np.bool_]:
    """Return which steps of each translation are its own tokens, [pairs, steps]."""
    lengths = np.array([len(pair.target) for pair in pairs])
    return np.arange(lengths.max()) < lengths[:, None]


def _divergence(right: NDArray[np.float64], ours: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        terms = np.exp(right) * (right - ours)
    return np.asarray(np.where(np.isneginf(right), 0.0, terms).sum(-1))  # a token that is impossible counts nothing
