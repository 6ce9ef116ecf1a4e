"""Language models that learn a teacher's probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import encoded_rows, random_model, tokenizer, write_checkpoint
from torch.nn import functional

from deploykit.errors import ArtifactError, UsageError
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.distill import Teacher, check_teacher
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.packing import IGNORED, pack, pack_sharing, pad
from deploykit.tasks.text_generation.sft import supervised_loss, train
from deploykit.training import losses


def weights(seed: int, name: str = "llama", **settings: Any) -> Any:
    model = random_model(name, scale=2.0, **settings)
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize(("name", "vocabulary"), [("llama", 400), ("gemma2", 400), ("gpt2", 400), ("llama", 416)])
def test_loss_and_gradients_are_those_of_all_logits(
    name: str, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", 400 * 7)
    student, other = weights(1, name), weights(2, name, vocab_size=vocabulary)
    batch = pad(encoded_rows(4), 5)
    labels = batch.pop("labels")
    known = labels[:, 1:] != IGNORED
    logits, theirs = student(**batch).logits[:, :-1][known], other(**batch).logits[:, :-1][known][:, :400].detach()
    taught = functional.kl_div(
        (logits / 3).log_softmax(-1), (theirs / 3).log_softmax(-1), log_target=True, reduction="sum"
    )
    expected = 0.3 * functional.cross_entropy(logits, labels[:, 1:][known], reduction="sum") + 0.7 * 9 * taught
    (expected / 5).backward()
    gradients = {key: weight.grad.clone() for key, weight in student.named_parameters() if weight.grad is not None}
    for made in (pad(encoded_rows(4), 5), pack(encoded_rows(4)), pack_sharing(encoded_rows(4))):
        if "attention_mask" in made and made["attention_mask"].dim() == 4:
            if name == "gemma2":
                continue  # it trains with eager attention, and shares nothing
            student.set_attn_implementation("sdpa")
            other.set_attn_implementation("sdpa")
        student.zero_grad()
        loss, count = supervised_loss(student, made, Teacher(other, 0.7, 3.0))
        assert count == int(known.sum())
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
        (loss / 5).backward()
        for key, gradient in gradients.items():
            found = dict(student.named_parameters())[key].grad
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-4, msg=key)
    assert all(weight.grad is None for weight in other.parameters())


@pytest.mark.parametrize("adapter", [0, 8])
def test_a_student_learns_its_teacher_where_the_tokens_are_noise(adapter: int, tmp_path: Path) -> None:
    teacher, held_out = Teacher(weights(2), 1.0, 1.0), pack(encoded_rows(20, seed=1))

    def distance(model: Any) -> float:
        """The divergence alone, on rows that were not trained on."""
        model.set_attn_implementation("eager")
        teacher.model.set_attn_implementation("eager")
        with torch.no_grad():
            total, count = supervised_loss(model, held_out, teacher)
        return float(total) / count

    after = {}
    for share in (0.0, 1.0):
        model = weights(1)
        facts = checkpoint_facts(model.config, model.generation_config, tokenizer(CHATML))
        options = TextGenerationOptions(
            model="m", train="t", max_steps=40, learning_rate=3e-2 if adapter else 3e-3, mixed_precision="no", teacher="t",
            distill_alpha=share, distill_temperature=1.0, validation_fraction=0.0, lora_r=adapter,
        )  # fmt: skip
        taught = Teacher(teacher.model, share, 1.0)
        model, _ = train(
            model, encoded_rows(150), [], facts, options, tmp_path / str(share), lambda _: None, None, taught
        )
        after[share] = distance(model)
    assert after[1.0] < 0.75 * min(after[0.0], distance(weights(1)))


def test_a_teacher_of_other_tokens_or_without_logits_is_refused(tmp_path: Path) -> None:
    model, own = random_model("llama"), tokenizer()
    facts = checkpoint_facts(model.config, model.generation_config, own)
    same = write_checkpoint(tmp_path / "same")
    check_teacher(str(same), own, facts, 256)
    with pytest.raises(UsageError, match="reads 256 tokens, and the student 300"):
        check_teacher(str(same), own, facts, 300)
    own.add_tokens(["new"])
    with pytest.raises(UsageError, match="has another vocabulary"):
        check_teacher(str(same), own, facts, 256)
    with pytest.raises(ArtifactError, match="no such model folder"):
        check_teacher("./missing", own, facts, 256)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "model.onnx").touch()
    with pytest.raises(UsageError, match="is an export"):
        check_teacher(str(tmp_path / "e"), own, facts, 256)
