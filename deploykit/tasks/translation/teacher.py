"""Replace the rows' targets by a teacher's translations (Kim and Rush, EMNLP 2016)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from deploykit.errors import UsageError
from deploykit.runtime.served import DEFAULT_URL
from deploykit.tasks.answer_each import answer_each
from deploykit.tasks.opening import open_translator
from deploykit.tasks.translation.languages import distance
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.pairs import Pair, one_line
from deploykit.tasks.translation.predictor import TextTranslator
from deploykit.tasks.translation.translated import Translated
from deploykit.training.kept_answers import kept_answers
from deploykit.training.rows import Say

_BEAMS = 5
"""Number of beams for a teacher whose own search is greedy."""


class Teacher:
    """A translator whose translations are kept in ``work``."""

    def __init__(self, translator: TextTranslator, work: Path, say: Say) -> None:
        own = translator.task.generation
        self._translator, self._work, self._say = translator, work, say
        self._search = own if own.beam_size > 1 else dataclasses.replace(own, beam_size=_BEAMS)

    def translations(self, name: str, pairs: Sequence[Pair]) -> list[str | None]:
        """Return a translation of each source of the split ``name``; None where it is refused, empty or cut off."""
        sources = [pair.source for pair in pairs]
        return kept_answers(
            self._work / f"teacher.{name}.jsonl",
            sources,
            self._translate,
            f"{name}: the teacher has translated",
            self._say,
        )

    def taught(self, pairs: Sequence[Pair], *, join: bool) -> tuple[list[Pair], dict[str, int]]:
        """Return pairs whose targets are the teacher's, or with ``join`` the pairs and those where the teacher's differ,
        and how many are the teacher's, the same anyway, and without a translation."""
        translations = self.translations("train", pairs)
        counts = {"taught": 0, "same": 0, "untranslated": 0}
        found = []
        for pair, translation in zip(pairs, translations):
            differs = translation is not None and translation != pair.target
            if join or not differs:
                found.append(pair)
            if differs:
                assert translation is not None
                found.append(Pair(pair.source, translation, f"{pair.origin} by the teacher"))
            counts["taught" if differs else "untranslated" if translation is None else "same"] += 1
        return found, counts

    def _translate(self, texts: Sequence[str]) -> list[str | None]:
        answers = answer_each(lambda some: self._translator.translate(some, self._search, scored=False), texts)
        return [
            one_line(answer.text) or None if isinstance(answer, Translated) and answer.finish == "eos" else None
            for answer in answers
        ]


@contextmanager
def open_teacher(options: TranslationOptions, work: Path, say: Say) -> Iterator[Teacher]:
    """Open the teacher that ``options`` name. Raises UsageError for one of other languages."""
    assert options.teacher is not None
    with closing(open_translator(options.teacher, url=DEFAULT_URL)) as translator:
        task = translator.task
        if distance(task.source, options.source_lang) is None or distance(task.target, options.target_lang) is None:
            raise UsageError(
                f"--teacher {options.teacher} translates {task.source} to {task.target}, and the student "
                f"{options.source_lang} to {options.target_lang}",
                "give a teacher of the same languages",
            )
        yield Teacher(translator, work, say)
