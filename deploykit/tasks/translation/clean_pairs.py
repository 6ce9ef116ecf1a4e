"""Drop pairs that would teach a translator nothing or something wrong, and count them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from deploykit.data.cleaning import cleaning_lines
from deploykit.errors import DataError
from deploykit.tasks.translation.identify import akin, covers, probabilities
from deploykit.tasks.translation.languages import (
    Language,
    fits_script,
    function_words,
    has_function_words,
    letters_of,
    parse_language,
)
from deploykit.tasks.translation.pairs import Pair, RawPair, one_line
from deploykit.tasks.translation.source_prefix import has_code
from deploykit.text import is_blank, normalize

MAX_RATIO = 3.0
MAX_CHARACTERS = 5000
# Short texts differ more in length: "OK" is "D'accord".
_SLACK_CHARACTERS = 20
_SLACK_WORDS = 6
# A Chinese character counts as about three letters, a Japanese or Korean one as two.
_EXTRA_LENGTH = {"CJK": 2, "HIRAGANA": 1, "KATAKANA": 1, "HANGUL": 1}
# Fewer rows, or fewer words of a language in a text, may be a coincidence.
_ROWS_FOR_VERDICT = 3
_TEXTS_FOR_VERDICT = 10
_WORDS_FOR_VERDICT = 3

# Least probability of a language by the identification model before a text counts towards its side's language, towards
# its row's direction, and before the row is dropped.
_LIKELY = 0.7
_SURE = 0.9
_CERTAIN = 0.99

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class PairCleaningReport:
    """Counts of pairs by the result of cleaning. ``rows_read`` is ``rows_kept`` plus all dropped rows.

    Each dropped row is counted once, at the first check that it fails, in the order of the fields. Rows counted in
    ``unicode_repaired``, ``lines_joined`` and ``inline_codes`` (TMX rows whose inline codes were removed) are kept.
    """

    rows_read: int = 0
    obsolete: int = 0
    fuzzy: int = 0
    missing_source: int = 0
    missing_target: int = 0
    empty_source: int = 0
    empty_target: int = 0
    too_long: int = 0
    punctuation_only: int = 0
    identical: int = 0
    length_ratio: int = 0
    wrong_script: int = 0
    wrong_language: int = 0
    exact_duplicates: int = 0
    rows_kept: int = 0
    unicode_repaired: int = 0
    lines_joined: int = 0
    inline_codes: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Return the report as text: one line for each step that affected a row."""
        dropped = (
            (self.obsolete, "obsolete in their catalog dropped"),
            (self.fuzzy, "fuzzy in their catalog dropped"),
            (self.missing_source, "without a source dropped"),
            (self.missing_target, "without a target dropped"),
            (self.empty_source, "with an empty source dropped"),
            (self.empty_target, "with an empty target dropped"),
            (self.too_long, "with a text that is too long dropped"),
            (self.punctuation_only, "with a text without letters and digits dropped"),
            (self.identical, "with a target that is the source dropped"),
            (self.length_ratio, "whose lengths do not match dropped"),
            (self.wrong_script, "in a script that is not the language's dropped"),
            (self.wrong_language, "with a text in the other side's language dropped"),
            (self.exact_duplicates, "exact duplicates dropped (first kept)"),
        )
        changed = (
            (self.unicode_repaired, "with repaired Unicode"),
            (self.lines_joined, "of several lines joined"),
            (self.inline_codes, "whose inline codes (placeholders, tags of TMX) were left out"),
        )
        return cleaning_lines(self.rows_read, dropped, changed, self.rows_kept)


def clean_pairs(
    raw: Iterable[RawPair],
    *,
    source: str,
    target: str,
    max_ratio: float = MAX_RATIO,
    max_characters: int = MAX_CHARACTERS,
    check_languages: bool = True,
) -> tuple[list[Pair], PairCleaningReport]:
    """Normalize each text to one line, drop duplicates, and drop pairs that do not look like translations.

    Args:
        source, target: language codes. The script and words of an unknown language are not checked.
        max_ratio: largest ratio of the two texts' characters (Chinese, Japanese and Korean ones count as several) and,
            if both languages have spaces, of their words. Short texts may differ by 20 characters and 6 words more.
        check_languages: drop texts in another script or in the other side's language.

    Raises:
        DataError: most rows are in other languages, for example because the sides are swapped (``check_languages``).
    """
    languages = parse_language(source), parse_language(target)
    checks = _LanguageChecks(source, target)
    counts: Counter[str] = Counter()
    kept: dict[tuple[str, str], Pair] = {}
    for row in raw:
        counts["rows_read"] += 1
        if row.unusable or row.source is None or row.target is None:
            counts[row.unusable or ("missing_source" if row.source is None else "missing_target")] += 1
            continue
        pair = Pair(one_line(row.source), one_line(row.target), row.origin)
        problem = _shape_problem(pair, languages, max_ratio, max_characters)
        if check_languages and problem is None:
            problem = checks.problem(pair)
        key = (pair.source, pair.target)
        if problem is None and key in kept:
            problem = "exact_duplicates"
        if problem is not None:
            counts[problem] += 1
            continue
        kept[key] = pair
        counts["inline_codes"] += row.inline_codes
        repaired = [normalize(text) for text in (row.source, row.target)]
        counts["unicode_repaired"] += repaired != [row.source.strip(), row.target.strip()]
        counts["lines_joined"] += repaired != [*key]
    if check_languages:
        checks.raise_if_wrong()
    return list(kept.values()), PairCleaningReport(**counts, rows_kept=len(kept))


def _shape_problem(
    pair: Pair, languages: tuple[Language, Language], max_ratio: float, max_characters: int
) -> str | None:
    """Return the report's field for what is wrong with a pair's shape, or None."""
    if is_blank(pair.source):
        return "empty_source"
    if is_blank(pair.target):
        return "empty_target"
    if max(len(pair.source), len(pair.target)) > max_characters:
        return "too_long"
    if not (_LETTER_OR_DIGIT.search(pair.source) and _LETTER_OR_DIGIT.search(pair.target)):
        return "punctuation_only"
    if pair.source.casefold() == pair.target.casefold():
        return "identical"
    characters = sorted((_length(pair.source), _length(pair.target)))
    if characters[1] > max_ratio * characters[0] + _SLACK_CHARACTERS:
        return "length_ratio"
    if all(language.has_spaces for language in languages):
        words = sorted((len(pair.source.split()), len(pair.target.split())))
        if words[1] > max_ratio * words[0] + _SLACK_WORDS:
            return "length_ratio"
    return None


def _length(text: str) -> int:
    """Return the number of characters; one that stands for several letters counts as that many."""
    if text.isascii():
        return len(text)
    letters = letters_of(text)
    return len(text) + sum(letters[script] * extra for script, extra in _EXTRA_LENGTH.items())


class _LanguageChecks:
    """Language checks of the texts: row by row, and of all rows together."""

    def __init__(self, source: str, target: str) -> None:
        self._codes = (source, target)
        self._languages = (parse_language(source), parse_language(target))
        self._by_script = all(x.letters for x in self._languages) and self._languages[0].letters.isdisjoint(
            self._languages[1].letters
        )
        self._by_words = has_function_words(self._languages)
        bases = [language.base for language in self._languages]
        self._by_model = not self._by_words and all(map(covers, bases)) and not akin(*bases)
        self._rows = self._forward = self._reversed = 0
        self._first_reversed: Pair | None = None
        self._wrong_script = [0, 0]
        self._language_counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def problem(self, pair: Pair) -> str | None:
        """Return the report's field for what is wrong, or None if the pair seems right or nothing can be said."""
        if has_code(pair.source):
            return None  # the row names its own target language
        self._rows += 1
        one, other = self._languages
        fits = [fits_script(text, language) for text, language in zip((pair.source, pair.target), self._languages)]
        if self._by_script:
            crossed = fits_script(pair.source, other) and fits_script(pair.target, one)
            self._count_direction(pair, forward=all(fits), back=crossed and not any(fits))
        if not all(fits):
            for side, fit in enumerate(fits):
                self._wrong_script[side] += not fit
            return "wrong_script"
        words = (
            (Counter[str](), Counter[str]())
            if self._by_model
            else (function_words(pair.source), function_words(pair.target))
        )
        for found, seems in zip(words, self._language_counts):
            ranked = found.most_common(2)
            if ranked and ranked[0][1] >= 2 and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
                seems[ranked[0][0]] += 1
        if self._by_model:
            return self._problem_by_model(pair)
        if not self._by_words:
            return None
        own = words[0][one.base], words[1][other.base]
        others = words[0][other.base], words[1][one.base]
        if not self._by_script:
            forward = own[0] > others[0] and own[1] > others[1]
            self._count_direction(pair, forward=forward, back=own[0] < others[0] and own[1] < others[1])
        wrong = any(o >= _WORDS_FOR_VERDICT and not mine for mine, o in zip(own, others))
        return "wrong_language" if wrong else None

    def _problem_by_model(self, pair: Pair) -> str | None:
        """Judge each side by the identification model, for languages of which one has no list of function words."""
        bases = [language.base for language in self._languages]
        own = []
        wrong = False
        for text, base, other, seems in zip((pair.source, pair.target), bases, reversed(bases), self._language_counts):
            found = probabilities(text)
            likely = max(found, key=lambda label: found[label])
            if found[likely] >= _LIKELY:
                seems[base if akin(likely, base) else likely] += 1
            mine, theirs = found[base], found[other]
            own.append(mine / (mine + theirs) if mine + theirs else 0.5)
            wrong |= likely == other and found[likely] >= _SURE and own[-1] <= 1 - _CERTAIN
        if not self._by_script:
            back = all(p <= 1 - _SURE for p in own)
            self._count_direction(pair, forward=all(p >= _SURE for p in own), back=back)
        return "wrong_language" if wrong else None

    def _count_direction(self, pair: Pair, *, forward: bool, back: bool) -> None:
        self._forward += forward
        self._reversed += back
        if back and self._first_reversed is None:
            self._first_reversed = pair

    def raise_if_wrong(self) -> None:
        """Raise DataError if most rows are reversed, or a side is in another language."""
        source, target = self._codes
        if self._first_reversed and self._reversed >= _ROWS_FOR_VERDICT and self._reversed > 2 * self._forward:
            raise DataError(
                f"source and target seem swapped in {self._reversed:,} rows of {self._rows:,} "
                f"({source!r} to {target!r}); the first is at {self._first_reversed.origin}",
                "swap --source-lang and --target-lang, or --source-column and --target-column",
            )
        for side, code, wrong in zip(("source", "target"), self._codes, self._wrong_script):
            if wrong >= _ROWS_FOR_VERDICT and 2 * wrong > self._rows:
                raise DataError(
                    f"{wrong:,} {side} texts of {self._rows:,} are not in the script of {code!r}",
                    f"correct --{side}-lang or --{side}-column",
                )
        for side, code, language, seems in zip(
            ("source", "target"), self._codes, self._languages, self._language_counts
        ):
            if not seems or not (self._by_model or has_function_words([language])):
                continue
            likely, texts = seems.most_common(1)[0]
            if likely != language.base and texts >= _TEXTS_FOR_VERDICT and texts > 2 * seems[language.base]:
                raise DataError(
                    f"the {side} texts seem to be in {likely!r}, not in {code!r}: {texts:,} by their words, against "
                    f"{seems[language.base]:,}",
                    f"correct --{side}-lang or --{side}-column",
                )
