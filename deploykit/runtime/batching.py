"""Pad texts of different lengths into batches.

A text's padded length depends only on its own length (its bucket), never on the rest of the batch. The reason: fused
kernels sum in an order that depends on the padded length, and in INT8 the last bit can move a value to the next step.
With buckets, the same text gives the same bits in any batch. Few distinct lengths also limit the memory that engines
spend on kernels compiled for each shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import DataError

DEFAULT_TOKEN_BUDGET = 512
"""Padded tokens of a batch. On a CPU this is as fast as larger budgets, with fewer shapes and so less memory (measured from
256 to 2048)."""


@dataclass(frozen=True)
class Batch:
    """A padded batch. ``rows`` are indices of the given texts; both arrays are int64 [rows, bucket length]."""

    rows: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]


def bucket(length: int) -> int:
    """Return the padded length of a text of ``length`` tokens: multiples of 16 to 128, then of 32, then of 64."""
    step = 16 if length <= 128 else 32 if length <= 256 else 64
    return -(-length // step) * step


def batches(
    token_ids: Sequence[Sequence[int]],
    pad_token_id: int,
    *,
    max_length: int,
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    pad_left: bool = False,
) -> Iterator[Batch]:
    """Group texts by bucket, and split each group so that no batch holds more than ``token_budget`` tokens.

    Short texts come first. A single text may exceed the budget. ``max_length`` is the model's limit, which a bucket
    must not exceed. Padding follows a text's tokens, or with ``pad_left`` stands before them. Raises DataError for a text
    without tokens.
    """
    by_bucket: dict[int, list[int]] = defaultdict(list)
    for row, ids in enumerate(token_ids):
        if not ids:
            raise DataError(f"text {row + 1} has no token that the model reads", "leave it out")
        by_bucket[min(bucket(len(ids)), max_length)].append(row)
    for length, rows in sorted(by_bucket.items()):
        start = 0
        while start < len(rows):
            size = min(len(rows) - start, max(1, token_budget // length))
            some = rows[start : start + size]
            yield _pad([token_ids[r] for r in some], some, length, pad_token_id, pad_left)
            start += size


def padded_types(
    input_ids: NDArray[np.int64],
    types: Sequence[Sequence[int]],
    rows: Sequence[int] | NDArray[np.int64],
    *,
    pad_left: bool = False,
) -> NDArray[np.int64]:
    """Return the token types of ``rows``, padded with 0 to the shape of their ``input_ids``."""
    padded = np.zeros_like(input_ids)
    for i, row in enumerate(rows):
        padded[i, _place(len(types[row]), input_ids.shape[1], pad_left)] = types[row]
    return padded


def _place(tokens: int, length: int, pad_left: bool) -> slice:
    """Return the columns of a text of a number of tokens, padded to ``length``."""
    return slice(length - tokens, length) if pad_left else slice(tokens)


def _pad(
    token_ids: Sequence[Sequence[int]], rows: Sequence[int], length: int, pad_token_id: int, pad_left: bool
) -> Batch:
    input_ids = np.full((len(rows), length), pad_token_id, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    for i, ids in enumerate(token_ids):
        place = _place(len(ids), length, pad_left)
        input_ids[i, place] = ids
        attention_mask[i, place] = 1
    return Batch(np.asarray(rows, np.int64), input_ids, attention_mask)
