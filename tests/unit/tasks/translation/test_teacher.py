"""Targets of training rows that a teacher translates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploykit.errors import DataError, UsageError
from deploykit.runtime.generation import Generation
from deploykit.tasks.translation import teacher as module
from deploykit.tasks.translation.options import TranslationOptions
from deploykit.tasks.translation.pairs import Pair
from deploykit.tasks.translation.teacher import Teacher, open_teacher
from deploykit.tasks.translation.translated import Translated


class _Translator:
    def __init__(self, source: str = "en", target: str = "fr", beams: int = 1) -> None:
        self.task: Any = SimpleNamespace(source=source, target=target, generation=Generation(beam_size=beams))
        self.asked: list[str] = []
        self.beams: set[int] = set()

    def translate(self, texts: Sequence[str], generation: Generation, *, scored: bool) -> list[Translated]:
        self.beams.add(generation.beam_size)
        if "refused" in texts:
            raise DataError("text 0: too long", "")
        self.asked += texts
        return [
            Translated("" if text == "empty" else f"{text}\nfr", 0.0, 1, 1, "length" if text == "endless" else "eos")
            for text in texts
        ]

    def close(self) -> None:
        pass


PAIRS = [Pair(text, target, f"x.tsv:{i}") for i, (text, target) in enumerate(
    [("a", "b"), ("c", "c fr"), ("refused", "d"), ("empty", "e"), ("endless", "f")]
)]  # fmt: skip


def test_targets_are_replaced_where_the_teacher_has_whole_ones(tmp_path: Path) -> None:
    translator = _Translator()
    teacher = Teacher(translator, tmp_path, print)
    pairs, counts = teacher.taught(PAIRS, join=False)
    assert pairs == [Pair("a", "a fr", "x.tsv:0 by the teacher"), *PAIRS[1:]]
    assert counts == {"taught": 1, "same": 1, "untranslated": 3}
    assert translator.beams == {5}, "a greedy teacher searches with beams"
    joined, counts = teacher.taught(PAIRS, join=True)
    assert joined == [PAIRS[0], Pair("a", "a fr", "x.tsv:0 by the teacher"), *PAIRS[1:]]
    assert sorted(translator.asked) == ["a", "c", "empty", "endless"], "the second time nothing is translated again"


def test_a_teacher_of_other_languages_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = TranslationOptions(source_lang="en", target_lang="fra_Latn", teacher="t")
    monkeypatch.setattr(module, "open_translator", lambda *_, **__: _Translator("en", "de"))
    with pytest.raises(UsageError, match="translates en to de"), open_teacher(options, tmp_path, print):
        pass
    monkeypatch.setattr(module, "open_translator", lambda *_, **__: _Translator("eng_Latn", "fr", beams=3))
    with open_teacher(options, tmp_path, print) as teacher:
        assert teacher.translations("test", PAIRS[:1]) == ["a fr"]
