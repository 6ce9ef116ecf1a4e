"""Facts of a checkpoint: which inputs its classifier reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_answerer import write_checkpoint
from transformers import AutoConfig, AutoModelForSequenceClassification

from deploykit.tasks.classification.checkpoint import TorchClassifier, takes_token_types
from deploykit.tasks.classification.facts import as_text
from deploykit.training.checkpoint import load_tokenizer


@pytest.mark.parametrize(("family", "typed"), [("albert", True), ("bert", True), ("electra", True), ("roberta", False)])
def test_pairs_have_the_token_types_that_the_model_was_trained_with(tmp_path: Path, family: str, typed: bool) -> None:
    """transformers 5 leaves out ALBERT's, with which transformers 4 trained it."""
    folder = write_checkpoint(tmp_path / "model", family)
    tokenizer, config = load_tokenizer(str(folder)), AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    assert takes_token_types(model, tokenizer, pair=True) is typed
    assert not takes_token_types(model, tokenizer, pair=False)

    found = TorchClassifier.load(folder, ("text", "text_pair"))
    encoded = tokenizer(["w1 w2"], ["w3"], return_tensors="pt", return_token_type_ids=typed)
    with torch.inference_mode():
        expected = model(**encoded).logits.softmax(-1).numpy()
    np.testing.assert_allclose(found.scores([as_text("w1 w2", "w3")]), expected, atol=1e-5)
