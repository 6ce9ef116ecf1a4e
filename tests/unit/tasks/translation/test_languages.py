import pytest

from deploykit.tasks.translation.languages import (
    Language,
    closest,
    fits_script,
    function_words,
    letters_of,
    parse_language,
)


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("en", Language("en")),
        ("EN-us", Language("en", None, "US")),
        ("eng_Latn", Language("en", "Latn")),
        ("en_XX", Language("en")),
        ("fr_FR.UTF-8", Language("fr", None, "FR")),
        ("fre", Language("fr")),
        ("French", Language("fr")),
        ("nob_Latn", Language("no", "Latn")),
        ("sr@latin", Language("sr", "Latn")),
        ("zh_TW", Language("zh", "Hant", "TW")),
        ("zho_Hans", Language("zh", "Hans")),
        ("es_419", Language("es", None, "419")),
        ("tlh", Language("tlh")),
    ],
)
def test_codes_of_every_convention_are_taken_apart(code, language):
    assert parse_language(code) == language


@pytest.mark.parametrize(
    ("code", "candidates", "expected"),
    [
        ("pt_BR", ["pt-PT", "pt", "pt-BR"], "pt-BR"),
        ("pt_BR", ["pt-PT", "pt"], "pt"),
        ("pt_BR", ["en", "pt-PT"], "pt-PT"),
        ("zho_Hans", ["zh-TW", "zh-CN"], "zh-CN"),
        ("zho_Hans", ["zh-TW"], None),
        ("en", ["source", "french"], None),
    ],
)
def test_closest_variant_of_a_language(code, candidates, expected):
    assert closest(code, candidates) == expected


def test_letters_are_counted_by_script_whatever_their_form():
    assert letters_of("ab1 é") == {"LATIN": 3}
    assert letters_of("Ａﬁª") == {"LATIN": 3}
    assert letters_of("да, 今日 ハ") == {"CYRILLIC": 2, "CJK": 2, "KATAKANA": 1}
    assert letters_of("1 + 2 = 🎉") == {}


def test_names_and_code_of_latin_letters_are_at_home_in_other_scripts():
    russian = parse_language("ru")
    assert fits_script("PostgreSQL и MySQL Workbench", russian)
    assert not fits_script("PostgreSQL", russian)
    assert not fits_script("и 今日今日", russian)
    assert fits_script("100 %", russian)


@pytest.mark.parametrize("code", ["en", "fr", "de", "es", "it", "pt", "nl", "sv", "pl", "ro", "tr"])
def test_every_list_has_words_of_its_own(code):
    from deploykit.tasks.translation import languages

    own = [word for word, language in languages._LANGUAGE_OF_WORD.items() if language == code]
    assert len(own) >= 10
    assert function_words(" ".join(own)) == {code: len(own)}
