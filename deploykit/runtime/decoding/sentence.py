"""Sentences, and the time spent on them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import numpy as np

from deploykit.runtime.engines.protocol import HeldBeam
from deploykit.runtime.generation import Generation
from deploykit.runtime.search import Beam, Finished, Ints, Rules

_TOKENS_PER_ENCODE = 2048


@dataclass
class Sentence:
    """One source sentence, from the queue to its result.

    ``token_ids`` include the special tokens. ``result`` is set when the sentence is done. ``scored``: compute the
    score, which costs a pass over the vocabulary. ``cancelled`` may be set at any time: the sentence then leaves
    without a result.
    """

    token_ids: Sequence[int]
    generation: Generation
    scored: bool = True
    cancelled: bool = False
    result: Finished | None = None
    text: str | None = None  # translation, once detokenized
    rules: Rules | None = None  # compiled from ``generation`` when the sentence is admitted
    rows: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    beam: Beam | None = None
    held: HeldBeam | None = None  # the beam, while the model holds it

    @property
    def claims(self) -> int:
        """Number of rows that the sentence takes."""
        return self.generation.beam_size


@dataclass
class Seconds:
    """Time that a translator spent, in seconds. Its decoder counts ``encoder``, ``decoder`` and ``search``."""

    tokenizing: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0
    search: float = 0.0
    detokenizing: float = 0.0

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def add(self, other: Seconds, share: float) -> None:
        """Add ``share`` of each figure of ``other``."""
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + share * getattr(other, field_.name))


def longest_first(sentences: Iterable[Sentence]) -> list[Sentence]:
    """Sort by length, longest first, so that short sentences fill the room left at the end."""
    return sorted(sentences, key=lambda sentence: -len(sentence.token_ids))


def of_similar_length(sentences: Sequence[Sentence]) -> Iterator[list[Sentence]]:
    """Yield groups of similar length to encode together: little padding, at most ``_TOKENS_PER_ENCODE`` tokens."""
    group: list[Sentence] = []
    for sentence in sorted(sentences, key=lambda s: len(s.token_ids)):
        length = len(sentence.token_ids)
        if group and (length > 1.25 * len(group[0].token_ids) + 2 or (len(group) + 1) * length > _TOKENS_PER_ENCODE):
            yield group
            group = []
        group.append(sentence)
    if group:
        yield group
