import random
import tracemalloc

import polib
import pytest

from deploykit.data.reading import Reading
from deploykit.errors import DataError, UsageError
from deploykit.tasks.translation.rows import PairColumns, RawPair, clean_pairs, load_pairs, read_sources
from deploykit.tasks.translation.tmx import read_tmx

PO = r"""# Translators, whoever they are
msgid ""
msgstr ""
"Language: fr_FR\n"
"Content-Type: text/plain; charset=UTF-8\n"
"Plural-Forms: nplurals=2; plural=(n > 1);\n"

#: app.py:3
msgid "Open \"%s\""
msgstr ""
"Ouvrir "
"« %s »"

msgctxt "verb"
msgid "Close"
msgstr "Fermer"

#, fuzzy
#| msgid "Saved"
msgid "Save"
msgstr "Enregistré"

msgid "Quit"
msgstr ""

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d fichier"
msgstr[1] "%d fichiers"

#~ msgid "Old"
#~ msgstr "Vieux"
"""


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def load(path, source="en", target="fr", **options):
    return load_pairs(path, source=source, target=target, **options)


def tmx(*units, head=""):
    body = "".join(
        "<tu>" + "".join(f'<tuv xml:lang="{lang}"><seg>{text}</seg></tuv>' for lang, text in unit.items()) + "</tu>\n"
        for unit in units
    )
    return f'<?xml version="1.0"?>\n{head}<tmx version="1.4"><header/><body>\n{body}</body></tmx>'


def test_po_entries_become_pairs_and_what_is_not_translated_is_marked(tmp_path):
    rows, columns = load(write(tmp_path / "a.po", PO))
    assert columns == PairColumns("msgid", "msgstr")
    assert [(r.source, r.target, r.unusable) for r in rows] == [
        ('Open "%s"', "Ouvrir « %s »", None),
        ("Close", "Fermer", None),
        ("Save", "Enregistré", "fuzzy"),
        ("Quit", None, None),
        ("%d file", "%d fichier", None),
        ("%d files", "%d fichiers", None),
        ("Old", "Vieux", "obsolete"),
    ]
    assert rows[0].origin == "a.po:8"


def test_mo_has_the_translated_pairs_of_its_po(tmp_path):
    write(tmp_path / "a.po", PO)
    polib.pofile(str(tmp_path / "a.po")).save_as_mofile(str(tmp_path / "b.mo"))
    rows, _ = load(str(tmp_path / "b.mo"))
    assert {(r.source, r.target) for r in rows} == {
        ('Open "%s"', "Ouvrir « %s »"),
        ("Close", "Fermer"),
        ("%d file", "%d fichier"),
        ("%d files", "%d fichiers"),
    }
    assert all(r.origin.startswith("b.mo:") for r in rows)


def test_language_with_one_form_translates_the_plural(tmp_path):
    text = 'msgid "one file"\nmsgid_plural "%d files"\nmsgstr[0] "%d ファイル"\n'
    rows, _ = load(write(tmp_path / "a.po", text), target="ja")
    assert [(r.source, r.target) for r in rows] == [("%d files", "%d ファイル")]


def test_encoding_is_the_headers_unless_given(tmp_path):
    text = PO.replace("UTF-8", "ISO-8859-1").replace("« %s »", "le %s où")
    rows, _ = load(write(tmp_path / "a.po", text, "latin-1"))
    assert rows[0].target == "Ouvrir le %s où"
    with pytest.raises(DataError, match=r"a.po: line 12, byte offset [0-9]+, is not utf-8"):
        load(write(tmp_path / "a.po", PO.replace("« %s »", "où"), "latin-1"))
    assert load(str(tmp_path / "a.po"), reading=Reading("latin-1"))[0][0].target == "Ouvrir où"


@pytest.mark.parametrize(("header", "target"), [("de", "fr"), ("fr", "pt_BR"), ("en", "fra_Latn")])
def test_catalog_of_another_language_is_refused(tmp_path, header, target):
    path = write(tmp_path / "a.po", PO.replace("fr_FR", header))
    with pytest.raises(DataError, match=rf"a.po: its header says .*'{header}', the target is '{target}'\n.*--target"):
        load(path, target=target)


@pytest.mark.parametrize("target", ["fr", "fr_CA", "fra_Latn", "fr_XX", "French"])
def test_header_agrees_with_every_code_of_its_language(tmp_path, target):
    assert len(load(write(tmp_path / "a.po", PO), target=target)[0]) == 7


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('msgid "a"\nmsgstr "b\n', 2),
        ('msgid "a"\nmsgstr "b" "c"\n', 2),
        ('msgid "a"\nmsgstr "say "b" now"\n', 2),
        ('msgid "a"\nmsgid "b"\nmsgstr "c"\n', 2),
        ('msgstr "b"\n', 1),
        ('msgid "a"\n\nwords\n', 3),
        ('"alone"\n', 1),
        ('#~ msgid "a\n#~ msgstr "b"\n', 1),
        ('msgid "a\\"\nmsgstr "b"\n', 1),
    ],
)
def test_malformed_po_is_an_error_with_its_line(tmp_path, text, line):
    with pytest.raises(DataError, match=rf"a.po: line {line} is malformed.*\n.*remedy"):
        load(write(tmp_path / "a.po", text))


def test_malformed_mo_and_binary_po_are_errors(tmp_path):
    write(tmp_path / "a.po", PO)
    polib.pofile(str(tmp_path / "a.po")).save_as_mofile(str(tmp_path / "b.mo"))
    whole = (tmp_path / "b.mo").read_bytes()
    for damaged in (
        b"",
        whole[:30],
        b"\xde\x12\x04\x95" + b"\xff" * 40,
        b"text",
        whole.replace(b"Ouvrir", b"Ouv\xff\xfer"),
    ):
        (tmp_path / "c.mo").write_bytes(damaged)
        with pytest.raises(DataError, match=r"c.mo: is malformed"):
            load(str(tmp_path / "c.mo"))
    (tmp_path / "d.po").write_bytes(whole)
    with pytest.raises(DataError, match=r"d.po"):
        load(str(tmp_path / "d.po"))


def test_msgids_of_a_template_are_texts_to_translate(tmp_path):
    path = write(tmp_path / "a.pot", PO.replace("UTF-8", "CHARSET"))
    texts = [row.text for row in read_sources(path, source="en")]
    assert texts == ['Open "%s"', "Close", "Save", "Quit", "%d file", "%d files"]
    with pytest.raises(DataError, match=r"none.po: no such file"):
        list(read_sources(str(tmp_path / "none.po"), source="en"))


def test_tmx_units_become_pairs_with_their_lines(tmp_path):
    text = tmx(
        {"en": "One &amp; two", "fr": "Un &amp; deux"}, {"fr": "Trois"}, {"EN-US": "<hi>Fo</hi>ur", "fr-FR": "Quatre"}
    )
    rows, columns = load(write(tmp_path / "a.tmx", text))
    assert columns == PairColumns("en", "fr")
    assert rows == [
        RawPair("One & two", "Un & deux", "a.tmx:3"),
        RawPair(None, "Trois", "a.tmx:4"),
        RawPair("Four", "Quatre", "a.tmx:5"),
    ]
    assert [r.text for r in read_sources(str(tmp_path / "a.tmx"), source="en")] == ["One & two", None, "Four"]


def test_closest_region_of_a_language_counts(tmp_path):
    units = {"en-GB": "colour", "pt-PT": "cor (pt)", "pt": "cor", "pt-BR": "cor (br)", "zh-TW": "顏色", "zh-CN": "颜色"}
    path = write(tmp_path / "a.tmx", tmx(units))
    for target, text in (
        ("pt_BR", "cor (br)"),
        ("pt", "cor"),
        ("por_Latn", "cor"),
        ("zho_Hant", "顏色"),
        ("zh_CN", "颜色"),
    ):
        assert load(path, target=target)[0][0].target == text, target


def test_old_lang_attribute_and_other_encodings_are_read(tmp_path):
    text = tmx({"en": "summer", "fr": "été"}).replace("xml:lang", "lang")
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"):
        declared = text.replace('version="1.0"', f'version="1.0" encoding="{encoding.removesuffix("-sig")}"')
        assert load(write(tmp_path / "a.tmx", declared, encoding))[0] == [RawPair("summer", "été", "a.tmx:3")], encoding
    assert load(write(tmp_path / "a.tmx", text, "latin-1"), reading=Reading("latin-1"))[0][0].target == "été"
    with pytest.raises(UsageError, match="not a known"):
        load(str(tmp_path / "a.tmx"), reading=Reading("klingon"))


def test_inline_codes_are_left_out(tmp_path):
    seg = 'Press <bpt i="1">&lt;b&gt;</bpt>OK<ept i="1">&lt;/b&gt;</ept><ph>{0}<sub>note</sub></ph> <hi>now</hi>'
    [row, plain], _ = load(
        write(tmp_path / "a.tmx", tmx({"en": seg, "fr": "x"}, {"en": "Open <hi>it</hi>", "fr": "y"}))
    )
    assert row.source == "Press OK now"
    assert (row.inline_codes, plain.inline_codes) == (True, False)
    report = clean_pairs([row, plain], source="en", target="fr", check_languages=False)[1]
    assert "1 whose inline codes (placeholders, tags of TMX) were left out" in "\n".join(report.lines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<tmx><body><tu>\n</body></tmx>", "line 2 is not well-formed XML: mismatched tag"),
        ("<tmx><body>\n\n<tu", "line 3 is not well-formed XML: "),
        ("", "not well-formed XML: no element found"),
        ("plain text", "line 1 is not well-formed XML"),
        ("<html><body/></html>", "is not TMX: it begins with <html>"),
        ("<tmx><body>\n<tu>\x01</tu></body></tmx>", "line 2 is not well-formed XML: not well-formed"),
        ('<?xml version="1.0" encoding="klingon"?><tmx/>', "klingon|encoding"),
    ],
)
def test_malformed_tmx_is_an_error_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"a.tmx: .*{message}"):
        load(write(tmp_path / "a.tmx", text))


def test_entity_declarations_are_refused_before_anything_expands(tmp_path):
    laughs = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    secret = write(tmp_path / "secret", "s3cret")
    for declared in (
        f'<!DOCTYPE tmx [<!ENTITY a0 "ha">{laughs}]>',
        f'<!DOCTYPE tmx [<!ENTITY a11 SYSTEM "file://{secret}">]>',
        f'<!DOCTYPE tmx [<!ENTITY % a11 SYSTEM "file://{secret}"> %a11;]>',
    ):
        with pytest.raises(DataError, match=r"declares the entity 'a(0|11)', which is refused"):
            load(write(tmp_path / "a.tmx", tmx({"en": "&a11;", "fr": "x"}, head=declared)))


def test_doctype_alone_is_fine_and_its_entities_are_not_lost_silently(tmp_path):
    doctype = '<!DOCTYPE tmx SYSTEM "tmx14.dtd">'
    assert load(write(tmp_path / "a.tmx", tmx({"en": "a", "fr": "b"}, head=doctype)))[0][0].target == "b"
    with pytest.raises(DataError, match="entity &eacute; is not defined"):
        load(write(tmp_path / "a.tmx", tmx({"en": "a", "fr": "&eacute;t&eacute;"}, head=doctype)))


def test_tmx_without_the_language_names_those_it_has(tmp_path):
    path = write(tmp_path / "a.tmx", tmx({"en-US": "a", "de": "b"}, {"fr": "c"}))
    with pytest.raises(DataError, match=r"no unit has text in 'en' and 'fr'; its languages are 'en-US', 'de', 'fr'"):
        load(path)


def test_memory_of_a_tmx_does_not_grow_with_it(tmp_path):
    rng = random.Random(0)
    with (tmp_path / "a.tmx").open("w") as file:
        file.write("<tmx><body>")
        for number in range(20_000):
            text = rng.getrandbits(400)
            file.write(
                f'<tu><tuv lang="en"><seg>{text} {number}</seg></tuv><tuv lang="fr"><seg>{text}</seg></tuv></tu>\n'
            )
        file.write(f'<tu><tuv lang="en"><seg>{"x" * 5_000_000}</seg></tuv><tuv lang="fr"><seg>y</seg></tuv></tu>')
        file.write("</body></tmx>")
    tracemalloc.start()
    try:
        longest = max(len(unit.texts[0] or "") for unit in read_tmx(tmp_path / "a.tmx", ("en", "fr")))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1_000_000 < longest < 1_200_000
    assert peak < 6_000_000
