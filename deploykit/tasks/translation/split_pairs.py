"""Split pairs into training, validation and test so that they share no text of either side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from deploykit.data.grouping import group_key, require_shares
from deploykit.errors import DataError
from deploykit.tasks.translation.pairs import Pair


def split_pairs(
    pairs: Sequence[Pair], *, validation: float, test: float, seed: int
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Draw training, validation and test from groups of pairs that share a source or a target, also near duplicates.

    Sharing is transitive: if A shares its source with B and B its target with C, all three stay together. Groups too
    large for a split stay in training. The order of the pairs does not matter.

    Args:
        validation, test: fractions of the pairs; 0 gives an empty split.

    Raises:
        DataError: too few groups to fill every split.
        UsageError: the fractions leave nothing to train on.
    """
    require_shares(validation, test)
    shares = {"validation": validation, "test": test}
    groups = _groups(pairs, seed)
    parts: list[list[Pair]] = []
    for share in shares.values():
        part: list[Pair] = []
        room = max(1, round(share * len(pairs))) if share else 0
        rest = []
        for group in groups:
            if len(group) <= room - len(part):
                part += group
            else:
                rest.append(group)
        if room and not part and rest:  # All groups are larger than the split: take the smallest.
            smallest = min(rest, key=len)
            rest.remove(smallest)
            part = smallest
        groups = rest
        parts.append(part)
    if not groups or any(share and not part for share, part in zip(shares.values(), parts)):
        names = ["training", *(name for name, share in shares.items() if share)]
        raise DataError(
            f"{len(pairs)} pairs ({len(_groups(pairs, seed))} groups that share no text) are too few for "
            f"{' and '.join(names)}",
            "give more rows, or files of their own for --validation and --test",
        )
    return [pair for group in groups for pair in group], parts[0], parts[1]


def drop_pair_leaks(train: Sequence[Pair], held_out: Iterable[Pair]) -> tuple[list[Pair], int]:
    """Remove training pairs that share a source or a target with a held-out one. Return the rest and the number
    removed."""
    held = {key for pair in held_out for key in _keys(pair)}
    kept = [pair for pair in train if held.isdisjoint(_keys(pair))] if held else list(train)
    return kept, len(train) - len(kept)


def _keys(pair: Pair) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("source", group_key(pair.source)), ("target", group_key(pair.target))


def _groups(pairs: Sequence[Pair], seed: int) -> list[list[Pair]]:
    """Return groups of pairs that share a text, shuffled by the seed regardless of the pairs' order."""
    above: dict[tuple[str, str], tuple[str, str]] = {}

    def top(key: tuple[str, str]) -> tuple[str, str]:
        """Return the representative of a key's group (union-find with path halving)."""
        while above[key] != key:
            above[key] = above[above[key]]
            key = above[key]
        return key

    keys = [_keys(pair) for pair in pairs]
    for one, other in keys:
        above.setdefault(one, one)
        above.setdefault(other, other)
        above[top(one)] = top(other)
    by_top: dict[tuple[str, str], list[Pair]] = {}
    for pair, (one, _) in zip(pairs, keys):
        by_top.setdefault(top(one), []).append(pair)

    def drawn(group: Sequence[Pair]) -> bytes:
        name = f"{seed}\0{group_key(group[0].source)}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(name, digest_size=16).digest()

    groups = [sorted(group, key=lambda p: (p.source, p.target, p.origin)) for group in by_top.values()]
    return sorted(groups, key=drawn)
