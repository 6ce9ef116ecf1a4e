import re
from random import Random

import pytest

from deploykit.data.noise import NOISES, noisy, noisy_copies
from deploykit.errors import UsageError
from deploykit.tasks.translation.noise import noisy_pair, noisy_source
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.rows import Pair

SOURCE = ">>fra<< Save the %(name)s file, or <b>close {count} windows</b> now."


@pytest.mark.parametrize("name", NOISES)
def test_placeholders_codes_and_white_space_stay(name: str) -> None:
    found = noisy_source(SOURCE, noisy(name, 1.0, Random(0)))
    assert found != SOURCE
    assert found.startswith(">>fra<< ")
    for kept in ("%(name)s", "<b>close", "{count}", "windows</b>"):
        assert kept in found.split()
    assert not re.search(r"  |^ | $", found)


def test_a_copy_has_a_noisy_source_the_same_target_and_names_its_row() -> None:
    pairs = [Pair("Save the file before you close it", "Enregistrer", "a.csv:2"), Pair("%s", "%s", "a.csv:3")]
    found = noisy_copies(pairs, ("typos=0.9", "case=1"), 0, noisy_pair)
    assert [copy.origin for copy in found["typos=0.9"]] == ["a.csv:2 with typos"], (
        "a row that stays the same has no copy"
    )
    assert found["case=1"] == [Pair("save THE FILE BEFORE YOU CLOSE IT", "Enregistrer", "a.csv:2 with case")]
    assert noisy_copies(pairs, ("typos=0.9",), 0, noisy_pair)["typos=0.9"] == found["typos=0.9"], "by the seed alone"


def test_noises_that_are_for_classification_are_refused() -> None:
    options = TranslationOptions(
        train="a.csv", from_config="marian-tiny", source_lang="en", target_lang="fr", augment=("mask=0.1",)
    )
    with pytest.raises(UsageError, match=r"--augment mask=.* is for classification"):
        options.check()
