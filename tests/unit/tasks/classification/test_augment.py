"""Copies of rows by a masked language model, and by translators there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deploykit.errors import DataError, UsageError
from deploykit.tasks.classification import augment
from deploykit.tasks.classification.masking import MaskedWords
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training.kept_answers import kept_answers


@pytest.fixture(scope="module")
def masked_model(make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random masked language model that almost always says w7."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    path = make_tiny_checkpoint(tmp_path_factory.mktemp("mlm") / "m")
    tokenizer = AutoTokenizer.from_pretrained(path, mask_token="[UNK]")
    tokenizer.save_pretrained(path)
    model = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(path))
    with torch.no_grad():
        model.cls.predictions.bias[tokenizer.convert_tokens_to_ids("w7")] = 12
    model.save_pretrained(path)
    return path


def test_a_share_of_the_words_is_what_the_model_reads(masked_model: Path) -> None:
    texts = ["w1, w2 -- w3! " * 5, "w7 w7", "[UNK] w1", " ".join(["w1"] * 100)] * 20
    found = MaskedWords(str(masked_model)).rewrite(texts, 0.3, Random(0))
    assert found[1] != "w7 w7", "the likeliest word is the text's own: another is drawn"
    assert found[2] == "[UNK] w1", "the mask's own token is in the text"
    changed = [word == "w7" for text in found[::4] for word in text.replace(",", "").replace("!", "").split()]
    assert 0.15 < np.mean(changed) < 0.3  # of four words, one is two marks
    assert found[3].split()[40:] == ["w1"] * 60, "what the model does not read stays"
    assert "w7" in found[3]


def test_a_classifier_is_no_masked_language_model(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a masked language model"):
        MaskedWords(str(make_tiny_checkpoint(tmp_path / "m")))


class _Translator:
    def __init__(self, source: str, target: str) -> None:
        self.task = SimpleNamespace(source=source, target=target)
        self.asked: list[str] = []
        self.closed = False

    def translate(self, texts: Sequence[str], *, scored: bool) -> list[Any]:
        if "refused" in texts:
            raise DataError("text 0: begins with an unknown code", "")
        self.asked += texts
        return [SimpleNamespace(text="" if text in ("gone", "") else f"{text} in {self.task.target}") for text in texts]

    def close(self) -> None:
        self.closed = True


def test_rows_are_translated_there_and_back_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {"forth": _Translator("en", "fr"), "back": _Translator("fr", "en"), "other": _Translator("de", "en")}
    monkeypatch.setattr(augment, "open_translator", lambda target, **_: known[target])
    options = ClassificationOptions(augment=("back-translation=0.5",), back_translate=("forth", "back"))
    without = ["gone", "refused"] * 5
    texts = [*(f"text {i}" for i in range(500)), *without]

    def rewritten() -> list[str]:
        with augment.rewriters(options, tmp_path, print) as found:
            return list(found["back-translation"](texts, 0.5, Random(0)))

    found = rewritten()
    assert 200 < sum(text.endswith("in fr in en") for text in found) < 300
    assert found[-10:] == without, "what has no translation stays as it is"
    assert known["back"].closed
    asked = len(known["forth"].asked)
    assert rewritten() == found
    assert len(known["forth"].asked) == asked, "a run taken up again asks for none"
    wrong = ClassificationOptions(augment=("back-translation=0.5",), back_translate=("forth", "other"))
    with (
        pytest.raises(UsageError, match="translates en to fr, and the second de to en"),
        augment.rewriters(wrong, tmp_path, print),
    ):
        pass


def test_answers_of_a_killed_run_are_kept(tmp_path: Path) -> None:
    file, asked = tmp_path / "answers.jsonl", [str(i) for i in range(600)]
    seen: list[str] = []
    kill = True

    def answer(texts: Sequence[str]) -> list[str]:
        if kill and seen:
            raise RuntimeError("killed")
        seen.extend(texts)
        return [f"<{text}>" for text in texts]

    with pytest.raises(RuntimeError, match="killed"):
        kept_answers(file, asked, answer, "answered", print)
    with file.open("a") as lines:
        lines.write('"<256')  # killed in the middle of a line
    seen.clear()
    kill = False
    told: list[str] = []
    assert kept_answers(file, asked, answer, "answered", told.append) == [f"<{i}>" for i in range(600)]
    assert seen == asked[256:]
    assert told == ["answered 256 of 600 before", "answered 512 of 600"]
