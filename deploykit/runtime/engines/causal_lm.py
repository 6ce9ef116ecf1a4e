"""A decoder-only language model on ONNX Runtime, with rows that join and leave its batch, each with its own caches.

``read`` fills the prompt area, and ``admit`` copies its keys and values to a new row. The rows in use are always
the first ones: when a row leaves, the last one takes its place.

The caches of a row reserve address space for the longest text. Pages are allocated as tokens arrive, so that
the operating system does the paging. Memory of removed rows is released when the limit would be exceeded. The idea is
from vAttention (arXiv 2405.04437).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines.reserved_memory import ReservedArray
from deploykit.runtime.engines.rows import Ints, power_of_two, without

Logits = NDArray[np.float32]
Block = NDArray[np.float32]
"""Keys and values of some tokens: [2 x layers, key heads, tokens, head size]."""

MAX_ROWS = 128
MAX_CACHE_BYTES = 1 << 30
_PREFIX_SHARE = 4
_LONG = 8192
_LEAST_PROMPT = 64


def cached_tokens(max_cache_bytes: int | None, token_bytes: int, context: int) -> tuple[int, int]:
    """Return the number of tokens that fit the caches of rows and of saved prompts, which get a quarter of ``max_cache_bytes``.
    None: 1 GiB, or more if a row of 8,192 tokens needs it."""
    if max_cache_bytes is None:
        max_cache_bytes = max(MAX_CACHE_BYTES, token_bytes * min(context, _LONG) * 4 // 3)
    all_tokens = max_cache_bytes // token_bytes
    return all_tokens - all_tokens // _PREFIX_SHARE, all_tokens // _PREFIX_SHARE


class CausalLm(Protocol):
    """A decoder-only language model. One caller at a time.

    ``rows`` are in use, of ``max_rows``. ``max_tokens``: most tokens in the caches of all rows. ``prefix_tokens``: most
    tokens of prompts whose caches may be ``saved``.
    """

    rows: int
    max_rows: int
    max_tokens: int
    prefix_tokens: int

    def __init__(
        self,
        file: Path,
        threads: int,
        *,
        context: int,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int | None = None,
    ) -> None:
        """Open ``file``, to run on CPU ``threads``, for texts of up to ``context`` tokens. ``max_cache_bytes`` limits the
        caches; see ``cached_tokens``. Raises EngineError naming the file that cannot be used."""

    def begin(self) -> None:
        """Empty the prompt area."""

    def feed(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        """Append tokens to the prompt area. Returns the logits of the tokens at the positions ``wanted`` in ``ids``, float32
        [wanted, vocabulary]. The array is overwritten by the next call."""

    def saved(self, start: int, end: int) -> Any:
        """Return a copy of the caches of the tokens ``start`` to ``end`` in the prompt area."""

    def restore(self, block: Any) -> None:
        """Append tokens whose caches were ``saved`` after the same tokens to the prompt area."""

    def admit(self, reserved: int) -> None:
        """Append a row with the prompt area's tokens. ``reserved``: maximum number of tokens of all rows in use."""

    def step(self, tokens: Ints) -> Logits:
        """Feed each row its next token, int64 [rows]. Returns logits, float32 [rows, vocabulary]. The array is
        overwritten by the next call."""

    def copy(self, sources: Sequence[int], targets: Sequence[int], begin: int) -> None:
        """Copy the caches of the rows ``sources`` to the rows ``targets``, which have as many tokens and share the first
        ``begin``. No row is in both."""

    def remove(self, gone: Ints) -> Ints:
        """Remove the rows ``gone``; the last rows move into their places. Returns the former number of each row left."""


class Part(NamedTuple):
    """Tokens of a prompt, ``ids``, to append to a prompt area, and the number of last tokens whose logits are wanted."""

    area: Any
    ids: Sequence[int]
    wanted: int


@runtime_checkable
class MixingCausalLm(Protocol):
    """A ``CausalLm`` that computes any tokens in one pass over its weights: several tokens of a row, to check guesses, and tokens
    of prompts. It has more than one prompt area; all other methods use ``area``.

    ``tokens_of_a_step``: number of tokens, over all rows, that take little longer than one token.
    """

    tokens_of_a_step: int
    area: Any

    def new_area(self) -> Any:
        """Return another, empty prompt area. There is one for each free row."""

    def release_others(self) -> None:
        """Release all prompt areas except ``area``."""

    def mix(self, tokens: Sequence[Sequence[int]], parts: Sequence[Part] = ()) -> Logits:
        """Feed each row some tokens, and append the ``parts`` to their prompt areas. Call ``keep`` after it.

        Returns the logits of the rows' tokens, then those wanted of each part, float32 [tokens, vocabulary]. The array is
        overwritten by the next call.
        """

    def keep(self, counts: Sequence[int]) -> None:
        """Keep only the first ``counts`` of the tokens that ``mix`` appended to each row; a negative count also removes earlier
        tokens."""


class OnnxCausalLm:
    """``CausalLm`` on CPU threads, for texts of up to ``context`` tokens. Raises EngineError for an unusable graph.

    ``max_cache_bytes`` limits the caches; see ``cached_tokens``.
    """

    def __init__(
        self,
        graph: Path,
        threads: int,
        *,
        context: int,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int | None = None,
    ) -> None:
        # Imported here, because the language models of other engines do not need ONNX Runtime.
        from deploykit.runtime.engines.onnxruntime import open_session, session_options

        self._session = open_session(graph, session_options(threads, spin=True))
        inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._caches = [name for name in inputs if name.startswith("past.")]
        _, self._heads, _, self._size = inputs[self._caches[0]]
        self.vocabulary = int(self._session.get_outputs()[0].shape[1])
        token_bytes = len(self._caches) * self._heads * self._size * 4
        self.max_rows = max_rows
        self.max_tokens, self.prefix_tokens = cached_tokens(max_cache_bytes, token_bytes, context)
        self.rows = 0
        self._prompt = self._empty_prompt(_LEAST_PROMPT)
        self._length = 0
        self._maps = [
            _RowCaches(max_rows, self._heads, min(context, max(self.max_tokens, 1)), self._size) for _ in self._caches
        ]
        self._past = np.zeros(max_rows, np.int32)
        self._touched = np.zeros(max_rows, np.int64)  # number of tokens whose memory is allocated, by row
        self._tokens = np.zeros((max_rows, 1), np.int64)
        self._numbers = np.arange(max_rows)
        self._total = np.zeros((), np.int32)
        self._logits: Logits = np.empty((max_rows, self.vocabulary), np.float32)
        self._read: Logits = np.empty((1, self.vocabulary), np.float32)
        self._step = self._session.io_binding()
        self._bound = 0
        self._logits.fill(0)  # allocate memory now, and not while the first requests wait
        self._least = 1 if max_rows == 1 or self._same_alone() else 2

    def begin(self) -> None:
        self._length = 0

    def feed(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        n = len(ids)
        self._fit_prompt(self._length + n)
        if len(self._read) < len(wanted):
            self._read = np.empty((power_of_two(len(wanted)), self.vocabulary), np.float32)
        places = np.array(wanted or [0], np.int64)
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": np.array([ids], np.int64),
            "past_lengths": np.array([self._length], np.int32),
            "total": np.array(self._length + n, np.int32),
            "wanted": places,
        }
        binding = self._session.io_binding()
        self._bind(binding, inputs, self._prompt, self._read[: len(places)])
        self._session.run_with_iobinding(binding)
        self._length += n
        return self._read[: len(wanted)]

    def saved(self, start: int, end: int) -> Block:
        return np.stack([cache[0, :, start:end] for cache in self._prompt])

    def restore(self, block: Block) -> None:
        end = self._length + block.shape[2]
        self._fit_prompt(end)
        for cache, values in zip(self._prompt, block):
            cache[0, :, self._length : end] = values
        self._length = end

    def admit(self, reserved: int) -> None:
        growth = reserved - int(self._past[: self.rows].sum())
        if int(self._touched.sum()) + growth > self.max_tokens:
            self._give_back()
        row = self.rows
        for rows, cache in zip(self._maps, self._prompt):
            rows.view[row, :, : self._length] = cache[0, :, : self._length]
        self._past[row] = self._length
        self._touched[row] = max(self._touched[row], self._length)
        self.rows += 1

    def step(self, tokens: Ints) -> Logits:
        rows = max(self.rows, self._least)
        self._past[self.rows : rows] = 0
        if rows != self._bound:
            inputs: dict[str, NDArray[Any]] = {
                "input_ids": self._tokens[:rows],
                "past_lengths": self._past[:rows],
                "total": self._total,
                "wanted": self._numbers[:rows],
            }
            self._step = self._session.io_binding()
            self._bind(self._step, inputs, [cache.view[:rows] for cache in self._maps], self._logits[:rows])
            self._bound = rows
        self._tokens[: self.rows, 0] = tokens
        self._total[...] = int(self._past[:rows].max()) + 1
        self._session.run_with_iobinding(self._step)
        self._past[:rows] += 1
        np.maximum(self._touched[:rows], self._past[:rows], out=self._touched[:rows])
        return self._logits[: self.rows]

    def copy(self, sources: Sequence[int], targets: Sequence[int], begin: int) -> None:
        for source, target in zip(sources, targets):
            end = int(self._past[source])
            for cache in self._maps:
                cache.view[target, :, begin:end] = cache.view[source, :, begin:end]

    def remove(self, gone: Ints) -> Ints:
        order, holes, movers = without(self.rows, gone)
        for to, row in zip(holes, movers):
            length = int(self._past[row])
            for cache in self._maps:
                cache.view[to, :, :length] = cache.view[row, :, :length]
            self._past[to] = length
            self._touched[to] = max(self._touched[to], length)
        self.rows = len(order)
        return order

    def _same_alone(self) -> bool:
        """Return whether a row gets the same bits alone as with other rows: kernels for one row may round differently."""
        self._least = 1
        self.feed([0, 0], [])
        for _ in range(2):
            self.admit(0)
        beside = self.step(np.zeros(2, np.int64))[0].tobytes()
        self.rows = 0
        self.admit(0)
        alone = self.step(np.zeros(1, np.int64))[0].tobytes()
        self.rows = 0
        return bool(alone == beside)

    def _give_back(self) -> None:
        """Release the memory after each row's tokens to the operating system."""
        for row in range(self.max_rows):
            length = int(self._past[row]) if row < self.rows else 0
            if self._touched[row] > length:
                for cache in self._maps:
                    cache.give_back(row, length, int(self._touched[row]))
                self._touched[row] = length

    def _empty_prompt(self, positions: int) -> list[Block]:
        return [np.zeros((1, self._heads, positions, self._size), np.float32) for _ in self._caches]

    def _fit_prompt(self, length: int) -> None:
        if length > self._prompt[0].shape[2]:
            larger = self._empty_prompt(power_of_two(length))
            for to, cache in zip(larger, self._prompt):
                to[:, :, : self._length] = cache[:, :, : self._length]
            self._prompt = larger

    def _bind(
        self, binding: Any, inputs: dict[str, NDArray[Any]], caches: Sequence[NDArray[Any]], logits: Logits
    ) -> None:
        from deploykit.runtime.engines.onnxruntime import bind_array

        for name, array in inputs.items():
            bind_array(binding.bind_input, name, array)
        bind_array(binding.bind_output, "logits", logits)
        for name, cache in zip(self._caches, caches):
            bind_array(binding.bind_input, name, cache)
            bind_array(binding.bind_output, name.replace("past", "present"), cache)


class _RowCaches:
    """Keys or values of one layer: ``view``, float32 [rows, heads, positions, head size], zeros until written."""

    def __init__(self, rows: int, heads: int, positions: int, size: int) -> None:
        self._memory = ReservedArray((rows, heads, positions, size), np.float32)
        self.view: NDArray[np.float32] = self._memory.view

    def give_back(self, row: int, start: int, end: int) -> None:
        """Release the whole pages of a row's positions ``start`` to ``end``; they read as zeros again."""
        _, heads, positions, size = self.view.shape
        for head in range(heads):
            first = (row * heads + head) * positions * size * 4
            self._memory.give_back(first + start * size * 4, first + end * size * 4)
