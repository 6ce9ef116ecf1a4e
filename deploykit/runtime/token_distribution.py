"""Find the tokens that may come next: the likeliest tokens of a large vocabulary, without sorting it.

The order of the rules is that of Hugging Face's ``generate``: temperature, top-k, top-p, min-p, typical-p.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SORTED = 2048
"""Number of keys that is small enough to sort."""
_BLOCK = 512


def distribution(
    logits: NDArray[np.float32],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1,
    min_p: float = 0,
    typical_p: float = 1,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the tokens that the rules keep, and their shares of the probability.

    Ids are int64 [kept], ascending; shares float32 [kept], not normalized: the likeliest token has 1. Where top-p
    cuts between tokens of one probability, it keeps the lower ids.
    """
    if 0 < top_k < len(logits):
        ids = _top_k(logits, top_k)
        logits = logits[ids]
    else:
        ids = np.arange(len(logits))
    with np.errstate(over="ignore"):  # with a low temperature, only the likeliest token is left
        shares = np.exp((logits - logits.max()) / np.float32(max(temperature, 1e-30)))

    def keep(places: NDArray[np.int64]) -> None:
        nonlocal ids, shares
        ids, shares = ids[places], shares[places]

    if top_p < 1:
        keep(_top_p(shares, top_p))
    if min_p > 0:
        keep(np.flatnonzero(shares >= min_p))
    if typical_p < 1:
        keep(np.flatnonzero(shares))
        keep(_typical(shares, typical_p))
    elif shares.min() == 0:
        keep(np.flatnonzero(shares))
    return ids, shares


def draw(shares: NDArray[np.float32], uniform: float) -> int:
    """Return the index of one of the ``shares``, sampled in proportion to its size. ``uniform``: from [0, 1).

    It adds up blocks first: ``numpy.cumsum`` over a whole vocabulary takes ten times as long.
    """
    starts = range(0, len(shares), _BLOCK)
    whole = len(shares) // _BLOCK
    sums = np.empty(len(starts))
    sums[:whole] = shares[: whole * _BLOCK].reshape(whole, _BLOCK).sum(1)
    sums[whole:] = shares[whole * _BLOCK :].sum()
    cumulative = sums.cumsum()
    left = uniform * cumulative[-1]
    block = min(int(np.searchsorted(cumulative, left, side="right")), len(starts) - 1)
    within = np.cumsum(shares[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    place = int(np.searchsorted(within, left - (cumulative[block] - sums[block]), side="right"))
    return starts[block] + min(place, len(within) - 1)


def top_tokens(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids of the ``count`` likeliest tokens, likeliest first, the lower id first where they are equal."""
    ids = _top_k(logits, count)
    order = np.argsort(-logits[ids], kind="stable")
    found: NDArray[np.int64] = ids[order[:count]]
    return found


def _top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the tokens whose logits are no less than the k-th largest, ascending."""
    if k >= len(logits):
        return np.arange(len(logits))
    # At least k logits reach the k-th largest maximum of disjoint blocks, and few others do.
    width = len(logits) // (8 * k)
    if width > 1:
        maxima = logits[: width * 8 * k].reshape(8 * k, width).max(1)
        ids = np.flatnonzero(logits >= np.partition(maxima, -k)[-k])
    else:
        ids = np.arange(len(logits))
    values = logits[ids]
    found: NDArray[np.int64] = ids[values >= np.partition(values, -k)[-k]]
    return found


def _top_p(shares: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Return the places of the smallest set of the largest shares that reaches ``top_p`` of all."""
    total = float(shares.sum(dtype=np.float64))
    # The tokens below this mean share have no more than 1 - top_p together.
    places = np.flatnonzero(shares >= (1 - top_p) * total / len(shares))
    values, target = shares[places], top_p * total
    boundary = _boundary(values, values, target)
    kept = np.flatnonzero(values >= boundary)
    excess = float(values[kept].sum(dtype=np.float64)) - target
    if boundary > 0 and excess >= boundary:  # more tokens have the boundary's share than are needed
        ties = np.flatnonzero(values[kept] == boundary)
        kept = np.delete(kept, ties[len(ties) - min(len(ties) - 1, int(excess / boundary)) :])
    found: NDArray[np.int64] = places[kept]
    return found


def _typical(shares: NDArray[np.float32], typical_p: float) -> NDArray[np.int64]:
    """Return the places of the tokens whose information is nearest to the entropy and that reach ``typical_p`` together."""
    probabilities = shares / shares.sum(dtype=np.float64)
    information = -np.log(probabilities)
    nearness = -np.abs(information - probabilities @ information)
    return np.flatnonzero(nearness >= _boundary(nearness, probabilities, typical_p))


def _boundary(keys: NDArray[Any], weights: NDArray[Any], target: float) -> float:
    """Return the largest key such that the weights of this key and larger ones reach ``target``: a weighted quantile.

    It is a quickselect: sorting a whole vocabulary takes ten times as long.
    """
    above = 0.0
    while len(keys) > _SORTED:
        pivot = keys.mean()
        upper = np.flatnonzero(keys >= pivot)
        if len(upper) in (0, len(keys)):
            break
        weight = float(weights[upper].sum(dtype=np.float64))
        if above + weight < target:
            above += weight
            upper = np.flatnonzero(keys < pivot)
        keys, weights = keys[upper], weights[upper]
    order = np.argsort(-keys, kind="stable")
    place = int(np.searchsorted(above + np.cumsum(weights[order], dtype=np.float64), target, side="left"))
    return float(keys[order[min(place, len(order) - 1)]])
