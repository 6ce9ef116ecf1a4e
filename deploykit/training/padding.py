"""Token ids of unequal length as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(token_ids: Sequence[Sequence[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded to the longest, and which of them are real; both int64 [rows, tokens]."""
    length = max(len(ids) for ids in token_ids)
    rows = [[*ids, *[pad_token_id] * (length - len(ids))] for ids in token_ids]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in token_ids]
    return torch.tensor(rows), torch.tensor(mask)
