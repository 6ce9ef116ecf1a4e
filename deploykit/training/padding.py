"""Token ids of unequal length as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def padded(
    token_ids: Sequence[Sequence[int]], pad_token_id: int, *, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids padded to the longest (at their end, or ``left`` of them), and which are real; both int64 [rows, tokens]."""
    length = max(len(ids) for ids in token_ids)

    def filled(ids: Sequence[int], value: int) -> list[int]:
        gap = [value] * (length - len(ids))
        return [*gap, *ids] if left else [*ids, *gap]

    rows = [filled(ids, pad_token_id) for ids in token_ids]
    mask = [filled([1] * len(ids), 0) for ids in token_ids]
    return torch.tensor(rows), torch.tensor(mask)
