"""Change the options of a command line."""

from __future__ import annotations

from collections.abc import Sequence


def with_options(words: Sequence[object], *options: object) -> tuple[object, ...]:
    """Return ``words`` with ``options``, each followed by its value, in place of those of the same names."""
    given = set(options[::2])
    kept: list[object] = []
    skip = False
    for word in words:
        if skip or word in given:
            skip = not skip
            continue
        kept.append(word)
    return (*kept, *options)
