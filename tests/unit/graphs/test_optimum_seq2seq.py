"""Graphs in optimum's layout give PyTorch's logits, token after token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from translators import FAMILIES, V

from deploykit.graphs.families import read_architecture
from deploykit.graphs.optimum_seq2seq import save_optimum


def near(ours: Any, theirs: Any) -> None:
    assert np.abs(ours - theirs).max() < 5e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_pytorch_with_and_without_a_past(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    names = save_optimum(tmp_path, read_architecture(model))
    encoder, decoder, with_past = (onnxruntime.InferenceSession(tmp_path / name) for name in names)
    random = np.random.default_rng(0)
    ids = random.integers(3, V - 2, (2, 9))
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    target = random.integers(3, V - 2, (2, 5))
    with torch.no_grad():
        wanted = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), decoder_input_ids=torch.tensor(target)
        ).logits.numpy()
    [hidden] = encoder.run(None, {"input_ids": ids, "attention_mask": mask})
    inputs = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "input_ids": target[:, :2]}
    found = dict(zip([o.name for o in decoder.get_outputs()], decoder.run(None, inputs)))
    near(found["logits"], wanted[:, :2])
    past = {name.replace("present", "past_key_values"): array for name, array in found.items() if name != "logits"}
    for at in range(2, 5):
        inputs = {**past, "encoder_attention_mask": mask, "input_ids": target[:, at : at + 1]}
        found = dict(zip([o.name for o in with_past.get_outputs()], with_past.run(None, inputs)))
        near(found["logits"], wanted[:, at : at + 1])
        past.update({name.replace("present", "past_key_values"): a for name, a in found.items() if name != "logits"})
