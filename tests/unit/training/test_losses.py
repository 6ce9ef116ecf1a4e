"""R-Drop and distillation, for tasks with many logits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

from deploykit.errors import UsageError
from deploykit.training import losses
from deploykit.training.losses import TaughtTrainer, check_dropout, divergence, soft_targets, token_divergence


def test_the_divergence_of_two_passes_is_half_of_both_ways() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(5, 7), torch.randn(5, 7)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    assert float(divergence(first, second)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(first, first)) == 0


@pytest.mark.parametrize("at_once", [1, 30, 1 << 20])
def test_parts_have_the_sum_and_the_gradients_of_the_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    logits, known = torch.randn(12, 9, requires_grad=True), torch.tensor([True, True, False, True, True, False])
    a, b = logits.chunk(2)
    (2 * divergence(a[known], b[known])).backward()
    assert logits.grad is not None
    expected, logits.grad = logits.grad.clone(), None
    found = token_divergence(logits, known)
    (2 * found).backward()
    torch.testing.assert_close(logits.grad, expected)
    torch.testing.assert_close(found.detach(), divergence(a[known], b[known]).detach())
    assert float(token_divergence(logits.detach(), torch.zeros(6, dtype=torch.bool))) == 0


def test_soft_targets_are_zero_at_the_teacher() -> None:
    logits = torch.randn(3, 4)
    assert float(soft_targets(logits, logits, 2.0)) == pytest.approx(0, abs=1e-6)


def _llama(**settings: Any) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **settings
        )
    )


def test_a_model_without_dropout_is_refused() -> None:
    with pytest.raises(UsageError, match="two passes with different dropout, and the model has none") as error:
        check_dropout(_llama(), "add --attention-dropout 0.1")
    assert error.value.remedy == "add --attention-dropout 0.1"
    check_dropout(_llama(attention_dropout=0.1), "")
    check_dropout(BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)), "")
    adapted = _llama()
    adapted.add_module("adapter", nn.Dropout(0.05))
    check_dropout(adapted, "")


class _Summing(nn.Module):
    def forward(self, x: torch.Tensor, **others: Any) -> dict[str, torch.Tensor]:
        return {"logits": x}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize(("training", "r_drop", "passes"), [(True, 1.0, 2), (True, 0.0, 1), (False, 1.0, 1)])
def test_the_loss_is_told_how_often_the_batch_was_passed(
    gradients: bool, training: bool, r_drop: float, passes: int, tmp_path: Path
) -> None:
    told = []

    def loss(outputs: Any, labels: torch.Tensor, items_of_step: Any, passes: int) -> torch.Tensor:
        told.append((len(outputs["logits"]), len(labels), passes))
        return outputs["logits"].sum()

    model = _Summing().train(training)
    options: Any = SimpleNamespace(r_drop=r_drop)
    trainer = TaughtTrainer(model, TrainingArguments(str(tmp_path), report_to=[]), options=options, loss=loss)
    with torch.set_grad_enabled(gradients):
        inputs = {"x": torch.ones(3, 2), "labels": torch.ones(3)}
        trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(3))
    assert told == [(3 * passes, 3 * passes, passes)]
