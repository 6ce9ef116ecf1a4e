"""Select tokens from the logits of a decode step."""

from __future__ import annotations

import numpy as np

from deploykit.runtime.engines.protocol import BestTokens, Choice, Floats, Ints


def select(logits: Floats, choice: Choice, best: BestTokens) -> tuple[Floats, Ints]:
    """Return the log-probabilities, descending, and ids of the best tokens: [rows, best] each.

    Of equal logits the lower id comes first. Changes ``logits``, float32 [rows, vocabulary].
    """
    forced = np.flatnonzero(choice.forced >= 0)
    restricted = np.diff(choice.begin) > 0
    restricted[forced] = True
    penalized = np.zeros(len(logits), bool)
    penalized[[row for row, _, _ in choice.penalties]] = True
    apart = (penalized | (restricted & choice.before)) & choice.scored
    sums = np.zeros(len(logits), np.float32)
    if apart.any():
        sums[apart] = best.log_sums(logits if apart.all() else logits[apart])
    raw = logits.copy() if (penalized & ~choice.of_probabilities & choice.before).any() else logits
    for row, tokens, penalty in choice.penalties:
        offset = sums[row] if choice.of_probabilities[row] else np.float32(0)
        values = logits[row, tokens] - offset
        logits[row, tokens] = np.where(values < 0, values * penalty, values / penalty) + offset
    logits[np.repeat(np.arange(len(logits)), np.diff(choice.begin)), choice.forbidden] = -np.inf
    logits[forced] = -np.inf
    logits[forced, choice.forced[forced]] = 0.0
    if not choice.scored.any():
        return np.zeros((len(logits), 1), np.float32), logits.argmax(axis=1)[:, None]
    if choice.best == 1:
        ids = logits.argmax(axis=1)[:, None]
        values = best.of(logits, ids[:, 0])[:, None]
    else:
        values, ids = best(logits, choice.best)
    before = np.flatnonzero(apart & choice.before)
    values[before] = logits[before[:, None], ids[before]] - sums[before, None]
    penalized_logits = np.flatnonzero(apart & penalized & choice.before & ~choice.of_probabilities)
    chosen = ids[penalized_logits, 0]
    values[penalized_logits, 0] = raw[penalized_logits, chosen] - sums[penalized_logits]
    values[forced, 0] = 0.0
    return values, ids
