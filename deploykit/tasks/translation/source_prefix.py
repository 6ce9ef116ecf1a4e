"""How a checkpoint is told which languages it translates between, as far as text goes.

M2M100 and NLLB take the source language as a token that their tokenizer adds and the target as a
forced first token; they need nothing in the text.
"""

from __future__ import annotations

from collections.abc import Mapping

from deploykit.tasks.translation.facts import Translation

T5_LANGUAGES: Mapping[str, str] = {"en": "English", "fr": "French", "de": "German", "ro": "Romanian"}
"""The names that T5 was pretrained with (Raffel et al., JMLR 2020, appendix D); others are used as given."""


def source_prefix(task: Translation) -> str:
    """What stands before every source text: a target code (many-language Marian), an instruction (T5), or nothing."""
    if task.family == "marian" and task.languages:
        return f">>{task.target}<< "
    if task.family == "t5":
        source, target = (T5_LANGUAGES.get(code, code) for code in (task.source, task.target))
        return f"translate {source} to {target}: "
    return ""
