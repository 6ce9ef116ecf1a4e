from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.tasks.translation.sentences import fit, split_sentences

ANY_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=200),
    st.lists(
        st.sampled_from(
            [*"aBé我の.!?…。！？؟।,;、:\"'»«”)]「」 \n\t\u3000\u2028\u0301\u200d\ufe0f1３．", "Mr.", "e.g. ", "word ", ". ", "👩‍👩‍👧", "🇫🇷", "👍🏽", "\u1100\u1161\u11a8", "क्षि"]
        ),
        max_size=60,
    ).map("".join),
)  # fmt: skip


def words(text: str) -> int:
    """Count tokens: one for each three characters of a word (rounded up), and one for </s>."""
    return 1 + sum(-(-len(word) // 3) for word in text.split())


@given(ANY_TEXT)
def test_sentences_and_their_white_space_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentence + space for sentence, space in sentences) == text
    for i, (sentence, space) in enumerate(sentences):
        assert sentence == sentence.strip()
        assert not space.strip()
        assert sentence or i == 0
    assert not any("\n" in sentence for sentence, _ in sentences)


@settings(deadline=None)
@given(ANY_TEXT, st.integers(2, 40), st.sampled_from([len, words]))
def test_every_piece_fits_and_all_are_the_text(text: str, limit: int, count: Callable[[str], int]) -> None:
    pieces = fit(text, count, limit)
    assert "".join(piece + space for piece, space in pieces) == text
    for i, (piece, space) in enumerate(pieces):
        assert count(piece) <= limit
        assert piece or i == 0
        assert not space.strip()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(9, 30))
def test_pieces_of_whole_sentences_are_as_few_as_possible(lengths: list[int], limit: int) -> None:
    sentences = ["X" * (length - 1) + "!" for length in lengths]
    pieces = fit(" ".join(sentences), len, limit)
    assert [s for piece, _ in pieces for s in piece.split(" ")] == sentences
    fewest = [0]  # least number of pieces for the first n sentences, by trying every last piece
    for n in range(1, len(sentences) + 1):
        fewest.append(min(1 + fewest[k] for k in range(n) if len(" ".join(sentences[k:n])) <= limit))
    assert len(pieces) == fewest[-1]


def test_a_text_that_fits_is_unchanged() -> None:
    text = "  One. Two.\n\nThree.  "
    assert fit(text, len, len(text)) == [(text, "")]
    assert fit("", len, 5) == [("", "")]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Hello there.", "How are you?", "Fine!", "Well…", "Yes?!", "No..."],
        ["Mr. Smith met Dr. Jones vs. Prof. Li, e.g. at St. Mary's.", "They left."],
        ["J. R. R. Tolkien wrote it.", "See Fig. 3 and No. 5 on p. 12.", "He said no.", "Three more came."],
        ["Pi is 3.14159.", "Version 1.2.3 costs $4.50.", "Visit example.com.", "Then a.b.c."],
        ["Wait... what?", "Well… maybe not.", "Really?", "“Really?” she asked.", "She left."],
        ["“Go!”", "(He went.)", "[He came.]", "'Why?'", "«Да.»", "„Nein.“", "Done."],
        ["Il dit : « Bonjour ! »", "Puis il part.", "»Hallo«, sagte er.", "»Nein.«", "M. Dupont rit."],
        ["Das ist z.B. gut, d.h. ca. 5 km.", "Nr. 7 lebt.", "¿Qué?", "¡Sí!", "El Sr. Gil no."],
        ["Das gilt z. B. Montags, d. h. Oft.", "So u. a. Berlin.", "Ja."],
        ["1. First point.", "2. Second point.", "(3. Third.)"],
        ["Он ушёл.", "Это т.е. так.", "Γεια σου.", "Τέλος!", "שלום.", "מה?"],
        ["كيف حالك؟", "أنا بخير.", "یہ اچھا ہے۔", "ہاں۔"],
        ["मैं घर गया।", "वह आया॥", "ሰላም ነው።", "Բարեւ։", "မင်္ဂလာပါ။", "សួស្តី។"],
    ],
)
def test_sentence_ends_are_found(sentences: list[str]) -> None:
    assert [sentence for sentence, _ in split_sentences(" ".join(sentences))] == sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["今日は晴れ。", "明日は雨！", "そう？", "はい｡"],
        ["「行く。」と言った。", "「はい。」", "（彼は来た。）", "終わり"],
        ["他说……我不知道。", "好!", "真的?", "圆周率是３．１４。", "完"],
    ],
)
def test_scripts_without_spaces(sentences: list[str]) -> None:
    assert split_sentences("".join(sentences)) == [(sentence, "") for sentence in sentences]


def test_a_line_break_ends_a_sentence_and_goes_with_the_white_space() -> None:
    assert split_sentences(" a b \r\n\n c\u2028d. \n") == [
        ("", " "),
        ("a b", " \r\n\n "),
        ("c", "\u2028"),
        ("d.", " \n"),
    ]


def test_a_sentence_too_long_is_cut_at_a_clause_then_at_white_space_then_between_characters() -> None:
    assert fit("One two, three four; five six", len, 24) == [("One two, three four;", " "), ("five six", "")]
    assert fit("今日は、明日は晴れ", len, 6) == [("今日は、", ""), ("明日は晴れ", "")]
    assert fit("one two three four", len, 9) == [("one two", " "), ("three", " "), ("four", "")]
    assert fit("abcdefgh", len, 3) == [("abc", ""), ("def", ""), ("gh", "")]
    assert fit("Short. A long sentence, of parts. End.", len, 20) == [
        ("Short.", " "),
        ("A long sentence,", " "),
        ("of parts. End.", ""),
    ]


def test_numbers_are_not_clauses() -> None:
    assert fit("costs 1,234,567 euros", len, 12) == [("costs", " "), ("1,234,567", " "), ("euros", "")]


@pytest.mark.parametrize("whole", ["e\u0301", "👩‍👩‍👧", "👍🏽", "🇫🇷", "❤️", "\u1100\u1161\u11a8", "क्षि", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"])
def test_grapheme_clusters_stay_whole(whole: str) -> None:
    size = len(whole)
    for limit in range(size, 3 * size):
        for piece, _ in fit("x" + whole * 20, len, limit):
            assert re.fullmatch(f"x?(?:{re.escape(whole)})*", piece)


def test_an_uncuttable_piece_is_returned_alone() -> None:
    assert fit("ab", lambda text: 9 * len(text), 5) == [("a", ""), ("b", "")]
    marks = "a" + "\u0301" * 50
    assert [piece for piece, _ in fit(marks, len, 20)] == [marks[:20], marks[20:40], marks[40:]]


UNITS = ["a", "我", "ab ", "A. ", "a, ", "1. ", "...", "!", "。", "\n", " \n", " ", "(", "\"'", ". (", "e.g. ", "x.\n", "🇫🇷", "a\u0301", "👩‍👩‍👧", "\x00","\u0301", "?", ", "]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("limit", [16, 512])
def test_fifty_thousand_characters_take_under_a_second(unit: str, limit: int) -> None:
    text = (unit * 50_000)[:50_000]
    start = time.process_time()
    pieces = fit(text, len, limit)
    split_sentences(text)
    assert time.process_time() - start < 1
    assert "".join(piece + space for piece, space in pieces) == text
    assert all(len(piece) <= limit for piece, _ in pieces)


def test_the_limit_holds_if_a_part_has_more_tokens_than_the_whole() -> None:
    """SentencePiece may split "ab" into two tokens although "abc" is one."""

    def count(text: str) -> int:
        return 4 * text.count("abc") + 5 * len(text.replace("abc", "").replace(" ", "")) + 1

    text = "abc abc abcabc abc abc" * 5
    pieces = fit(text, count, 13)
    assert all(count(piece) <= 13 for piece, _ in pieces)
    assert "".join(piece + space for piece, space in pieces) == text
