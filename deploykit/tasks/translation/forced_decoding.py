"""Compare graphs on the same forced tokens: free translations diverge after the first token that differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
    cross = model.encode([pair.source for pair in pairs])
    model.admit(cross, [len(pair.source) for pair in pairs], [1] * len(pairs))
    steps = max(len(pair.target) for pair in pairs)
    tokens = np.full((len(pairs), steps + 1), task.pad_token_id, np.int64)
    tokens[:, 0] = task.decoder_start_token_id
    for row, pair in enumerate(pairs):
        tokens[row, 1 : 1 + len(pair.target)] = pair.target
    lengths = np.array([len(pair.target) for pair in pairs])
    found = np.zeros((len(pairs), steps), np.float32)
    for step in range(steps):
        found[:, step] = model.best.of(model.step(tokens[:, step]), tokens[:, step + 1])
    model.remove(np.arange(len(pairs)))
    kept = found[np.arange(steps) < lengths[:, None]]
    return np.nan_to_num(kept, nan=-1e4, neginf=-1e4)
