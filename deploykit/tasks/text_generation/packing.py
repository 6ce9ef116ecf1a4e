"""Batches of rows: packed one after another without padding, or padded side by side.

Packed rows do not attend to each other: positions restart with each row, and transformers builds the attention mask from
them (``find_packed_sequence_indices``), also for sliding windows. If the rows of a batch share a prefix, such as the system
message, the batch contains it once, and the mask says which tokens attend to it.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from deploykit.tasks.text_generation.encode import EncodedRow

_GROWTH = 1.02
"""Of the number of batches, where some have no room for their rows."""
IGNORED = -100
"""The label of a token that is not supervised."""


class EncodedRows(Dataset):  # type: ignore[misc]
    """Rows as they were encoded. ``~row`` is a row of which no token is supervised."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> EncodedRow:
        if row >= 0:
            return self.rows[row]
        found = self.rows[~row]
        return dataclasses.replace(found, supervised=np.zeros_like(found.supervised))


class TokenBatches(Sampler[list[int]]):  # type: ignore[misc]
    """Batches of at most ``most`` tokens, unless one row has more; padding counts unless they are ``packed``.

    The number of rows of each length in a batch is the same in every epoch; the rows, and the order of the batches,
    are drawn again. Of ``processes`` that train together, each has the ``process``-th batch of a turn; if the last turn has too
    few batches, a process gets one that changes nothing.
    """

    def __init__(
        self, lengths: Sequence[int], most: int, *, packed: bool, seed: int | None, process: int = 0, processes: int = 1
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._seed = seed
        self._epoch = 0
        longest_first = np.sort(self._lengths)[::-1].tolist()
        self._batches = _packed(longest_first, most) if packed else list(_padded(longest_first, most))
        self._process, self._processes = process, processes

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-len(self._batches) // self._processes)

    def __iter__(self) -> Iterator[list[int]]:
        rows = np.arange(len(self._lengths))
        order = np.arange(len(self._batches))
        if self._seed is not None:
            random_numbers = np.random.default_rng((self._seed, self._epoch))
            rows, order = random_numbers.permutation(rows), random_numbers.permutation(order)
        longest_first = rows[np.argsort(-self._lengths[rows], kind="stable")]
        own = order[self._process :: self._processes]
        for i in own:
            yield longest_first[self._batches[i]].tolist()
        if len(own) < len(self):
            yield [~int(longest_first[-1])]


def _packed(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Yield batches of about as many tokens, each of long and of short rows. ``lengths`` descend.

    Batches of rows of one length learn less in as many steps.
    """
    count = max(1, math.ceil(sum(lengths) / most))
    while True:
        batches: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, batch) for batch in range(count)]
        for i, length in enumerate(lengths):
            tokens, batch = emptiest[0]
            batches[batch].append(i)
            heapq.heapreplace(emptiest, (tokens + length, batch))
        if all(tokens <= most or len(batches[batch]) == 1 for tokens, batch in emptiest):
            return [batch for batch in batches if batch]
        count = max(count + 1, int(count * _GROWTH))


def _padded(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    start = 0
    for i in range(len(lengths)):
        if i > start and (i + 1 - start) * lengths[start] > most:
            yield list(range(start, i))
            start = i
    yield list(range(start, len(lengths)))


def row_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Return the number of tokens of the rows of a batch, without padding; a shared prefix counts in each row."""
    if "position_ids" not in batch:
        return int(batch["attention_mask"].sum())
    positions = batch["position_ids"][0]
    last = torch.ones_like(positions, dtype=torch.bool)
    last[:-1] = positions[1:] <= positions[:-1]
    return int((positions[last] + 1).sum())


def labels_of(row: EncodedRow) -> list[int]:
    """Return the ids of supervised tokens, ``IGNORED`` elsewhere. The first token has nothing before it that predicts it."""
    labels = np.where(row.supervised, row.ids, IGNORED)
    labels[0] = IGNORED
    return list(map(int, labels))


def pack(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """Concatenate rows: input_ids, position_ids and labels, int64 [1, tokens of all]."""
    return {
        "input_ids": torch.from_numpy(np.concatenate([row.ids for row in rows]))[None],
        "position_ids": torch.cat([torch.arange(len(row.ids)) for row in rows])[None],
        "labels": torch.tensor([label for row in rows for label in labels_of(row)])[None],
    }


def pack_sharing(rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
    """Concatenate rows as ``pack`` does, but write a prefix that all rows share once: ``attention_mask``, bool [1, 1, tokens, tokens], is
    true where a token attends to another. Loss and gradients equal those of ``pack``."""
    shared = shared_beginning(rows)
    if not shared:
        return pack(rows)
    ends = np.cumsum([len(row.ids) - shared for row in rows]) + shared
    starts = np.array([shared, *ends[:-1]])
    row = np.concatenate([np.zeros(shared, np.int64), np.repeat(np.arange(1, len(rows) + 1), ends - starts)])
    seen = torch.from_numpy((row[:, None] == row) | (row == 0)).tril()
    return {
        "input_ids": torch.from_numpy(np.concatenate([rows[0].ids[:shared], *(row.ids[shared:] for row in rows)]))[
            None
        ],
        "position_ids": torch.cat([torch.arange(shared), *(torch.arange(shared, len(row.ids)) for row in rows)])[None],
        "labels": torch.tensor([IGNORED] * shared + [label for row in rows for label in labels_of(row)[shared:]])[None],
        "attention_mask": seen[None, None],
    }


def shared_beginning(rows: Sequence[EncodedRow]) -> int:
    """Return the number of tokens of the prefix that all rows share, up to the token before the first supervised one: that
    one is predicted within its own row."""
    if len(rows) == 1:
        return 0
    most = min(int(row.supervised.argmax()) if row.supervised.any() else len(row.ids) for row in rows) - 1
    first = rows[0].ids[: max(most, 0)]
    for row in rows[1:]:
        differs = np.flatnonzero(row.ids[: len(first)] != first)
        first = first[: differs[0]] if len(differs) else first
    return len(first)


def pad(rows: Sequence[EncodedRow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Stack rows, padded on the right: input_ids, attention_mask and labels, int64 [rows, tokens of the longest].

    Padding is recognized by its position, because the pad token may also end answers.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.from_numpy(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, : len(row.ids)] = torch.tensor(labels_of(row))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
