"""Add noise to the source texts of pairs. Placeholders and target codes stay unchanged, because the translation must keep them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from deploykit.tasks.translation.metrics import PLACEHOLDER
from deploykit.tasks.translation.rows import Pair

_KEPT = re.compile(rf"((?:\S*(?:{PLACEHOLDER.pattern})\S*)|>>[^<>\s]+<<)", re.VERBOSE)


def noisy_pair(pair: Pair, noise: Callable[[str], str]) -> Pair:
    """Return a pair with noise in its source."""
    return dataclasses.replace(pair, source=noisy_source(pair.source, noise))


def noisy_source(text: str, noise: Callable[[str], str]) -> str:
    """Return ``text`` with noise in all words but those that hold a placeholder, and a target code (>>fra<<)."""
    return "".join(part if i % 2 else _within(part, noise) for i, part in enumerate(_KEPT.split(text)))


def _within(part: str, noise: Callable[[str], str]) -> str:
    """Return a part with noise between the white space around it."""
    if not (words := part.strip()):
        return part
    start = part.index(words)
    return part[:start] + noise(words) + part[start + len(words) :]
