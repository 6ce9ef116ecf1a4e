"""Learning from a teacher: its logits and its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deploykit.errors import UsageError
from deploykit.tasks.classification.checkpoint import TorchClassifier
from deploykit.tasks.classification.distill import Teacher, hidden_teacher
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.fitting import EncodedTexts, fit
from deploykit.tasks.classification.losses import distillation
from deploykit.tasks.classification.options import ClassificationOptions
from deploykit.training.student import keep_layers

TASK = Classification(("bad", "good"), 16, 0)


def test_the_loss_is_zero_at_the_teacher_and_its_gradient_that_of_soft_targets() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 2, requires_grad=True), torch.randn(6, 2)
    assert float(distillation(TASK, teacher, teacher, 3.0)) == pytest.approx(0, abs=1e-6)
    distillation(TASK, student, teacher, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1))  # Hinton et al., equation 2, times T²
    assert student.grad is not None
    assert torch.allclose(student.grad, expected.detach(), atol=1e-5)
    several = dataclasses.replace(TASK, multi_label=True)
    assert float(distillation(several, teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    numbers = dataclasses.replace(TASK, regression=True)
    assert float(distillation(numbers, student.detach()[:, :1], teacher[:, :1], 2.0)) > 0


def test_a_student_learns_its_teacher_where_the_labels_are_noise(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path / "teacher")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 200, 6)) for _ in range(160)]
    teacher = Teacher(str(path), TASK)
    wanted = teacher.logits(texts)
    student = TorchClassifier.load(path)
    student.model, kept = keep_layers(student.model, 1)
    assert kept == [0]
    truth = np.eye(2, dtype=bool)[random.integers(0, 2, 160)]
    rows = EncodedTexts(student.encode(texts), truth, TASK, wanted)

    def distance() -> float:
        return float(np.abs(student.scores(texts) - np.exp(wanted)).mean())

    before = distance()
    options = ClassificationOptions(
        model="m", train="x.csv", max_steps=30, learning_rate=3e-3, per_device_train_batch_size=32, distill_alpha=1.0,
        validation_fraction=0.0, teacher="m",
    )  # fmt: skip
    student.model = fit(student.model, rows, None, options, tmp_path / "work", lambda _: None)
    assert distance() < before / 2
    teacher.close()


def test_a_teacher_of_other_labels_is_refused(make_tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path / "teacher")
    with pytest.raises(UsageError, match="answers bad, good, and the student a, b"):
        Teacher(str(path), dataclasses.replace(TASK, labels=("a", "b")))
    swapped = Teacher(str(path), dataclasses.replace(TASK, labels=("good", "bad")))
    assert np.array_equal(swapped.logits(["w1"]), Teacher(str(path), TASK).logits(["w1"])[:, ::-1])


def test_an_exported_teacher_gives_its_probabilities(tiny_export: Path) -> None:
    task = dataclasses.replace(TASK, labels=("negative", "neutral", "positive"))
    logits = Teacher(str(tiny_export), task).logits(["w1 w2", "w3"])
    assert np.exp(logits).sum(axis=1) == pytest.approx(1, abs=1e-5)


def _of_width(path: Path, folder: Path, width: int, layers: int) -> TorchClassifier:
    """Return a random classifier with the tokenizer of another."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(path, hidden_size=width, num_hidden_layers=layers)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return TorchClassifier.load(folder)


@pytest.mark.parametrize("width", [32, 16])
def test_a_student_of_any_width_learns_hidden_states(
    width: int, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path / "teacher")
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 200, 6)) for _ in range(128)]
    truth = np.eye(2, dtype=bool)[random.integers(0, 2, 128)]

    def distance_after(weight: float) -> float:
        student = _of_width(path, tmp_path / f"student {weight}", width, 1)
        teacher = TorchClassifier.load(path)
        hidden = hidden_teacher(teacher, student, texts[:4])
        assert (hidden.layers, hidden.projects) == ([1], width == 16)
        options = ClassificationOptions(
            model="m", train="x.csv", max_steps=40, learning_rate=1e-2, per_device_train_batch_size=32, r_drop=0.1,
            validation_fraction=0.0, teacher="m", distill_hidden=weight, distill_alpha=0.5, gradient_accumulation_steps=2,
        )  # fmt: skip
        rows = EncodedTexts(student.encode(texts), truth, TASK, np.zeros((128, 2), np.float32))
        work = tmp_path / f"work {weight}"
        model = fit(student.model, rows, None, options, work, lambda _: None, hidden).eval()
        ids = torch.tensor(student.encode(texts).ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            ours = model(**inputs, output_hidden_states=True).hidden_states[1:]
            found = float(hidden.distance(ours, hidden.states(inputs), inputs["attention_mask"])) / 128
        hidden.detach(model)
        assert not [name for name, _ in model.named_parameters() if "distill" in name]
        return found

    without, learned = distance_after(1e-9), distance_after(10.0)
    assert learned < without / 2


def test_kept_layers_learn_from_themselves_and_others_evenly(
    make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path / "m")
    teacher, student = _of_width(path, tmp_path / "t", 32, 6), _of_width(path, tmp_path / "s", 32, 3)
    assert hidden_teacher(teacher, student, ["w1"]).layers == [1, 3, 5]
    assert hidden_teacher(teacher, student, ["w1"], [0, 2, 5], 6).layers == [0, 2, 5]
    assert hidden_teacher(teacher, student, ["w1"], [0, 2, 4], 5).layers == [1, 3, 5], "the origin was another model"
    same = hidden_teacher(teacher, teacher, ["w1"])
    ids = torch.tensor([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    states = same.states(inputs)
    assert float(same.distance(states, states, inputs["attention_mask"])) == pytest.approx(0, abs=1e-5)


def test_a_teacher_that_reads_other_tokens_or_has_no_states_is_refused(
    make_tiny_checkpoint: Callable[..., Path], tiny_export: Path, tmp_path: Path
) -> None:
    student = TorchClassifier.load(make_tiny_checkpoint(tmp_path / "m"))
    short = TorchClassifier.load(make_tiny_checkpoint(tmp_path / "t", positions=20))
    with pytest.raises(UsageError, match="the teacher reads 12 tokens, and the student 32"):
        hidden_teacher(short, student, ["w1"])
    other = TorchClassifier.load(make_tiny_checkpoint(tmp_path / "o"))
    other.tokenizer.add_tokens(["w1 w2"])
    with pytest.raises(UsageError, match="have different tokenizers"):
        hidden_teacher(other, student, ["w1 w2"])
    exported = Teacher(str(tiny_export), dataclasses.replace(TASK, labels=("negative", "neutral", "positive")))
    with pytest.raises(UsageError, match="give the checkpoint as --teacher"):
        exported.checkpoint()
