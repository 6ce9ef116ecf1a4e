"""What is wanted of a step's logits, and how it is found in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines import BestTokens

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass
class Choice:
    """Of each row the ``best`` tokens, best first, and their log-probabilities.

    ``forced`` int32 [rows]: a token that must come, with probability 1; -1 where none must. ``forbidden`` int32: tokens that
    must not, ascending, row by row; those of a row are ``begin[row]`` to ``begin[row + 1]`` (int32 [rows + 1]).
    ``scored`` bool [rows]: where it is False the best token is wanted alone. ``before`` bool [rows]: probabilities are from
    before any token was forbidden. ``penalties``: rows, tokens and what divides (or multiplies) their scores, of
    log-probabilities where ``of_probabilities`` [rows] and of logits elsewhere. ``changed`` grows when arrays are replaced.
    """

    best: int
    forced: NDArray[np.int32]
    forbidden: NDArray[np.int32]
    begin: NDArray[np.int32]
    scored: NDArray[np.bool_]
    before: NDArray[np.bool_]
    of_probabilities: NDArray[np.bool_]
    penalties: list[tuple[int, Ints, float]] = field(default_factory=list)
    changed: int = 0


@dataclass
class Texts:
    """What a search goes on with: by row int64 ``tokens`` [rows, longest], of which ``lengths`` count, the ``limits`` of
    those, and float32 ``sums`` of log-probabilities; and which tokens end a text, bool [vocabulary]."""

    tokens: Ints
    lengths: Ints
    limits: Ints
    sums: Floats
    ends: NDArray[np.bool_]


def select(logits: Floats, choice: Choice, best: BestTokens) -> tuple[Floats, Ints]:
    """Log-probabilities, descending, and ids: [rows, best] each. Of equals the lower id comes first.

    Changes ``logits``, float32 [rows, vocabulary].
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
