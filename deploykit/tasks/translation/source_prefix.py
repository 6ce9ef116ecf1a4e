"""Put the prefix before a source text that tells a checkpoint its languages.

M2M100 and NLLB need none: their tokenizer adds the source language's token, and the target's is the forced first token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from deploykit.errors import DataError
from deploykit.tasks.translation.facts import Translation

T5_LANGUAGES: Mapping[str, str] = {"en": "English", "fr": "French", "de": "German", "ro": "Romanian"}
"""Language names in T5's pretraining (Raffel et al., JMLR 2020, appendix D); others are used as given."""

NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
"""A language as NLLB names it, such as eng_Latn."""

_CODE = re.compile(r"\s*>>([^<>\s]{1,40})<<\s*")
_TASK = re.compile(r"translation_(\w+)_to_(\w+)")
_SHOWN_LANGUAGES = 12


def source_prefix(task: Translation, config: Any) -> str:
    """Return the prefix of every source text: a target code (multilingual Marian), the one that the checkpoint's
    ``config`` names for the pair, an instruction (T5), or nothing."""
    if _has_codes(task):
        return f">>{task.target}<< "
    own = task_prefixes(getattr(config, "task_specific_params", None)).get(task.source, {})
    if task.target in own:
        return own[task.target]
    if task.family == "t5":
        source, target = (T5_LANGUAGES.get(code, code) for code in (task.source, task.target))
        return f"translate {source} to {target}: "
    return ""


def task_prefixes(parameters: Any) -> dict[str, dict[str, str]]:
    """Return the prefixes in a config's ``task_specific_params``, by source and target language."""
    prefixes: dict[str, dict[str, str]] = {}
    for name, fields in (parameters or {}).items():
        if (match := _TASK.fullmatch(name)) and isinstance(fields.get("prefix"), str):
            prefixes.setdefault(match[1], {})[match[2]] = fields["prefix"]
    return prefixes


def cut_code(text: str, task: Translation) -> tuple[str, str]:
    """Split a target code off the beginning of a text: ">>deu<< Hello" gives ``(">>deu<< ", "Hello")``.

    Only for a multilingual Marian: elsewhere it is plain text. Raises DataError for a code that the checkpoint does not
    know.
    """
    match = _CODE.match(text) if _has_codes(task) else None
    if match is None:
        return "", text
    if match[1] not in task.languages:
        raise DataError(
            f"begins with >>{match[1]}<<, a target that the model does not know", f"it knows {shown(task.languages)}"
        )
    return f">>{match[1]}<< ", text[match.end() :]


def has_code(text: str) -> bool:
    """Return whether a text begins with any ``>>code<<``."""
    return _CODE.match(text) is not None


def prefixed(text: str, prefix: str, codes: Collection[str]) -> str:
    """Put ``prefix`` before a text, unless the text begins with one of the ``codes`` itself."""
    match = _CODE.match(text) if codes else None
    return text if match is not None and match[1] in codes else prefix + text


def shown(languages: Collection[str]) -> str:
    """Return language codes as one line, at most twelve of them."""
    some = sorted(languages)[:_SHOWN_LANGUAGES]
    more = f" and {len(languages) - len(some)} more" if len(languages) > len(some) else ""
    return ", ".join(some) + more


def _has_codes(task: Translation) -> bool:
    return task.family == "marian" and bool(task.languages)
