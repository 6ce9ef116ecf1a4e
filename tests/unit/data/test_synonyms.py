"""Words of a text replaced by words that mean the same."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from deploykit.data.synonyms import read_synonyms, replace_words
from deploykit.errors import DataError


def test_words_are_replaced_in_their_case_and_all_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("film, movie\ngreat, grand , superb\nlonely\n", encoding="utf-8")
    synonyms = read_synonyms(path)
    assert synonyms == {"film": ["movie"], "movie": ["film"], "great": ["grand", "superb"], "grand": ["great", "superb"],
                        "superb": ["great", "grand"]}  # fmt: skip
    text = 'A lonely film: "Film", FILM…  filmed, don\'t!'
    assert replace_words(text, 1.0, Random(0), synonyms) == 'A lonely movie: "Movie", MOVIE…  filmed, don\'t!'
    words = replace_words("film is " * 1000, 0.2, Random(0), synonyms).split()
    assert 0.17 < np.mean([word == "movie" for word in words[::2]]) < 0.23


def test_a_thesaurus_gives_synonyms_of_the_first_meaning(tmp_path: Path) -> None:
    path = tmp_path / "th_en.dat"
    lines = ["ISO8859-1", "movie|2", "(noun)|film|moving picture|show (generic term)", "(noun)|other",
             "good|1", "(adj)|full (similar term)|evil (antonym)", "a|1", "(noun)|angstrom", "naïf|1", "(adj)|Naïve"]  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="latin-1")
    assert read_synonyms(path) == {"movie": ["film", "moving picture"], "naïf": ["Naïve"]}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("none.txt", None, "cannot be read"),
        ("alone.txt", b"alone\n", "has no synonyms"),
        ("binary.txt", b"\xff\xfe\x00", "is not a list of synonyms"),
        ("cut.dat", b"UTF-8\nmovie|x\n(noun)|film\n", "is not a list of synonyms"),
        ("code.dat", b"klingon\nmovie|1\n(noun)|film\n", "is not a list of synonyms"),
        ("short.dat", b"UTF-8\nmovie|1\n", "is not a list of synonyms"),
    ],
)
def test_a_file_without_synonyms_is_refused(name: str, data: bytes | None, says: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=says):
        read_synonyms(tmp_path / name)
