"""Split a text that is too long for the model at sentence ends and pauses.

Sentence ends are found by punctuation only, in many scripts and without knowing the language: after . ! ? … before
white space, except after abbreviations and initials and before small letters; after 。 ！ ？ । and similar marks anywhere;
at every line break. In doubt a sentence continues: a missed end costs little, because a long sentence is split at its
clauses, while a false end breaks a sentence.

Neither sentencex nor pysbd splits a sentence that is too long, which takes the same marks. sentencex ends a sentence within
「行く。」と言った。, and pysbd needs the language and knows 23.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence

_OPENERS = "\"'“‘”’„‚«‹»›([{¿¡「『（【《〈〔［｛"
_CLOSERS = "\"'”’“‘»›«‹)]}」』）】》〉〕］｝"
# Marks that end a sentence before white space (Latin, Greek, Cyrillic, Hebrew, Arabic).
_SPACED = ".!?…‼⁇⁈⁉‽؟۔"
# Marks that end a sentence anywhere (full width, Devanagari, Armenian, Ethiopic, Burmese, Khmer, Tibetan).
_UNSPACED = "。．｡！？।॥։።፧၊။។៕།"
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_CLOSED = f"[{re.escape(_CLOSERS)}]*"
# French puts a space before a closing », German before an opening »: the next character decides.
_END = re.compile(
    rf"(?P<stop>[{_SPACED}{_UNSPACED}]+)(?P<closers>{_CLOSED}(?:[ \u00a0\u202f][»›]+(?!\S))?)|[{_BREAKS}]"
)
_PAUSES = f"{_SPACED},;:—–،؛·"
# Match a run of marks from its beginning only: otherwise a long run takes quadratic time.
_CLAUSE = re.compile(rf"(?<![{_PAUSES}])[{_PAUSES}]+{_CLOSED}(?=\s)|[{_UNSPACED}、，；：､]+{_CLOSED}")
_BREAK = re.compile(f"[{_BREAKS}]")
_WHITE_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"(?<!\w)(?:[^\W\d_]\.)*\w+\Z")
_LONGEST_WORD = 24
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Abbreviations, whose full stop ends no sentence (English, French, German, Spanish, Italian, Portuguese, Dutch,
# Russian).
_ABBREVIATIONS = _words("""
    mr mrs ms dr prof st sr jr rev hon gen col maj capt cpt lt sgt cmdr adm gov pres sen rep messrs mt ft
    vs cf viz approx ca incl excl esp resp eg ie dept univ assn mme mlle mm mgr env hr fr frl bzw bspw vgl evtl ggf zzgl
    inkl exkl sog sra srta dña ud uds pág págs aprox dott avv pag exmo exma dhr mevr bijv blz
    гг ул им см рис стр тыс млн млрд
    """)
# Abbreviations before a number only: "No. 5", but "He said no."
_BEFORE_NUMBERS = _words("""
    no nos nr vol vols fig figs p pp ch sec art eq op ed cap tab abs par núm
    jan feb mar apr jun jul aug sep sept oct nov dec
    """)


def split_sentences(text: str) -> list[tuple[str, str]]:
    """Split into sentences, each with the white space after it; joined they are ``text``.

    White space before the first sentence follows an empty sentence.
    """
    start = _skip_space(text, 0)
    sentences = [("", text[:start])] if start else []
    for end in [*_sentence_ends(text), len(text.rstrip())]:
        if end > start:
            following = _skip_space(text, end)
            sentences.append((text[start:end], text[end:following]))
            start = following
    return sentences


def split_lines(text: str) -> list[tuple[str, str]]:
    """Split into lines, each with the white space after it; joined they are ``text``."""
    lines, start = [], 0
    for match in re.finditer(rf"\s*[{_BREAKS}]\s*", text):
        lines.append((text[start : match.start()], match[0]))
        start = match.end()
    return [*lines, (text[start:], "")] if start < len(text) or not lines else lines


def fit(text: str, count_tokens: Callable[[str], int], limit: int) -> list[tuple[str, str]]:
    """Split ``text`` into few pieces of at most ``limit`` tokens each, with the white space after each.

    A text that fits is one piece, unchanged. Otherwise each piece takes as many sentences as fit. A sentence that is
    too long is split after the last clause that fits, else at white space, else between grapheme clusters. Only a
    single code point may exceed the limit. ``count_tokens`` counts special tokens too. Pieces and white space joined
    are ``text``; white space before the first piece follows an empty piece.
    """
    if count_tokens(text) <= limit:
        return [(text, "")]
    ends = _sentence_ends(text)
    start = _skip_space(text, 0)
    pieces = [("", text[:start])] if start else []
    reach = 4 * max(limit, 1)
    while start < len(text):
        stop = _farthest(text, start, reach, lambda piece: count_tokens(piece) <= limit)
        cuts = _cuts(text, start, stop, ends)
        # Part of a text can have one or two tokens more than the whole: then try the next best cut.
        cut = next((cut for cut in cuts if count_tokens(text[start:cut]) <= limit), stop)
        following = _skip_space(text, cut)
        pieces.append((text[start:cut], text[cut:following]))
        start, reach = following, stop - start
    return pieces


def _sentence_ends(text: str) -> list[int]:
    """Return the positions of sentence ends, before the white space, ascending."""
    ends: list[int] = []
    start = _skip_space(text, 0)
    for match in _END.finditer(text):
        if match.start() < start:
            continue  # a line break in the white space after the last sentence
        end = match.end()
        if match["stop"] is None:
            end = match.start()
            while text[end - 1].isspace():
                end -= 1
        elif not _ends_sentence(text, start, match):
            continue
        ends.append(end)
        start = _skip_space(text, end)
    return ends


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    stop, end = match["stop"], match.end()
    following = text[end : end + 1]
    if stop[-1] in _UNSPACED:
        # 「行く。」と言った。 continues after the quotation, and ３．１４ is a number.
        goes_on = "とっ、，," if match["closers"] else "０１２３４５６７８９" if stop == "．" else ""
        return not following or following not in goes_on
    if not following:
        return True
    if not following.isspace():
        return stop[-1] in "!?‼⁇⁈⁉‽" and _CJK.match(following) is not None
    first = _first_letter_after(text, end)
    return not first.islower() and not (stop == "." and _is_abbreviation(text, start, match.start(), first))


def _first_letter_after(text: str, end: int) -> str:
    """Return the first character after white space, quotes and brackets; empty at the end of a line."""
    at = _skip_space(text, end)
    if _BREAK.search(text, end, at):
        return ""
    while at < len(text) and text[at] in _OPENERS:
        at += 1
    return text[at : at + 1]


def _is_abbreviation(text: str, start: int, stop: int, first: str) -> bool:
    """Return whether the full stop at ``stop`` belongs to an abbreviation; ``first`` is the first letter after it."""
    match = _WORD.search(text[max(start, stop - _LONGEST_WORD) : stop])
    if match is None or not first:
        return False
    word = match[0].lower()
    if "." in word or word in _ABBREVIATIONS or (word in _BEFORE_NUMBERS and first.isdigit()):
        return True
    if len(word) == 1 and word.isalpha() and text[max(start, stop - 2)] not in "'’":
        return True  # an initial, or part of an abbreviation (z. B.), but not the end of "St. Mary's."
    # "1. First point": the number begins the sentence.
    return word.isdigit() and not text[start : stop - len(word)].strip(_OPENERS)


def _farthest(text: str, start: int, reach: int, fits: Callable[[str], bool]) -> int:
    """Return the farthest position, at least one character on, up to which ``text`` fits from ``start``.

    ``reach`` is a guess of that number of characters. Only about as many are examined, so that splitting a whole text
    takes linear time.
    """
    step = max(reach // 32, 1)
    good, bad = start, min(start + reach, len(text))
    if fits(text[start:bad]):
        good = bad
        while good < len(text) and fits(text[start : (bad := min(good + step, len(text)))]):
            good, step = bad, 2 * step
    else:
        while bad - step > start and not fits(text[start : bad - step]):
            bad, step = bad - step, 2 * step
        good = max(bad - step, start)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(text[start:middle]):
            good = middle
        else:
            bad = middle
    return max(good, start + 1)


def _cuts(text: str, start: int, stop: int, ends: Sequence[int]) -> Iterator[int]:
    """Yield positions to cut ``text`` after ``start`` and no later than ``stop``, best first."""
    if stop == len(text):
        yield start + len(text[start:].rstrip())
    yield from reversed(ends[bisect.bisect_right(ends, start) : bisect.bisect_right(ends, stop)])
    # Include the next character, which decides whether ``stop`` itself ends a clause.
    clauses = [match.end() for match in _CLAUSE.finditer(text, start, stop + 1)]
    yield from (cut for cut in reversed(clauses) if cut <= stop)
    spaces = [match.start() for match in _WHITE_SPACE.finditer(text, start, stop + 1)]
    yield from (cut for cut in reversed(spaces) if start < cut)
    yield from (cut for cut in range(stop, start, -1) if _between_characters(text, start, cut))


def _between_characters(text: str, start: int, at: int) -> bool:
    """Return whether a grapheme cluster ends at ``at`` (main rules of Unicode Standard Annex 29), if one starts at
    ``start``."""
    before, after = text[at - 1], text[at : at + 1]
    if not after:
        return True
    if unicodedata.category(after).startswith("M") or _continues(after) or before == "\u200d":
        return False
    if unicodedata.combining(before) == 9 and after.isalpha():  # a conjunct: the virama joins two consonants
        return False
    if _is_flag_half(after):
        first = at
        while first > start and _is_flag_half(text[first - 1]):
            first -= 1
        return (at - first) % 2 == 0
    return True


def _continues(character: str) -> bool:
    """Return whether a character is a joiner, skin tone, tag, or vowel or final of a decomposed Hangul syllable."""
    return (
        character in "\u200c\u200d"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
        or "\U000e0020" <= character <= "\U000e007f"
        or "\u1160" <= character <= "\u11ff"
        or "\ud7b0" <= character <= "\ud7fb"
    )


def _is_flag_half(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _skip_space(text: str, at: int) -> int:
    match = _WHITE_SPACE.match(text, at)
    return match.end() if match else at
