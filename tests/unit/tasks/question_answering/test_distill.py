"""Answerers that learn from a teacher."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_answerer import squad, write_checkpoint, write_export, write_squad

from deploykit.errors import UsageError
from deploykit.stages.finetune import finetune
from deploykit.tasks.question_answering.checkpoint import TorchAnswerer
from deploykit.tasks.question_answering.distill import (
    distillation,
    hidden_teacher,
    logits_of,
    open_teacher,
    stacked,
)
from deploykit.tasks.question_answering.options import QuestionAnsweringOptions
from deploykit.tasks.question_answering.rows import Example, RightAnswers
from deploykit.tasks.question_answering.windows import Window

LENGTHS = {"max_length": 48, "doc_stride": 12}


def _examples(count: int = 6) -> list[Example]:
    paragraphs = squad(contexts=count)["data"][0]["paragraphs"]
    return [
        Example(p["qas"][0]["question"], p["context"], RightAnswers(), "", f"a:{i}") for i, p in enumerate(paragraphs)
    ]


def _windows(answerer: TorchAnswerer, examples: Sequence[Example]) -> list[Window]:
    tokenizer = answerer.tokenizer
    return [
        window
        for example in examples
        for window in tokenizer.windows(tokenizer.question(example.question), tokenizer.context(example.context))
    ]


def test_logits_are_those_of_the_windows_and_padding_counts_nothing(tmp_path: Path) -> None:
    student = TorchAnswerer.load(write_checkpoint(tmp_path / "m", sharp=True))
    teacher = open_teacher(str(tmp_path / "m"), student, _examples())
    windows = _windows(student, _examples())
    windows.append(Window(windows[0].ids[:9], windows[0].types[:9], 0, 0, 9))
    logits = logits_of(teacher, windows)
    assert [each.shape for each in logits] == [(2, len(window.ids)) for window in windows]
    longest = max(len(window.ids) for window in windows)
    ids = torch.tensor([window.ids + [0] * (longest - len(window.ids)) for window in windows])
    with torch.no_grad():
        outputs = student.model(input_ids=ids, attention_mask=(torch.arange(longest) < torch.tensor([[len(w.ids)] for w in windows])).long(),
                                token_type_ids=torch.tensor([w.types + [0] * (longest - len(w.ids)) for w in windows]))  # fmt: skip
    assert float(distillation(outputs, stacked(logits), 2.0)) == pytest.approx(0, abs=1e-3), "the same model"
    other = TorchAnswerer.load(write_checkpoint(tmp_path / "other"))
    with torch.no_grad():
        apart = other.model(input_ids=ids[-1:, :9])
    own = {name: value[:, :9] for name, value in apart.items()}
    long = {name: torch.cat([value, torch.full((1, 5), 7.0)], 1) for name, value in own.items()}
    padded = stacked([logits[-1], np.zeros((2, 14), np.float32)])[:1]
    assert float(distillation(long, padded, 2.0)) == pytest.approx(
        float(distillation(own, stacked(logits[-1:]), 2.0)), rel=1e-5
    )


def test_an_export_teaches_logits_and_no_hidden_states(tmp_path: Path) -> None:
    export = write_export(tmp_path / "e")
    student = TorchAnswerer.load(tmp_path / "e" / "checkpoint")
    teacher = open_teacher(str(export), student, _examples())
    windows = _windows(student, _examples())
    own = open_teacher(str(tmp_path / "e" / "checkpoint"), student, [])
    for found, expected in zip(logits_of(teacher, windows), logits_of(own, windows)):
        np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(UsageError, match="exports do not return them"):
        hidden_teacher(teacher, student.model, windows[0])


def test_a_teacher_of_another_task_with_other_tokens_or_shorter_windows_is_refused(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    student = TorchAnswerer.load(write_checkpoint(tmp_path / "m"))
    classifier = make_tiny_checkpoint(tmp_path / "classifier")
    with pytest.raises(UsageError, match="classifier classifies") as error:
        open_teacher(str(classifier), student, _examples())
    assert error.value.remedy == "give a model that answers questions"
    other = write_checkpoint(tmp_path / "roberta", "roberta")
    with pytest.raises(UsageError, match="has another tokenizer than the student"):
        open_teacher(str(other), student, _examples())
    short = write_checkpoint(tmp_path / "short", length=32)
    with pytest.raises(UsageError, match="reads windows of 32 tokens, and the student of 64"):
        open_teacher(str(short), student, _examples())


@pytest.mark.parametrize("hidden", [0.0, 2.0])
def test_a_student_learns_its_teacher_where_the_answers_are_noise(hidden: float, tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher", sharp=True)
    content = squad(contexts=80, questions=1)
    drawn = random.Random(1)
    for paragraph in content["data"][0]["paragraphs"]:
        words = paragraph["context"].split()
        at = drawn.randrange(len(words))
        paragraph["qas"][0]["answers"] = [{"text": words[at], "answer_start": len(" ".join([*words[:at], ""]))}]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    runs = {}
    for share in (0.0, 1.0):
        options = QuestionAnsweringOptions(
            model=str(teacher), train=str(tmp_path / "rows.json"), teacher=str(teacher), student_layers=1, max_steps=60,
            learning_rate=5e-3, distill_alpha=share, distill_hidden=hidden * share, validation_fraction=0.0, test_fraction=0.1,
            **LENGTHS,
        )  # fmt: skip
        told: list[str] = []
        runs[share] = finetune(options, tmp_path / f"run-{share}", say=told.append)
        assert "the student has the layers [0] of" in "\n".join(told)
    assert ("hidden states: 0 from 0" in "\n".join(told)) == bool(hidden), "the layer that was kept"
    reference = TorchAnswerer.load(teacher)
    windows = _windows(TorchAnswerer.load(runs[1.0].path), _examples(30))
    wanted = logits_of(reference, windows)

    def distance(path: Path) -> float:
        found = logits_of(TorchAnswerer.load(path), windows)
        return float(np.mean([np.abs(_softmax(a) - _softmax(b)).sum() for a, b in zip(found, wanted)]))

    assert distance(runs[1.0].path) < 0.75 * distance(runs[0.0].path)
    metrics = runs[1.0].manifest.metrics
    assert set(metrics["differences"]["teacher"]) == {"exact_match", "f1"}
    assert metrics["teacher"]["test"]["rows"] == metrics["test"]["rows"]


def _softmax(logits: Any) -> Any:
    exact = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exact / exact.sum(axis=-1, keepdims=True)


def test_questions_have_noisy_copies_and_r_drop(tmp_path: Path) -> None:
    model, rows = write_checkpoint(tmp_path / "m"), write_squad(tmp_path / "rows.json", 12)
    options = QuestionAnsweringOptions(
        model=str(model), train=str(rows), max_steps=2, augment=("case=1",), r_drop=1.0, validation_fraction=0.2,
        test_fraction=0.2, **LENGTHS,
    )  # fmt: skip
    told: list[str] = []
    run = finetune(options, tmp_path / "run", say=told.append)
    count = run.manifest.metrics["rows"]["train"]
    assert run.manifest.metrics["augmented"] == {"case=1": count}
    assert f"training on {2 * count} questions" in "\n".join(told)
    assert "WHICH ONE ?" in "\n".join(told)
    assert "with case" not in (run.path / "splits" / "train.jsonl").read_text()
