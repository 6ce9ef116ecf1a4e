"""Noise in texts: how much of it, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from deploykit.data.noise import NOISES, parse_noise
from deploykit.errors import UsageError
from deploykit.tasks.classification.augment import augmented, rewriters
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.tasks.classification.rows import Example

TEXT = " ".join(f"Word{chr(97 + i % 26)} is" for i in range(500))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("typos", 0.17, 0.23), ("case", 0.17, 0.23), ("punctuation", 0.17, 0.23)]
)
def test_a_share_of_the_words_changes(name: str, low: float, high: float) -> None:
    words, noisy = TEXT.split(), NOISES[name](TEXT, 0.2, Random(0)).split()
    if name == "punctuation":  # " -" is a word of its own
        noisy = [word for word in noisy if word != "-"]
        low -= 0.05
    assert len(noisy) == len(words)
    assert low < np.mean([a != b for a, b in zip(words, noisy)]) < high
    if name == "typos":
        assert all(abs(len(a) - len(b)) <= 1 for a, b in zip(words, noisy))


def test_words_are_swapped_and_deleted() -> None:
    words = [str(i) for i in range(1000)]
    swapped = NOISES["swap"](" ".join(words), 0.1, Random(0)).split()
    assert sorted(swapped) == sorted(words)
    assert swapped != words
    assert 850 < len(NOISES["delete"](" ".join(words), 0.1, Random(0)).split()) < 950
    assert NOISES["delete"]("only one", 1.0, Random(0)) == "only"


@pytest.mark.parametrize("name", NOISES)
def test_white_space_stays_and_no_text_becomes_empty(name: str) -> None:
    prompt = "Fix this:\n\n    for item in items:\n        show(item)\n"
    found = NOISES[name](prompt, 0.5, Random(1))
    assert found.strip() != prompt.strip()
    for kept in ("\n\n    ", "\n        ") if name != "delete" else ("\n",):
        assert kept in found
    assert NOISES[name]("?", 1.0, Random(0)).strip()


def test_copies_name_their_row_and_keep_its_label(tmp_path: Path) -> None:
    rows = [Example(f"Some words of row {i}", "a", f"x.csv:{i}", "A pair") for i in range(20)]
    noises = ("case=1", "typos=0.5")
    with rewriters(ClassificationOptions(augment=noises), tmp_path, print) as known:
        copies = augmented(rows, noises, 0, known)
        assert copies["case=1"][3].origin == "x.csv:3 with case"
        assert copies["case=1"][3].text == "some WORDS OF ROW 3"
        assert copies["case=1"][3].text_pair == "a PAIR"
        assert {copy.label for found in copies.values() for copy in found} == {"a"}
        assert copies == augmented(rows, noises, 0, known)
        assert copies != augmented(rows, noises, 1, known)


@pytest.mark.parametrize("text", ["typos", "typos=0", "typos=2", "typo=0.1", "typos=much", ""])
def test_a_noise_without_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a noise with a rate"):
        parse_noise(text)
