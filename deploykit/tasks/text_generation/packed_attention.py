"""Attention of packed rows on a CPU: row by row, not over all pairs of tokens in the batch.

A batch of 1,024 tokens in rows of 40 has 25 times fewer pairs within rows than in all. With SmolLM2-135M that makes
training 1.4 times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "deploykit_packed"
"""Its name for ``set_attn_implementation``, after ``register``."""


def register() -> None:
    """Make the attention known to transformers."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def packed_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return what transformers' attention named "sdpa" does. The arguments are those of transformers.

    ``query`` [1, heads, tokens, head size]; ``attention_mask`` bool [1, 1, tokens, tokens] is causal, and true where a
    token attends to another. A row begins where a token does not attend to the one before it; it may attend to a prefix that all rows share.
    """
    tokens = query.shape[2]
    if attention_mask is None or attention_mask.shape != (1, 1, tokens, tokens) or key.shape[2] != tokens:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    mask = attention_mask[0, 0]
    starts = [0, *(~mask.diagonal(-1)).nonzero()[:, 0].add(1).tolist(), tokens]
    rows = []
    for start, end in pairwise(starts):
        shared = int(mask[start, :start].sum())
        seen = (slice(start, end),) if not shared else (slice(shared), slice(start, end))
        keys, values, visible = (_joined(x, seen) for x in (key, value, attention_mask[:, :, start:end].mT))
        rows.append(sdpa_attention_forward(module, query[:, :, start:end], keys, values, visible.mT, **options)[0])
    return torch.cat(rows, 1), None


def _joined(values: torch.Tensor, parts: Sequence[slice]) -> torch.Tensor:
    """Return parts of the last but one axis, one after another."""
    found = [values[:, :, part] for part in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 2)
