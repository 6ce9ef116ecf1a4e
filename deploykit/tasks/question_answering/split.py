"""Split questions into training, validation and test so that they share no context."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from deploykit.data.grouping import group_key, require_shares
from deploykit.errors import DataError
from deploykit.tasks.question_answering.rows import Example


def split(
    examples: Sequence[Example], *, validation: float, test: float, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Assign whole contexts, together with near duplicates, to validation and test until each has its share.

    The order of the rows does not matter. Raises DataError for too few contexts, UsageError for shares that leave
    nothing to train on.
    """
    require_shares(validation, test)
    wanted = {name: share for name, share in (("validation", validation), ("test", test)) if share}
    groups = _groups(examples, seed)
    if len(groups) <= len(wanted):
        raise DataError(
            f"{len(examples)} questions on {len(groups)} contexts are too few for training"
            f"{''.join(f' and {name}' for name in wanted)}, which share no context",
            "give more contexts, or files of their own for --validation and --test",
        )
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for done, (name, share) in enumerate(wanted.items()):
        most, left_to_others = share * len(examples), len(wanted) - done
        while len(groups) > left_to_others and (not parts[name] or len(parts[name]) + len(groups[-1]) / 2 <= most):
            parts[name] += groups.pop()
    parts["train"] = [example for group in groups for example in group]
    return parts["train"], parts["validation"], parts["test"]


def take(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Return ``count`` questions of as few contexts as possible, drawn by ``seed``."""
    return [example for group in _groups(examples, seed) for example in group][:count]


def drop_leaks(train: Sequence[Example], held_out: Iterable[Example]) -> tuple[list[Example], int]:
    """Remove training rows whose context, or a near duplicate, is held out. Return the rest and the number removed."""
    held = {group_key(context) for context in {example.context for example in held_out}}
    keys = {context: group_key(context) for context in {example.context for example in train}} if held else {}
    kept = [example for example in train if not held or keys[example.context] not in held]
    return kept, len(train) - len(kept)


def _groups(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """Return questions grouped by context, shuffled by the seed regardless of the rows' order."""
    keys = {context: group_key(context) for context in {example.context for example in examples}}
    by_key: dict[str, list[Example]] = {}
    for example in examples:
        by_key.setdefault(keys[example.context], []).append(example)

    def drawn(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    return [sorted(by_key[key], key=lambda e: (e.context, e.question, e.id)) for key in sorted(by_key, key=drawn)]
