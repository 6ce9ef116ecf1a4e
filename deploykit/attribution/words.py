"""Split texts into the words or sentences that attributions are given to, and remove some."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal

Span = tuple[int, int]
"""First character, and the one after the last."""

# Chinese and Japanese are written without spaces: each character is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])\w)+"
                   r"(?:['’](?:(?![\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])\w)+)*|[^\w\s]+")  # fmt: skip
_SENTENCE = re.compile(r"\S.*?(?:[.!?…]+['\"’”)\]]*(?=\s|$)|[。！？]+[」』”]*|(?=\s*(?:\n|$)))")

Unit = Literal["word", "sentence"]


def split_words(text: str) -> list[Span]:
    """Return the words and marks of a text."""
    return [match.span() for match in _WORD.finditer(text)]


def split_units(text: str, unit: Unit) -> list[Span]:
    """Return the words and marks of a text, or its sentences; a line break ends a sentence too."""
    return split_words(text) if unit == "word" else [match.span() for match in _SENTENCE.finditer(text)]


def without(text: str, words: Collection[Span]) -> str:
    """Return the text without some of its words; the other words keep their order, with single spaces."""
    kept, end = [], 0
    for first, last in sorted(words):
        kept.append(text[end:first])
        end = last
    return " ".join("".join([*kept, text[end:]]).split())


def weights_of_words(words: Sequence[Span], tokens: Sequence[Span], weights: Sequence[float]) -> list[float]:
    """Return the sum of the tokens' weights for each word. A token counts for the word with which it shares the most
    characters; one that lies in no word, for none."""
    found = [0.0] * len(words)
    for (first, last), weight in zip(tokens, weights):
        shared = [min(last, end) - max(first, start) for start, end in words]
        best = max(range(len(words)), key=shared.__getitem__, default=None)
        if best is not None and shared[best] > 0:
            found[best] += weight
    return found
