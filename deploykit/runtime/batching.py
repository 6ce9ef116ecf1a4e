"""Pad texts of different lengths into batches.

A text's padded length depends only on its own length (its bucket), never on the rest of the batch. The reason: fused
kernels sum in an order that depends on the padded length, and in INT8 the last bit can move a value to the next step.
With buckets, the same text gives the same bits in any batch. Few distinct lengths also limit the memory that engines
spend on kernels compiled for each shape. An engine that does not compute padding needs no buckets: fewer runs hold all texts.
"""

from __future__ import annotations

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
    """A padded batch. ``rows`` are indices of the given texts; both arrays are int64 [rows, padded length]."""

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
    buckets: bool = True,
) -> Iterator[Batch]:
    """Group texts so that no batch holds more than ``token_budget`` tokens.

    With ``buckets``, all texts of a batch have one bucket, and padding counts as tokens. Without, texts of all lengths share
    batches, and padding does not count. Short texts come first. A single text may exceed the budget. ``max_length`` is the
    model's limit, which a bucket must not exceed. Padding follows a text's tokens, or with ``pad_left`` stands before them.
    Raises DataError for a text without tokens.
    """
    lengths = [len(ids) for ids in token_ids]
    if 0 in lengths:
        raise DataError(f"text {lengths.index(0) + 1} has no token that the model reads", "leave it out")
    if buckets:
        lengths = [min(bucket(length), max_length) for length in lengths]
    some: list[int] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[row]
        if some and (tokens + length > token_budget or (buckets and length > lengths[some[0]])):
            yield _pad(token_ids, some, lengths[some[-1]], pad_token_id, pad_left)
            some, tokens = [], 0
        some.append(row)
        tokens += length
    if some:
        yield _pad(token_ids, some, lengths[some[-1]], pad_token_id, pad_left)


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
    for i, row in enumerate(rows):
        place = _place(len(token_ids[row]), length, pad_left)
        input_ids[i, place] = token_ids[row]
        attention_mask[i, place] = 1
    return Batch(np.asarray(rows, np.int64), input_ids, attention_mask)
