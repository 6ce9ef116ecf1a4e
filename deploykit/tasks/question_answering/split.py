"""Split questions into training, validation and test, so that no context is in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from deploykit.data.grouping import group_key, require_shares
from deploykit.errors import DataError
from deploykit.tasks.question_answering.rows import Example


def split(
    examples: Sequence[Example], *, validation: float, test: float, seed: int
) -> tuple[list[Example], list[Example], list[Example]]:
    """Give whole contexts, near duplicates of one another together, to validation and test until each has its share.

    The same rows in another order give the same splits. Raises DataError when there are too few contexts, UsageError for
    shares that leave nothing to train on.
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
    """Return ``count`` of the questions, of as few contexts as hold them, drawn by ``seed``."""
    return [example for group in _groups(examples, seed) for example in group][:count]


def drop_leaks(train: Sequence[Example], held_out: Iterable[Example]) -> tuple[list[Example], int]:
    """Return training rows without those whose context, or a near duplicate of it, is held out, and how many those were."""
    held = {group_key(context) for context in {example.context for example in held_out}}
    keys = {context: group_key(context) for context in {example.context for example in train}} if held else {}
    kept = [example for example in train if not held or keys[example.context] not in held]
    return kept, len(train) - len(kept)


def _groups(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    """Return questions by context, in an order drawn by the seed that does not depend on theirs."""
    keys = {context: group_key(context) for context in {example.context for example in examples}}
    by_key: dict[str, list[Example]] = {}
    for example in examples:
        by_key.setdefault(keys[example.context], []).append(example)

    def drawn(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()

    return [sorted(by_key[key], key=lambda e: (e.context, e.question, e.id)) for key in sorted(by_key, key=drawn)]
