"""Add noise to texts, as people and keyboards do: typos, another case, other punctuation, words swapped or lost.

nlpaug does this too; its last release is of 2022.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Protocol, TypeVar

from deploykit.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    class _Row(DataclassInstance, Protocol):
        @property
        def origin(self) -> str: ...


SYNONYMS, MASK, BACK_TRANSLATION = "synonyms", "mask", "back-translation"
"""Noises that need a word list, a masked language model, or two translators."""

_NEIGHBOURS: Mapping[str, str] = {
    "q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij", "i": "uok", "o": "ipl", "p": "ol",
    "a": "qsz", "s": "adwx", "d": "sfec", "f": "dgrv", "g": "fhtb", "h": "gjyn", "j": "hkum", "k": "jli", "l": "kop",
    "z": "ax", "x": "zcs", "c": "xvd", "v": "cbf", "b": "vng", "n": "bmh", "m": "nj",
}  # fmt: skip
"""Neighbouring keys on an English keyboard."""
_MARKS = re.compile(r"[^\w\s]")
_UNUSUAL = ("…", "!!", "??", " -", ";", "~")
_WORD = re.compile(r"\S+")
_SPACED_WORD = re.compile(r"\S+\s*")

Noise = Callable[[str, float, Random], str]
Row = TypeVar("Row", bound="_Row")


def typos(text: str, rate: float, random: Random) -> str:
    """Mistype a letter in this share of the words: a neighbouring key, two letters swapped, one lost or doubled."""
    return _each_word(text, rate, random, lambda word: _mistyped(word, random))


def case(text: str, rate: float, random: Random) -> str:
    """Write this share of the words in the other case, in capitals or in lower case."""
    return _each_word(text, rate, random, lambda word: word.lower() if word != word.lower() else word.upper())


def punctuation(text: str, rate: float, random: Random) -> str:
    """Leave out this share of the marks, but never a whole text, and add an unusual one after this share of the words."""
    thinned = _MARKS.sub(lambda mark: "" if random.random() < rate else mark.group(), text)
    return _each_word(thinned if thinned.strip() else text, rate, random, lambda word: word + random.choice(_UNUSUAL))


def swap(text: str, rate: float, random: Random) -> str:
    """Swap this share of the words with the next one."""
    words = _WORD.findall(text)
    for i in range(len(words) - 1):
        if random.random() < rate:
            words[i], words[i + 1] = words[i + 1], words[i]
    swapped = iter(words)
    return _WORD.sub(lambda _: next(swapped), text)


def delete(text: str, rate: float, random: Random) -> str:
    """Delete this share of the words, but never all."""
    words = _SPACED_WORD.findall(text)
    kept = [word for word in words if random.random() >= rate]
    return "".join(kept or words[:1]).rstrip()


NOISES: Mapping[str, Noise] = {
    "typos": typos, "case": case, "punctuation": punctuation, "swap": swap, "delete": delete,
}  # fmt: skip


def changed_copies(
    rows: Sequence[Row], noises: Sequence[str], seed: int, rewrite: Callable[[str, float, Random], Iterable[Row]]
) -> dict[str, list[Row]]:
    """Return noise ("typos=0.1") -> a copy of each row with this noise, if it changes the row.

    ``rewrite`` returns all rows with the noise of a name, at a rate. The origin of a copy names the row and the noise:
    "tweets.csv:17 with typos".
    """
    found = {}
    for given in noises:
        name, rate = parse_noise(given)
        copies = rewrite(name, rate, Random(f"{seed} {name}"))
        found[given] = [
            dataclasses.replace(copy, origin=f"{row.origin} with {name}")
            for row, copy in zip(rows, copies)
            if copy != row
        ]
    return found


def noisy_copies(
    rows: Sequence[Row], noises: Sequence[str], seed: int, rewritten: Callable[[Row, Callable[[str], str]], Row]
) -> dict[str, list[Row]]:
    """Return ``changed_copies`` with noises of ``NOISES``. ``rewritten`` returns a row with its texts rewritten by a function."""

    def rewrite(name: str, rate: float, random: Random) -> Iterator[Row]:
        write = noisy(name, rate, random)
        return (rewritten(row, write) for row in rows)

    return changed_copies(rows, noises, seed, rewrite)


def noisy(name: str, rate: float, random: Random) -> Callable[[str], str]:
    """Return what writes a text with the noise ``name`` of ``NOISES``."""
    return lambda text: NOISES[name](text, rate, random)


_NAMES = (*NOISES, SYNONYMS, MASK, BACK_TRANSLATION)


def parse_noise(text: str) -> tuple[str, float]:
    """Parse ``typos=0.1`` to a name and a rate. Raises UsageError."""
    name, _, rate = text.partition("=")
    try:
        number = float(rate)
    except ValueError:
        number = 0.0
    if name not in _NAMES or not 0 < number <= 1:
        raise UsageError(
            f"--augment {text!r} is not a noise with a rate",
            f"write NAME=RATE, as typos=0.1; names: {', '.join(_NAMES)}",
        )
    return name, number


def check_noises(noises: Sequence[str], what: str) -> None:
    """Raise UsageError for a noise that is not one of ``NOISES``; ``what`` are the texts that get it."""
    for noise in noises:
        if parse_noise(noise)[0] not in NOISES:
            raise UsageError(f"--augment {noise} is for classification", f"{what} can have {', '.join(NOISES)}")


def _each_word(text: str, rate: float, random: Random, write: Callable[[str], str]) -> str:
    """Rewrite this share of the words; white space stays, as between the lines of a prompt."""
    return _WORD.sub(lambda word: write(word.group()) if random.random() < rate else word.group(), text)


def _mistyped(word: str, random: Random) -> str:
    letters = [i for i, character in enumerate(word) if character.lower() in _NEIGHBOURS]
    if not letters:
        return word
    i, kind = random.choice(letters), random.randrange(4)
    if kind == 0:
        key = random.choice(_NEIGHBOURS[word[i].lower()])
        return word[:i] + (key.upper() if word[i].isupper() else key) + word[i + 1 :]
    if kind == 1 and i + 1 < len(word):
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == 2 and len(word) > 1:
        return word[:i] + word[i + 1 :]
    return word[:i] + word[i] + word[i:]
