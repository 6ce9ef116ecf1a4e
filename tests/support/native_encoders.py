"""Random encoders of the families that the engine ``native`` runs, and texts of token ids for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from deploykit.runtime.engines.native.loader import lacks

runs_here = pytest.mark.skipif(lacks() is not None, reason=f"the engine native does not run here: {lacks()}")

VOCABULARY, PAD = 119, 1
SHAPES = {"bert": (48, 4), "distilbert": (80, 2), "mpnet": (128, 1), "electra": (64, 2)}
"""Hidden size and heads, of 12 to 128 values; 32 and 4 where nothing is said."""


def random_model(auto_model: Any, family: str, *, layers: int, longest: int, **settings: Any) -> Any:
    """Return a model of ``family`` with random weights that reads up to ``longest`` tokens."""
    torch.manual_seed(0)
    hidden, heads = SHAPES.get(family, (32, 4))
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers, "intermediate_size": 72}
    if family == "distilbert":
        sizes = {"dim": hidden, "n_heads": heads, "n_layers": layers, "hidden_dim": 72}
    extra = {"embedding_size": hidden} if family == "electra" else {}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, max_position_embeddings=longest + 2, pad_token_id=PAD, initializer_range=0.1,
        attn_implementation="eager", **{**sizes, **extra, **settings},
    )  # fmt: skip
    model = auto_model.from_config(config).eval()
    if family == "mpnet":  # whose biases are to matter
        model.mpnet.encoder.relative_attention_bias.weight.data *= 20
    return model


def texts_of(*lengths: int) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(PAD + 1, VOCABULARY, n).tolist() for n in lengths]


def padded(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    ids = np.full((len(texts), max(map(len, texts))), PAD, np.int64)
    mask = np.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}
