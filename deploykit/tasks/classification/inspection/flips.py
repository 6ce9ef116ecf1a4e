"""Measure counterfactual fairness: whether an answer changes when the people in a text are replaced."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError
from deploykit.tasks.classification.facts import as_text
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.classification.rows import Example

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Swaps = Mapping[str, Mapping[str, Sequence[str]]]
"""Group -> its members -> the words of each; words at the same position are counterparts."""

ENGLISH: Swaps = {
    "gender": {
        "female": ("she", "hers", "herself", "woman", "women", "girl", "girls", "mother", "daughter", "sister", "wife",
                   "aunt", "lady", "mrs", "queen", "actress", "girlfriend", "grandmother"),
        "male": ("he", "his", "himself", "man", "men", "boy", "boys", "father", "son", "brother", "husband", "uncle",
                 "gentleman", "mr", "king", "actor", "boyfriend", "grandfather"),
    },
    "first name": {
        "English, female": ("emily", "anne", "sarah", "laura", "mary"),
        "English, male": ("greg", "brad", "matthew", "john", "james"),
        "African American": ("lakisha", "latoya", "jamal", "darnell", "ebony"),
        "Arabic": ("fatima", "aisha", "mohammed", "ahmed", "omar"),
        "Chinese": ("mei", "ling", "wei", "jun", "chen"),
    },
    "origin": {
        "American": ("american", "americans", "america"),
        "African": ("african", "africans", "africa"),
        "Chinese": ("chinese", "chinese", "china"),
        "German": ("german", "germans", "germany"),
        "Indian": ("indian", "indians", "india"),
        "Mexican": ("mexican", "mexicans", "mexico"),
    },
    "religion": {
        "Christian": ("christian", "christians", "church", "bible"),
        "Jewish": ("jewish", "jews", "synagogue", "torah"),
        "Muslim": ("muslim", "muslims", "mosque", "quran"),
    },
}  # fmt: skip
"""English words; the first names are some of Bertrand and Mullainathan's (2004) and common ones."""


def read_swaps(path: Path) -> Swaps:
    """Read a TOML file with a table for each group, which has a list of words for each member.

    Raises UsageError naming the file and the group.
    """
    try:
        groups = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML: {error}", "correct the file") from error
    for name, members in groups.items():
        lists = list(members.values()) if isinstance(members, dict) else []
        words = [word for one in lists if isinstance(one, list) for word in one]
        if (
            len(lists) < 2
            or not all(isinstance(one, list) and one for one in lists)
            or not all(isinstance(w, str) and w.strip() for w in words)
        ):
            raise UsageError(
                f"{path}: the group {name!r} does not have two members or more with a list of words each",
                f'write [{name}] and below it a = ["she", "her"] and b = ["he", "his"]',
            )
        if len({len(one) for one in lists}) > 1:
            raise UsageError(
                f"{path}: the lists of the group {name!r} have {', '.join(str(len(one)) for one in lists)} words",
                "give each member as many words: words at the same position are swapped",
            )
    return {group: {member: tuple(word.lower() for word in words) for member, words in members.items()}
            for group, members in groups.items()}  # fmt: skip


def count_flips(
    predictor: TextClassifier, examples: Sequence[Example], answers: Sequence[str], swaps: Swaps
) -> list[dict[str, Any]]:
    """Swap the words in every text that has some, classify it again, and count the answers that change, most flips first.

    Each line is for the texts with words of the member ``from``, rewritten with those of ``to``; ``changes`` counts the
    pairs of answers before and after.
    """
    found = []
    for group, members in swaps.items():
        for source, words in members.items():
            for target in (other for other in members if other != source):
                counterparts = dict(reversed([*zip(words, members[target])]))  # of equal words the first one is used
                swapped = {i: text for i, e in enumerate(examples) if (text := _swapped(e, counterparts)) is not None}
                if not swapped:
                    continue
                after = predictor.task.decide(predictor.scores(list(swapped.values())))
                flips = [(answers[i], new) for i, new in zip(swapped, after) if answers[i] != new]
                changes = Counter(f"{old} → {new}" for old, new in flips)
                examples_of = [text for (i, text), new in zip(swapped.items(), after) if answers[i] != new][:3]
                found.append({"group": group, "from": source, "to": target, "texts": len(swapped), "flips": len(flips),
                              "share": len(flips) / len(swapped), "changes": dict(changes.most_common(5)),
                              "examples": examples_of})  # fmt: skip
    return sorted(found, key=lambda one: (-one["share"], -one["texts"]))


def _swapped(example: Example, counterparts: Mapping[str, str]) -> str | None:
    """Return the text with each word replaced by its counterpart, in the same case; None if it has no such word."""
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, counterparts))})(?!\w)", re.IGNORECASE)

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        other = counterparts.get(word.lower(), word)  # IGNORECASE treats more letters as equal than lower() does
        return other.upper() if len(word) > 1 and word.isupper() else other.capitalize() if word[0].isupper() else other

    parts = [example.text, *([] if example.text_pair is None else [example.text_pair])]
    changed = [pattern.sub(replace, part) for part in parts]
    if changed == parts:
        return None
    return as_text(*changed) if len(changed) > 1 else changed[0]
