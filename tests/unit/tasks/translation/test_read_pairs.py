import json
import random
import string
from collections import Counter

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from deploykit.data.grouping import group_key
from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.rows import (
    Pair,
    PairCleaningReport,
    PairColumns,
    RawPair,
    clean_pairs,
    drop_pair_leaks,
    load_pairs,
    one_line,
    read_sources,
    split_pairs,
)

hostile = st.text(
    st.sampled_from("aB 1.é今\n\r\t\0\x0b\x0c\x1c\x85\u2028\u2029\u00a0\u202f\ufeff\U0001f600\ud800\u0301")
    | st.characters(),
    max_size=12,
)
texts = st.text(st.sampled_from("abAB é今.!@ "), min_size=1, max_size=4)
pairs = st.lists(st.builds(Pair, texts, texts, st.just("o:1")), max_size=40)
fractions = st.sampled_from([0, 0.1, 0.3, 0.45])
in_tmp = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def jsonl(path, *rows):
    return write(path, "\n".join(json.dumps(row) for row in rows))


def load(path, source="en", target="fr", **options):
    rows, columns = load_pairs(str(path), source=source, target=target, **options)
    return [(row.source, row.target) for row in rows], columns


def clean(*rows, source="en", target="fr", **options):
    raw = [RawPair(one, other, f"f:{i}") for i, (one, other) in enumerate(rows, start=1)]
    return clean_pairs(raw, source=source, target=target, **options)


def distinct(n):
    return [Pair(f"source {i}", f"cible {i}", f"f:{i}") for i in range(n)]


# Reading


@pytest.mark.parametrize(
    ("names", "source", "target", "expected"),
    [
        (["fr", "en"], "en", "fr", PairColumns("en", "fr")),
        (["id", "source", "target"], "id", "en", PairColumns("source", "target")),
        (["id", "en"], "id", "en", PairColumns("id", "en")),
        (["src", "tgt", "score"], "de", "cs", PairColumns("src", "tgt")),
        (["sentence_en", "sentence_fr"], "eng_Latn", "fra_Latn", PairColumns("sentence_en", "sentence_fr")),
        (["sentence_eng_Latn", "sentence_fra_Latn"], "en_XX", "fr_XX", PairColumns("sentence_eng_Latn", "sentence_fra_Latn")),
        (["English", "French"], "en", "fr", PairColumns("English", "French")),
        (["EN-us", "FR_ca"], "en", "fr", PairColumns("EN-us", "FR_ca")),
        (["en", "pt_PT", "pt_BR"], "en", "pt-BR", PairColumns("en", "pt_BR")),
        (["text_pt_PT", "text_pt_BR", "text_en"], "en", "pt_BR", PairColumns("text_en", "text_pt_BR")),
        (["en", "translation"], "en", "fr", PairColumns("en", "translation")),
        (["question", "fr"], "en", "fr", PairColumns("question", "fr")),
        (["fr", "source", "x"], "en", "fr", PairColumns("source", "fr")),
    ],
)  # fmt: skip
def test_columns_are_detected_by_language_or_role(tmp_path, names, source, target, expected):
    path = jsonl(tmp_path / "a.jsonl", dict.fromkeys(names, "x"))
    assert load(path, source, target)[1] == expected


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ["a", "b"],
            {},
            r"as the source \(en to fr\); its columns are 'a', 'b'\n.*--source-column and --target-column",
        ),
        (["en", "b", "c"], {}, "as the target.*\n.*give --target-column"),
        (["title_en", "text_en", "fr"], {}, "as the source.*\n.*give --source-column"),
        (["en", "fr"], {"source_column": "EN"}, "no column 'EN'; its columns are 'en', 'fr'\n.*--source-column"),
        (["en", "fr"], {"target_column": "x"}, "no column 'x'.*\n.*--target-column"),
    ],
)
def test_columns_not_found_are_an_error_with_the_list(tmp_path, names, options, message):
    path = jsonl(tmp_path / "a.jsonl", dict.fromkeys(names, "x"))
    with pytest.raises(DataError, match=f"a.jsonl: .*{message}"):
        load(path, **options)


def test_given_columns_win_then_preferred_ones(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"en": "1", "fr": "2", "mt": "3", "en2": "4"})
    assert load(path, target_column="mt")[1] == PairColumns("en", "mt")
    assert load(path, prefer=PairColumns("en2", "mt"))[1] == PairColumns("en2", "mt")
    assert load(path, prefer=PairColumns("en2", "none"))[1] == PairColumns("en2", "fr")
    assert load(path, source_column="mt", prefer=PairColumns("en2", "mt"))[1] == PairColumns("mt", "fr")
    with pytest.raises(UsageError, match="as source and as target"):
        load(path, source_column="en", target_column="en")


def test_nested_translation_column_is_read(tmp_path):
    rows = [{"id": 1, "translation": {"en": "a", "fr": "b"}}, {"id": 2, "translation": {"en": "c", "fr": None}}]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    assert load(path) == ([("a", "b"), ("c", None)], PairColumns("translation.en", "translation.fr"))
    assert [row.text for row in read_sources(path, source="fr")] == ["b", None]


def test_saved_dataset_and_parquet_with_nested_translations_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"translation": [{"en": "a", "fr": "b"}]},
        features=datasets.Features({"translation": datasets.Translation(languages=["en", "fr"])}),
    )
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "a.parquet")
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        assert load(path) == ([("a", "b")], PairColumns("translation.en", "translation.fr"))


def test_cells_that_are_no_text_are_missing(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", *({"en": value, "fr": "x"} for value in (None, ["a"], float("nan"), 5, "")))
    assert [source for source, _ in load(path)[0]] == [None, None, None, "5", ""]


def test_tsv_with_a_header_is_quoted_like_csv(tmp_path):
    path = write(tmp_path / "a.tsv", 'en\tfr\n"say ""hi"""\t"deux\nlignes"\n')
    assert load(path) == ([('say "hi"', "deux\nlignes")], PairColumns("en", "fr"))


def test_stray_quotes_in_a_tsv_with_a_header_merge_no_pairs(tmp_path):
    rows = [(f"line {i}", f"ligne {i}") for i in range(120)]
    rows[7], rows[40] = ('"Save as', "« Enregistrer sous"), ('a 5" disk', 'un disque de 5"')
    path = write(tmp_path / "a.tsv", "en\tfr\n" + "".join(f"{en}\t{fr}\n" for en, fr in rows))
    assert load(path) == (rows, PairColumns("en", "fr"))


def test_tsv_without_a_header_is_read_as_plain_lines(tmp_path):
    path = write(tmp_path / "a.tsv", '"Hello," he said.\t« Bonjour », dit-il.\n\n"Open\tOuvrir "\r\nlast\tdernier')
    rows = [('"Hello," he said.', "« Bonjour », dit-il."), ('"Open', 'Ouvrir "'), ("last", "dernier")]
    assert load(path) == (rows, PairColumns("1", "2"))
    assert load(path, prefer=PairColumns("1", "2"))[0] == rows
    assert load(path, source_column="2", target_column="1")[0] == [(b, a) for a, b in rows]
    assert [row.text for row in read_sources(path, source="en")] == [a for a, _ in rows]
    assert [row.text for row in read_sources(path, source="en", prefer="source")] == [a for a, _ in rows]
    assert [row.origin for row in read_sources(path, source="fr", column="2")] == ["a.tsv:1", "a.tsv:3", "a.tsv:4"]
    with pytest.raises(DataError, match="no column 'en'; its columns are 'x', 'y'"):
        load(write(tmp_path / "b.tsv", "x\ty\n1\t2\n"), source_column="en")


def test_numbers_choose_columns_of_a_wider_tsv_without_a_header(tmp_path):
    path = write(tmp_path / "a.tsv", "Go.\tVa !\tCC-BY 1\nRun!\tCours !\tCC-BY 2\n")
    rows = [("Go.", "Va !"), ("Run!", "Cours !")]
    assert load(path, source_column="1", target_column="2") == (rows, PairColumns("1", "2"))
    assert load(path, prefer=PairColumns("1", "2"))[0] == rows


def test_line_with_another_number_of_fields_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a.tsv: the row at line 3 has 3 fields, the first row has 2"):
        load(write(tmp_path / "a.tsv", "a\tb\nc\td\ne\tf\tg\n"))


def test_paired_files_are_found_by_prefix_and_by_name(tmp_path):
    write(tmp_path / "corpus.en", "one\n\ntwo\x0bhalves\n")
    write(tmp_path / "corpus.fr", "un\n\ndeux")
    rows = [("one", "un"), ("", ""), ("two\x0bhalves", "deux")]
    assert load(tmp_path / "corpus") == (rows, PairColumns("en", "fr"))
    assert load(tmp_path / "corpus", "eng_Latn", "fr_XX")[0] == rows
    assert load(f"{tmp_path}/corpus.fr,{tmp_path}/corpus.en", "fr", "en")[0] == [(b, a) for a, b in rows]
    raw, _ = load_pairs(str(tmp_path / "corpus"), source="en", target="fr")
    assert raw[2].origin == "corpus.en:3"


def test_exact_code_wins_over_another_of_the_language(tmp_path):
    for name in ("en", "pt_PT", "pt_BR", "pt"):
        write(tmp_path / f"a[1].{name}", name)
    for target in ("pt", "pt_BR", "pt_PT"):
        assert load(tmp_path / "a[1]", "en", target)[0] == [("en", target)]


@pytest.mark.parametrize(("one", "other"), [("a\nb\nc\n", "a\nb\n"), ("a\nb\n", "a\nb\nc\n"), ("a\nb\nc\n", "a\r\nb")])
def test_unequal_line_counts_name_both_files_and_counts(tmp_path, one, other):
    write(tmp_path / "c.en", one)
    write(tmp_path / "c.fr", other)
    counts = one.count("\n"), len(other.split())
    with pytest.raises(DataError, match=rf"c.en has {counts[0]} lines and .*c.fr has {counts[1]}\n.*remedy: line n"):
        load(tmp_path / "c")


def test_half_of_a_pair_of_files_is_an_error_that_names_the_other(tmp_path):
    write(tmp_path / "c.en", "a")
    with pytest.raises(DataError, match=r"c.fr: no such file, and .*c.en is there"):
        load(tmp_path / "c")
    with pytest.raises(DataError, match=r"none.txt: no such file"):
        load(f"{tmp_path}/c.en,{tmp_path}/none.txt")
    with pytest.raises(DataError, match=r"names 3 files"):
        load(",".join([f"{tmp_path}/c.en"] * 3))
    with pytest.raises(DataError, match=r"c.en: files of type '.en' are not read as pairs\n.*two text files"):
        load(tmp_path / "c.en")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a,b.po", "a.tmx"])
def test_empty_and_absent_files_are_errors(tmp_path, name):
    with pytest.raises(DataError):
        load(tmp_path / name)
    with pytest.raises(DataError):
        load(write(tmp_path / name, ""))


# Texts to translate


def test_empty_lines_are_empty_texts_and_missing_cells_are_problems(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n  \nlast\x0cpage\ttab")
    assert [(r.origin, r.text, r.problem) for r in read_sources(path, source="en")] == [
        ("a.txt:1", "one", None),
        ("a.txt:2", "", None),
        ("a.txt:3", "", None),
        ("a.txt:4", "last page tab", None),
    ]
    path = jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": None}, {"text": " "})
    assert [(r.text, r.problem) for r in read_sources(path, source="en")] == [
        ("x", None),
        (None, "the text is missing"),
        ("", None),
    ]


@in_tmp
@given(st.lists(hostile.map(lambda text: text.replace("\n", "")), max_size=20), st.booleans())
@example(["a\rb", "\x85", "\u2028", "\x1c"], True)
def test_line_count_in_is_line_count_out(tmp_path, lines, ends):
    data = ("\n".join(lines) + ("\n" if ends else "")).encode(errors="ignore").decode().lstrip("\ufeff")
    assume("\n" in data or "\r" not in data)  # without any \n, \r ends lines, as old Macs wrote them
    expected = data.count("\n") + bool(data and not data.endswith("\n"))
    (tmp_path / "a.txt").write_bytes(data.encode())
    try:
        rows = list(read_sources(str(tmp_path / "a.txt"), source="en"))
    except DataError:  # Very many control characters are no text at all.
        assume(False)
    assert len(rows) == expected
    for row in rows:
        assert row.problem is None
        assert row.text is not None
        assert len(f"{row.text}\n".splitlines()) == 1


@in_tmp
@given(st.lists(st.none() | hostile, min_size=1, max_size=10))
def test_row_count_of_a_table_in_is_out(tmp_path, cells):
    path = jsonl(tmp_path / "a.jsonl", *({"en": cell} for cell in cells))
    rows = list(read_sources(path, source="en"))
    assert [row.text is None for row in rows] == [cell is None for cell in cells]


@given(hostile)
def test_one_line_is_one_line_and_stays_as_it_is(text):
    line = one_line(text)
    assert len(f"{line}\n".splitlines()) == 1
    assert one_line(line) == line


def test_source_column_is_detected_or_given(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"fr": "f", "en": "e", "text": "t"})
    texts = [next(read_sources(path, source="en", **o)).text for o in ({}, {"prefer": "text"}, {"column": "fr"})]
    assert texts == ["e", "t", "f"]
    assert next(read_sources(path, source="en", prefer="source")).text == "e"
    with pytest.raises(DataError, match=r"no column 'x'.*\n.*--source-column"):
        next(read_sources(path, source="en", column="x"))
    assert next(read_sources(jsonl(tmp_path / "b.jsonl", {"any": "x"}), source="en")).text == "x"
    with pytest.raises(DataError, match=r"as the source \(en\)"):
        next(read_sources(jsonl(tmp_path / "c.jsonl", {"a": "x", "b": "y"}), source="en"))


# Cleaning


def test_every_step_is_counted():
    kept, report = clean(
        (None, "x"),
        ("x", None),
        (" \0 ", "x"),
        ("x", "\n"),
        ("Hello there", "Bonjour"),
        ("Hello there\n", "Bonjour "),
        ("SAME", "same"),
        ("...", "..."),
        ("?!", "Quoi"),
        ("word", "un mot " * 20),
        ("x" * 50_000, "y" * 50_000),
        ("Hello", "Здравствуйте"),
        ("a\x07b\nc", "un\tdeux"),
        ("bye", "Please close the window and wait for this to finish."),
    )
    assert kept == [Pair("Hello there", "Bonjour", "f:5"), Pair("a b c", "un deux", "f:13")]
    assert report == PairCleaningReport(
        rows_read=14,
        missing_source=1,
        missing_target=1,
        empty_source=1,
        empty_target=1,
        too_long=1,
        punctuation_only=2,
        identical=1,
        length_ratio=2,
        wrong_script=1,
        exact_duplicates=1,
        rows_kept=2,
        unicode_repaired=1,
        lines_joined=1,
    )
    assert "  -        1 with a target that is the source dropped" in report.lines()
    assert report.lines()[0] == "14 rows read"
    assert report.lines()[-1] == "2 rows kept"
    assert report.to_json()["too_long"] == 1


def test_marked_entries_are_dropped_and_counted():
    raw = [RawPair("a", "b", "o", "fuzzy"), RawPair("c", "d", "o", "obsolete"), RawPair("e", None, "o")]
    kept, report = clean_pairs(raw, source="en", target="fr")
    assert not kept
    assert (report.fuzzy, report.obsolete, report.missing_target) == (1, 1, 1)


def test_same_source_with_two_translations_is_kept_and_case_is_no_duplicate():
    assert len(clean(("Open", "Ouvrir"), ("Open", "Ouvert"), ("open", "ouvrir"), ("Open", "Ouvrir"))[0]) == 3


@pytest.mark.parametrize(
    ("one", "other", "target"),
    [
        ("OK", "D'accord, c'est bon", "fr"),
        ("Save", "保存", "zh"),
        ("The quick brown fox jumps over the lazy dog near the river bank.", "敏捷的棕色狐狸跳过河边的懒狗。", "zh_CN"),
        ("The quick brown fox jumps over the lazy dog near the river bank.", "素早い茶色の狐が川岸の怠け者の犬を飛び越える。", "ja"),
        ("The quick brown fox jumps over the lazy dog.", "빠른 갈색 여우가 게으른 개를 뛰어넘는다.", "ko"),
        ("I have been waiting for you in the house of my old friend.", "สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ", "th"),
    ],
)  # fmt: skip
def test_translations_of_usual_lengths_pass(one, other, target):
    assert clean((one, other), target=target)[1].rows_kept == 1


def test_max_ratio_and_max_characters_are_options():
    rows = [("word " * 20, "mot " * 45)]
    assert clean(*rows)[1].rows_kept == 1
    assert clean(*rows, max_ratio=1.5)[1].length_ratio == 1
    assert clean(*rows, max_characters=100)[1].too_long == 1


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("fr", "Œuvre à 20 µm", "Привет, мир"),
        ("ru", "Привет, Docker Compose", "Hello world"),
        ("rus_Cyrl", "Интерфейс API", "مرحبا"),
        ("ar", "مرحبا بالعالم HTML", "Привет"),
        ("he_IL", "שלום", "مرحبا"),
        ("hin_Deva", "नमस्ते दुनिया", "নমস্কার"),
        ("el", "Γειά σου", "Привет"),
        ("th", "สวัสดี", "你好"),
        ("ko", "안녕하세요", "こんにちは"),
        ("ja", "ハロー、世界", "안녕하세요"),
        ("zh_Hant", "你好世界", "こんにちは"),
        ("sr", "Zdravo", "你好"),
        ("srp_Cyrl", "Здраво", "Zdravo"),
        ("fr", "ＡＢＣ 2024", "東京"),
    ],
)
def test_script_of_the_language_is_wanted(target, right, wrong):
    assert clean(("something", right), target=target)[1].rows_kept == 1
    assert clean(("something", wrong), target=target)[1].wrong_script == 1
    assert clean(("something", wrong), target="xx")[1].rows_kept == 1


def test_text_without_letters_has_no_wrong_script():
    assert clean(("1,000.5", "1 000,5"), target="ru")[1].rows_kept == 1


def test_untranslated_row_is_dropped_as_wrong_language():
    rows = [("The page that you want is not here.", "And this was not the one that you want to have.")]
    assert clean(*rows)[1].wrong_language == 1
    assert clean(*rows, check_languages=False)[1].rows_kept == 1


ENGLISH_FRENCH = (
    ("You are not allowed to open this file", "Vous ne pouvez pas ouvrir ce fichier"),
    ("The name of the group that you will see", "Le nom du groupe que vous verrez dans la liste"),
    ("Search for a user with this address", "Chercher un utilisateur avec cette adresse"),
    ("Open", "Ouvrir"),
    ("Close", "Fermer"),
)


def test_swapped_sides_are_an_error_by_small_words_and_by_script():
    swapped = [(b, a) for a, b in ENGLISH_FRENCH]
    message = r"source and target seem swapped in 3 rows of 5 \('en' to 'fr'\); the first is at f:1\n.*swap --source"
    with pytest.raises(DataError, match=message):
        clean(*swapped)
    assert clean(*swapped, source="fr", target="en")[1].rows_kept == 5
    assert clean(*swapped, check_languages=False)[1].rows_kept == 5
    russian = [("Привет", "Hello"), ("Мир", "World"), ("Дом", "House")]
    with pytest.raises(DataError, match="swapped in 3 rows of 3"):
        clean(*russian, source="en", target="ru")
    assert clean(*russian, source="ru", target="en")[1].rows_kept == 3


FINNISH = (
    "Tiedostoa ei voitu tallentaa levylle.", "Avaa uusi kansio tästä valikosta.", "Valitse kieli, jota haluat käyttää.",
    "Haluatko varmasti poistaa nämä tiedostot?", "Salasana on väärä, yritä uudelleen.", "Lataus keskeytettiin.",
    "Yhteyttä palvelimeen ei voitu muodostaa.", "Näytä kaikki viestit uudessa ikkunassa.", "Kirjoita nimesi tähän.",
    "Tallenna muutokset ennen sulkemista.", "Asetuksia ei löytynyt tältä koneelta.", "Tulosta valitut sivut.",
)  # fmt: skip
HUNGARIAN = (
    "A fájlt nem lehetett menteni a lemezre.", "Nyissa meg az új mappát ebből a menüből.", "Válassza ki a nyelvet.",
    "Biztosan törölni akarja ezeket a fájlokat?", "A jelszó helytelen, próbálja újra.", "A letöltés megszakadt.",
    "Nem sikerült kapcsolódni a kiszolgálóhoz.", "Az összes üzenet megjelenítése új ablakban.", "Írja ide a nevét.",
    "Mentse a változásokat a bezárás előtt.", "A beállítások nem találhatók ezen a gépen.", "Kijelölt oldalak.",
)  # fmt: skip
ENGLISH = (
    "The file could not be saved to the disk.", "Open the new folder from this menu.", "Choose the language to use.",
    "Do you really want to delete these files?", "The password is wrong, try again.", "The download was interrupted.",
    "The connection to the server failed.", "Show all messages in a new window.", "Type your name here.",
    "Save the changes before closing.", "The settings were not found on this machine.", "Print the selected pages.",
)  # fmt: skip


@pytest.mark.parametrize(("code", "texts"), [("fi", FINNISH), ("hun_Latn", HUNGARIAN)])
def test_a_language_without_a_list_of_words_is_told_too(code: str, texts: tuple[str, ...]) -> None:
    right = list(zip(ENGLISH, texts))
    assert clean(*right, source="en", target=code)[1].rows_kept == len(right)
    with pytest.raises(DataError, match="source and target seem swapped"):
        clean(*((b, a) for a, b in right), source="en", target=code)
    untranslated = [(text, f"{text} Now.") for text in ENGLISH]
    with pytest.raises(DataError, match=f"target texts seem to be in 'en', not in '{code}'"):
        clean(*untranslated, source="en", target=code)
    other = HUNGARIAN if texts is FINNISH else FINNISH
    with pytest.raises(DataError, match="target texts seem to be in"):
        clean(*zip(ENGLISH, other), source="en", target=code)
    kept, report = clean(*right, untranslated[0], source="en", target=code)
    assert (len(kept), report.wrong_language) == (len(right), 1)


def test_a_few_swapped_rows_are_dropped_or_kept_without_an_error():
    rows = [*ENGLISH_FRENCH, ("Где", "Where")]
    assert clean(*rows)[1].wrong_script == 1


def test_side_in_another_script_or_language_is_an_error():
    with pytest.raises(DataError, match=r"5 target texts of 5 are not in the script of 'ru'\n.*--target"):
        clean(*ENGLISH_FRENCH, target="ru")
    rows = [(f"{a} {n}", f"{b} {n}") for n in range(4) for a, b in ENGLISH_FRENCH]
    with pytest.raises(DataError, match=r"target texts seem to be in 'fr', not in 'de': 12 by their words"):
        clean(*rows, target="de")
    with pytest.raises(DataError, match=r"source texts seem to be in 'en', not in 'es'"):
        clean(*rows, source="es")
    assert clean(*rows, target="xx")[1].rows_kept == 20


def test_control_characters_and_surrogates_are_repaired():
    kept, report = clean(("a\x00b\x1b[0m", "c\ud800e\u0301"))
    assert kept == [Pair("a b [0m", "c\ufffdé", "f:1")]
    assert report.unicode_repaired == 1


@given(st.lists(st.tuples(st.none() | hostile, st.none() | hostile), max_size=20))
def test_rows_add_up_and_what_is_kept_is_clean(rows):
    kept, report = clean(*rows, check_languages=False)
    counts = report.to_json()
    assert counts.pop("rows_read") == len(rows)
    del counts["unicode_repaired"], counts["lines_joined"]
    assert sum(counts.values()) == len(rows)
    assert report.rows_kept == len(kept) == len({(p.source, p.target) for p in kept})
    again, second = clean(*((p.source, p.target) for p in kept), check_languages=False)
    assert [(p.source, p.target) for p in again] == [(p.source, p.target) for p in kept]
    assert second.unicode_repaired == second.lines_joined == 0


# Splitting


def test_fractions_hold():
    assert [len(part) for part in split_pairs(distinct(1000), validation=0.1, test=0.2, seed=1)] == [700, 100, 200]


def test_pairs_connected_by_shared_texts_stay_together():
    chain = [Pair(f"s{i // 2}", f"t{(i + 1) // 2}", "o") for i in range(30)]
    train, validation, test = split_pairs(chain + distinct(100), validation=0.1, test=0.1, seed=0)
    assert set(chain) <= set(train)
    assert validation
    assert test


def test_seed_and_nothing_else_draws_the_split():
    rows = distinct(200)
    first = split_pairs(rows, validation=0.1, test=0.1, seed=3)
    assert split_pairs(random.Random(0).sample(rows, 200), validation=0.1, test=0.1, seed=3) == first
    assert split_pairs(rows, validation=0.1, test=0.1, seed=4) != first


@pytest.mark.parametrize("rows", [[], distinct(2), [Pair("same", f"t{i}", "o") for i in range(50)]])
def test_too_few_groups_are_refused_with_a_remedy(rows):
    with pytest.raises(DataError, match=r"too few for training and validation and test\n.*--validation and --test"):
        split_pairs(rows, validation=0.1, test=0.1, seed=0)


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (1, 0), (-0.1, 0.1), (float("nan"), 0)])
def test_fractions_that_leave_no_training_rows_are_a_usage_error(validation, test):
    with pytest.raises(UsageError):
        split_pairs(distinct(10), validation=validation, test=test, seed=0)


@given(pairs, fractions, fractions, st.integers(0, 3))
def test_splits_hold_every_row_once_and_no_text_straddles_two(rows, validation, test, seed):
    try:
        parts = split_pairs(rows, validation=validation, test=test, seed=seed)
    except DataError:
        return
    assert Counter(pair for part in parts for pair in part) == Counter(rows)
    for side in ("source", "target"):
        keys = [{group_key(getattr(pair, side)) for pair in part} for part in parts]
        assert sum(map(len, keys)) == len(set.union(*keys))
    assert parts[0]
    assert [bool(part) for part in parts[1:]] == [bool(validation), bool(test)]


@given(pairs, pairs)
def test_no_text_of_a_held_out_pair_stays_in_training(train, held_out):
    kept, dropped = drop_pair_leaks(train, held_out)
    assert len(kept) + dropped == len(train)
    for side in ("source", "target"):
        held = {group_key(getattr(pair, side)) for pair in held_out}
        assert held.isdisjoint(group_key(getattr(pair, side)) for pair in kept)


def test_leaks_are_dropped_by_either_side_near_duplicates_included():
    train = [Pair("Open!", "Ouvrir", "t:1"), Pair("Unlock", "OUVERT", "t:2"), Pair("Close", "Fermer", "t:3")]
    assert drop_pair_leaks(train, [Pair("open", "ouvert.", "v:1")]) == ([train[2]], 2)
    assert drop_pair_leaks(train, []) == (train, 0)


def test_a_long_line_is_read_and_cleaned_in_linear_time(tmp_path):
    line = "".join(random.Random(0).choices(string.ascii_letters + "  \t\u2028é", k=50_000))
    write(tmp_path / "c.en", f"{line}\nshort\n")
    write(tmp_path / "c.fr", " " * 50_000 + "\t" * 50_000 + "x\ncourt\n")
    raw, _ = load_pairs(str(tmp_path / "c"), source="en", target="fr")
    assert clean_pairs(raw, source="en", target="fr")[1].too_long == 1
