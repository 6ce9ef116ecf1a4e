"""Drop the pairs that teach a translator something wrong or nothing, and count every one of them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

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
# Short texts differ more: "OK" is "D'accord", and many single words have no equal in length.
_SLACK_CHARACTERS = 20
_SLACK_WORDS = 6
# A Chinese character stands for three letters or so, a Japanese or Korean one for two.
_EXTRA_LENGTH = {"CJK": 2, "HIRAGANA": 1, "KATAKANA": 1, "HANGUL": 1}
# Fewer rows than this, or words of a language in a text, may be a coincidence.
_ROWS_FOR_VERDICT = 3
_TEXTS_FOR_VERDICT = 10
_WORDS_FOR_VERDICT = 3

# Of the model of languages: how likely a text is in one before it counts for all texts of its side, for the direction of
# its row, and before the row is dropped.
_LIKELY = 0.7
_SURE = 0.9
_CERTAIN = 0.99

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class PairCleaningReport:
    """Pairs by what happened to them. ``rows_read`` is ``rows_kept`` and all dropped ones together.

    Each dropped row is counted once, at the first step that it fails, in the order of the fields.
    ``unicode_repaired``, ``lines_joined`` and ``inline_codes`` (rows of TMX whose inline codes were left out) are not
    dropped for it.
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
        """For people: one line a step that touched a row."""
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
        lines = [f"{self.rows_read:,} rows read"]
        lines += [f"  - {count:>8,} {what}" for count, what in dropped if count]
        lines += [f"    {count:>8,} {what}" for count, what in changed if count]
        return [*lines, f"{self.rows_kept:,} rows kept"]


def clean_pairs(
    raw: Iterable[RawPair],
    *,
    source: str,
    target: str,
    max_ratio: float = MAX_RATIO,
    max_characters: int = MAX_CHARACTERS,
    check_languages: bool = True,
) -> tuple[list[Pair], PairCleaningReport]:
    """Make each text one normalized line and keep the first of each pair that is a translation by its looks.

    Args:
        source, target: language codes. A language that is not known has no script or words to check.
        max_ratio: the longer text may have this many times the other's characters (those of Chinese,
            Japanese and Korean count as several) and, where both languages have spaces, words; 20
            characters and 6 words more are allowed, for short texts.
        check_languages: drop what is in another script or in the other side's language.

    Raises:
        DataError: most rows are in another language than said, swapped sides above all
            (``check_languages``).
    """
    languages = parse_language(source), parse_language(target)
    looks = _Looks(source, target)
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
            problem = looks.problem(pair)
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
        looks.raise_if_wrong()
    return list(kept.values()), PairCleaningReport(**counts, rows_kept=len(kept))


def _shape_problem(
    pair: Pair, languages: tuple[Language, Language], max_ratio: float, max_characters: int
) -> str | None:
    """What is wrong with a pair whatever it says."""
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
    """Characters, those that stand for more than a letter counted as the letters they stand for."""
    if text.isascii():
        return len(text)
    letters = letters_of(text)
    return len(text) + sum(letters[script] * extra for script, extra in _EXTRA_LENGTH.items())


class _Looks:
    """Which languages the texts seem to be in: row by row, and all together."""

    def __init__(self, source: str, target: str) -> None:
        self._codes = (source, target)
        self._languages = (parse_language(source), parse_language(target))
        self._tell_by_script = all(x.letters for x in self._languages) and self._languages[0].letters.isdisjoint(
            self._languages[1].letters
        )
        self._tell_by_words = has_function_words(self._languages)
        bases = [language.base for language in self._languages]
        self._tell_by_model = not self._tell_by_words and all(map(covers, bases)) and not akin(*bases)
        self._rows = self._forward = self._reversed = 0
        self._first_reversed: Pair | None = None
        self._wrong_script = [0, 0]
        self._seems: tuple[Counter[str], Counter[str]] = (Counter(), Counter())

    def problem(self, pair: Pair) -> str | None:
        """The report's field for what is wrong, None for what seems right or cannot be told."""
        if has_code(pair.source):
            return None  # into a language of its own
        self._rows += 1
        one, other = self._languages
        fits = [fits_script(text, language) for text, language in zip((pair.source, pair.target), self._languages)]
        if self._tell_by_script:
            crossed = fits_script(pair.source, other) and fits_script(pair.target, one)
            self._count_direction(pair, forward=all(fits), back=crossed and not any(fits))
        if not all(fits):
            for side, fit in enumerate(fits):
                self._wrong_script[side] += not fit
            return "wrong_script"
        words = (
            (Counter[str](), Counter[str]())
            if self._tell_by_model
            else (function_words(pair.source), function_words(pair.target))
        )
        for found, seems in zip(words, self._seems):
            ranked = found.most_common(2)
            if ranked and ranked[0][1] >= 2 and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
                seems[ranked[0][0]] += 1
        if self._tell_by_model:
            return self._problem_by_model(pair)
        if not self._tell_by_words:
            return None
        own = words[0][one.base], words[1][other.base]
        others = words[0][other.base], words[1][one.base]
        if not self._tell_by_script:
            forward = own[0] > others[0] and own[1] > others[1]
            self._count_direction(pair, forward=forward, back=own[0] < others[0] and own[1] < others[1])
        wrong = any(o >= _WORDS_FOR_VERDICT and not mine for mine, o in zip(own, others))
        return "wrong_language" if wrong else None

    def _problem_by_model(self, pair: Pair) -> str | None:
        """As ``problem``, for a pair of languages of which one has no list of small words; each side is judged alone."""
        bases = [language.base for language in self._languages]
        own = []
        wrong = False
        for text, base, other, seems in zip((pair.source, pair.target), bases, reversed(bases), self._seems):
            found = probabilities(text)
            likely = max(found, key=lambda label: found[label])
            if found[likely] >= _LIKELY:
                seems[base if akin(likely, base) else likely] += 1
            mine, theirs = found[base], found[other]
            own.append(mine / (mine + theirs) if mine + theirs else 0.5)
            wrong |= likely == other and found[likely] >= _SURE and own[-1] <= 1 - _CERTAIN
        if not self._tell_by_script:
            back = all(p <= 1 - _SURE for p in own)
            self._count_direction(pair, forward=all(p >= _SURE for p in own), back=back)
        return "wrong_language" if wrong else None

    def _count_direction(self, pair: Pair, *, forward: bool, back: bool) -> None:
        self._forward += forward
        self._reversed += back
        if back and self._first_reversed is None:
            self._first_reversed = pair

    def raise_if_wrong(self) -> None:
        """Raise DataError when most rows are the other way round, or a side is in another language."""
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
                    f"correct --{side} or --{side}-column",
                )
        for side, code, language, seems in zip(("source", "target"), self._codes, self._languages, self._seems):
            if not seems or not (self._tell_by_model or has_function_words([language])):
                continue
            likely, texts = seems.most_common(1)[0]
            if likely != language.base and texts >= _TEXTS_FOR_VERDICT and texts > 2 * seems[language.base]:
                raise DataError(
                    f"the {side} texts seem to be in {likely!r}, not in {code!r}: {texts:,} by their words, against "
                    f"{seems[language.base]:,}",
                    f"correct --{side} or --{side}-column",
                )
