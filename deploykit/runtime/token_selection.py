"""Select tokens from the logits of a decode step."""

from __future__ import annotations

import numpy as np

from deploykit.runtime.engines.protocol import BestTokens, Floats, Ints, TokenSelection


def select(logits: Floats, selection: TokenSelection, best: BestTokens) -> tuple[Floats, Ints]:
    """Return the log-probabilities, descending, and ids of the best tokens: [rows, best] each.

    Of equal logits the lower id comes first. Changes ``logits``, float32 [rows, vocabulary]. The log-probability of a row
    with NaN, or whose highest logit is infinite, is NaN.
    """
    forced = np.flatnonzero(selection.forced >= 0)
    restricted = np.diff(selection.begin) > 0
    restricted[forced] = True
    penalized = np.zeros(len(logits), bool)
    penalized[[row for row, _, _ in selection.penalties]] = True
    apart = (penalized | (restricted & selection.before)) & selection.scored
    sums = np.zeros(len(logits), np.float32)
    if apart.any():
        sums[apart] = best.log_sums(logits if apart.all() else logits[apart])
    raw = logits.copy() if (penalized & ~selection.of_probabilities & selection.before).any() else logits
    for row, tokens, penalty in selection.penalties:
        offset = sums[row] if selection.of_probabilities[row] else np.float32(0)
        values = logits[row, tokens] - offset
        logits[row, tokens] = np.where(values < 0, values * penalty, values / penalty) + offset
    logits[np.repeat(np.arange(len(logits)), np.diff(selection.begin)), selection.forbidden] = -np.inf
    logits[forced] = -np.inf
    logits[forced, selection.forced[forced]] = 0.0
    if not selection.scored.any():
        ids = logits.argmax(axis=1)[:, None]  # of NaN, if there is one
        highest = np.take_along_axis(logits, ids, axis=1)
        return np.where(np.isnan(highest) | (highest == np.inf), np.float32(np.nan), np.float32(0)), ids
    if selection.best == 1:
        ids = logits.argmax(axis=1)[:, None]
        values = best.of(logits, ids[:, 0])[:, None]
    else:
        values, ids = best(logits, selection.best)
    before = np.flatnonzero(apart & selection.before)
    values[before] = logits[before[:, None], ids[before]] - sums[before, None]
    penalized_logits = np.flatnonzero(apart & penalized & selection.before & ~selection.of_probabilities)
    chosen = ids[penalized_logits, 0]
    values[penalized_logits, 0] = raw[penalized_logits, chosen] - sums[penalized_logits]
    values[forced, 0] = 0.0
    return values, ids
