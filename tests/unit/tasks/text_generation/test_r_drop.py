"""R-Drop of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import encoded_rows, random_model, tokenizer

from deploykit.errors import UsageError
from deploykit.tasks.text_generation.chat_template import CHATML
from deploykit.tasks.text_generation.checkpoint import checkpoint_facts
from deploykit.tasks.text_generation.distill import Teacher
from deploykit.tasks.text_generation.options import TextGenerationOptions
from deploykit.tasks.text_generation.packing import IGNORED, pack, pack_sharing, pad
from deploykit.tasks.text_generation.sft import supervised_loss, train
from deploykit.training.losses import divergence


@pytest.mark.parametrize("form", [pack, pack_sharing, lambda batch: pad(batch, 5)])
@pytest.mark.parametrize("taught", [False, True])
def test_equal_passes_add_nothing(form: Any, taught: bool) -> None:
    model = random_model("llama")
    model.set_attn_implementation("sdpa")
    teacher = None
    if taught:
        other = random_model("llama", scale=3.0)
        other.set_attn_implementation("sdpa")
        teacher = Teacher(other, 0.5, 2.0)
    batch = form(encoded_rows(4))
    gradients = {}
    for weight in (0.0, 3.0):
        model.zero_grad()
        loss, count = supervised_loss(model, batch, teacher, weight)
        loss.backward()
        gradients[weight] = (float(loss.detach()), count, model.lm_head.weight.grad.clone())
    assert gradients[3.0][0] == pytest.approx(gradients[0.0][0], rel=1e-4)
    assert gradients[3.0][1] == gradients[0.0][1]
    torch.testing.assert_close(gradients[3.0][2], gradients[0.0][2], rtol=1e-3, atol=1e-3)


def _apart(model: Any) -> float:
    """Return the divergence of two passes with different dropout, for a token that is predicted."""
    batch = pad(encoded_rows(30, seed=1), 5)
    known = batch.pop("labels")[:, 1:] != IGNORED
    model.train()
    torch.manual_seed(5)
    with torch.no_grad():
        first, second = (model(**batch).logits[:, :-1][known] for _ in range(2))
    return float(divergence(first, second)) / int(known.sum())


def test_r_drop_makes_passes_with_different_dropout_agree(tmp_path: Path) -> None:
    after = {}
    for weight in (0.0, 5.0):
        model = random_model("llama", scale=2.0, attention_dropout=0.3)
        facts = checkpoint_facts(model.config, model.generation_config, tokenizer(CHATML))
        options = TextGenerationOptions(
            model="m",
            train="t",
            max_steps=30,
            eval_steps=30,
            batch_tokens=512,
            learning_rate=1e-2,
            mixed_precision="no",
            r_drop=weight,
            validation_fraction=0.0,
        )
        model, _ = train(model, encoded_rows(150), [], facts, options, tmp_path / str(weight), lambda _: None)
        after[weight] = _apart(model)
    assert after[5.0] < 0.7 * after[0.0]


def test_r_drop_without_dropout_is_refused(tmp_path: Path) -> None:
    model = random_model("llama")
    facts = checkpoint_facts(model.config, model.generation_config, tokenizer(CHATML))
    options = TextGenerationOptions(model="m", train="t", max_steps=1, r_drop=1.0, validation_fraction=0.0)
    with pytest.raises(UsageError, match="the model has none") as error:
        train(model, encoded_rows(4), [], facts, options, tmp_path, lambda _: None)
    assert "--attention-dropout" in error.value.remedy
