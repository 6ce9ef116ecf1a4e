"""Encoder and decoder of a translation model on ONNX Runtime, with the decoder's rows and their caches.

The decoder's state is a list of rows ("slots"), each a hypothesis at its own position. Keys and values are in
preallocated buffers that the graph appends to in place. When a row leaves, the last row takes its place, so that the
rows in use are always the first ones and a step computes only these.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.runtime.engines.best_tokens import BestTokens
from deploykit.runtime.engines.onnxruntime import bind_array, open_session, session_options
from deploykit.runtime.engines.protocol import TokenSelection
from deploykit.runtime.engines.rows import power_of_two, without
from deploykit.runtime.token_selection import select

_TARGET_BLOCK, _SOURCE_BLOCK = 32, 16  # minimum positions of a cache
_LEAST_ROWS = 4
_KINDS: dict[str, type[np.number[Any]]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}

# Measured with 2 threads and models from 1 to 52 MB. Below _SMALL bytes read per step, one thread is as fast as two.
# With at least these numbers of rows, several decoders with one thread each are faster than threads within a step.
_SMALL = 5 << 20
_ROWS_OF_A_WORKER, _ROWS_OF_A_SMALL_WORKER = 16, 4

CROSS_SCALES = "deploykit.cross_scales"
"""Key of the encoder's metadata with the scales of an INT8 output: JSON, [2 x layers]."""

Floats = NDArray[np.float32]


def cache_names(layers: int) -> list[str]:
    """Return the names of the caches' ranges: layer by layer, key before value."""
    return [f"caches.{i}.{of}_{part}" for i in range(layers) for of in ("self", "cross") for part in ("key", "value")]


class _Cache:
    """Keys and values of all layers, of type ``kind``: [2 x layers, rows, heads, positions, head size].

    ``view`` is a view of storage that grows and is never released while the model lives. All its values are finite,
    because graphs of standard ONNX multiply masked values by 0.
    """

    def __init__(self, layers: int, heads: int, head_size: int, block: int, kind: type[np.number[Any]]) -> None:
        self._layers, self._heads, self._head_size, self._block = layers, heads, head_size, block
        self._storage = np.zeros(0, kind)
        self.view: NDArray[Any] = np.zeros((2 * layers, 0, heads, 0, head_size), kind)

    @property
    def positions(self) -> int:
        return self.view.shape[3]

    def padded(self, positions: int) -> int:
        """Return the allocated length for ``positions``: it doubles, because growing means copying."""
        return self._block * power_of_two(-(-positions // self._block))

    def fit(self, capacity: int, positions: int, kept: int) -> bool:
        """Make room for ``capacity`` rows of ``positions``, keeping the first ``kept`` rows. True if the view
        changed."""
        positions = self.padded(positions)
        if kept:
            positions = max(positions, self.positions)
        if self.view.shape[1] == capacity and self.positions == positions:
            return False
        shape = (2 * self._layers, capacity, self._heads, positions, self._head_size)
        size = int(np.prod(shape))
        old = self.view
        storage = self._storage
        if kept or storage.size < size:
            storage = np.zeros(size, storage.dtype)
        self.view = storage[:size].reshape(shape)
        if kept:
            self.view[:, :kept, :, : old.shape[3]] = old[:, :kept]
        self._storage = storage
        return True


class Seq2SeqModel:
    """The graphs of one precision in ``folder``, on ``threads`` CPU threads. One caller at a time.

    ``files`` are the encoder, the decoder, and the weights of both. Graphs of standard ONNX run too, more slowly.
    Raises EngineError naming the file that ONNX Runtime cannot load.
    """

    limits = None
    pads = True

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        self._paths = tuple(folder / file for file in files[:2])
        small = sum((folder / file).stat().st_size for file in files[1:] if (folder / file).exists()) < _SMALL
        self.rows_of_a_worker = _ROWS_OF_A_SMALL_WORKER if small else _ROWS_OF_A_WORKER
        self._threads = 1 if small else threads
        self._begin(self._open(self._threads))

    def side_by_side(self, n: int) -> list[Seq2SeqModel]:
        """Return ``n`` models with their own rows, which share this one's threads and one copy of the graphs."""
        threads = max(1, self._threads // n)
        sessions = (self._encoder, self._decoder) if threads == self._threads else self._open(threads)
        models = []
        for _ in range(n):
            model = copy.copy(self)
            model._threads = threads
            model._begin(sessions)
            models.append(model)
        return models

    def _open(self, threads: int) -> tuple[ort.InferenceSession, ...]:
        # Threads spin within a step: they synchronize a hundred times, and waking up would take longer than computing.
        # The fusion is disabled because the separate nodes are faster.
        return tuple(
            open_session(path, session_options(threads, spin=True), disabled_optimizers=["SkipLayerNormFusion"])
            for path in self._paths
        )

    def _begin(self, sessions: tuple[ort.InferenceSession, ...]) -> None:
        self._encoder, self._decoder = sessions
        self._inputs = {i.name: i.type for i in self._decoder.get_inputs()}
        self.best = BestTokens(self._threads)
        outputs = {o.name: o.shape for o in self._decoder.get_outputs()}
        self._layers = sum(name.startswith("present.") for name in outputs) // 2
        _, self._heads, _, self._head_size = outputs["present.0.key"]
        self.vocabulary = int(outputs["logits"][1])
        kind = _KINDS[self._inputs["past.0.key"]]
        metadata = self._encoder.get_modelmeta().custom_metadata_map
        self._cross_scales = np.array(json.loads(metadata.get(CROSS_SCALES, "1.0")), np.float32).reshape(-1, 1)
        self._self = _Cache(self._layers, self._heads, self._head_size, _TARGET_BLOCK, kind)
        self._cross = _Cache(self._layers, self._heads, self._head_size, _SOURCE_BLOCK, kind)
        self._binding = self._decoder.io_binding()
        self._bound = (0, 0, 0)
        self._total = np.zeros((), np.int32)
        self._source_total = np.zeros((), np.int32)
        self.rows = 0
        self._capacity = 0
        self._past = self._source_last = np.zeros(0, np.int32)
        self._last: Floats = np.zeros((2 * self._layers, 0, 1, self._heads * self._head_size), np.float32)
        self.reserve(_LEAST_ROWS, 1)

    def encode(self, token_ids: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Return cross-attention keys and values, of the caches' type: [texts, longest, 2 x layers, heads, head
        size]."""
        longest = max(map(len, token_ids))
        ids = np.zeros((len(token_ids), longest), np.int64)
        for row, tokens in enumerate(token_ids):
            ids[row, : len(tokens)] = tokens
        lengths = np.fromiter(map(len, token_ids), np.int32, len(token_ids))
        cross: NDArray[Any] = self._encoder.run(["cross"], {"input_ids": ids, "lengths": lengths})[0]
        if cross.ndim == 5:  # standard ONNX uses the layout of the caches
            return cross.transpose(0, 3, 1, 2, 4)
        return cross.reshape(*ids.shape, 2 * self._layers, self._heads, self._head_size)

    def reserve(self, rows: int, source: int) -> None:
        """Reserve memory for ``rows`` rows in all, with texts of up to ``source`` tokens. It is kept until no row is
        left.
        """
        if self.rows == 0:
            self._capacity = 0
        grown = rows > self._capacity
        if grown:
            self._capacity = power_of_two(rows, _LEAST_ROWS)
        source = max(source, int(self._source_last[: self.rows].max()) + 1 if self.rows else 1)
        target = int(self._past[: self.rows].max()) + 1 if self.rows else 1
        moved = self._self.fit(self._capacity, target, self.rows) | self._cross.fit(self._capacity, source, self.rows)
        if grown and (self.rows or self._capacity > len(self._past)):
            self._grow_rows()
        if moved or grown:
            self._bound = (0, 0, 0)

    def admit(self, cross: NDArray[Any], lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for the i-th encoded text, of ``lengths[i]`` tokens, ``copies[i]`` rows that attend to
        it."""
        self.reserve(self.rows + sum(copies), max(lengths))
        for text, (length, n) in enumerate(zip(lengths, copies)):
            rows = slice(self.rows, self.rows + n)
            self._cross.view[:, rows, :, :length] = cross[text, :length].transpose(1, 2, 0, 3)[:, None]
            end = cross[text, length - 1].reshape(2 * self._layers, -1) * self._cross_scales
            self._last[:, rows, 0] = end[:, None]
            self._source_last[rows] = length - 1
            self._past[rows] = 0
            self.rows += n

    def step(self, tokens: NDArray[np.int64]) -> Floats:
        """Feed each row its next token. Returns logits, float32 [rows, vocabulary].

        The array belongs to the model: the next step overwrites it. The caller may change it.
        """
        rows = self.rows
        longest = int(self._past[:rows].max()) + 1
        if longest > self._self.positions:
            self._self.fit(self._capacity, longest, rows)
            self._bound = (0, 0, 0)
        self._tokens[:rows, 0] = tokens
        self._total[...] = longest
        if self._bound != (rows, self._self.positions, self._cross.positions):
            self._bind()
        self._decoder.run_with_iobinding(self._binding)
        self._past[:rows] += 1
        return self._logits[:rows]

    def choose(self, tokens: NDArray[np.int64], selection: TokenSelection) -> tuple[Floats, NDArray[np.int64]]:
        """Feed each row its next token, and apply ``select`` to the logits. Returns its result."""
        return select(self.step(tokens), selection, self.best)

    def copy(self, sources: NDArray[np.int64], targets: NDArray[np.int64], begin: int) -> None:
        """Copy the state of the rows ``sources`` to the rows ``targets`` of the same texts.

        Both share the first ``begin`` positions. No row is in both.
        """
        end, view = int(self._past[sources].max()), self._self.view
        view[:, targets, :, begin:end] = view[:, sources, :, begin:end]
        self._past[targets] = self._past[sources]

    def remove(self, gone: NDArray[np.int64]) -> NDArray[np.int64]:
        """Remove the rows ``gone``; the last rows move into their places. Returns the former number of each row
        left."""
        order, holes, movers = without(self.rows, gone)
        if len(movers):
            target, source = int(self._past[movers].max()), int(self._source_last[movers].max()) + 1
            for to, row in zip(holes, movers):
                self._self.view[:, to, :, :target] = self._self.view[:, row, :, :target]
                self._cross.view[:, to, :, :source] = self._cross.view[:, row, :, :source]
            self._last[:, holes] = self._last[:, movers]
            self._past[holes] = self._past[movers]
            self._source_last[holes] = self._source_last[movers]
        self.rows = len(order)
        return order

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Return the memory of the caches of ``rows`` rows with that many target and source tokens, in bytes."""
        positions = self._self.padded(target) + self._cross.padded(source)
        values = power_of_two(rows, _LEAST_ROWS) * positions * 2 * self._layers * self._heads * self._head_size
        return int(values * self._self.view.itemsize)

    def _grow_rows(self) -> None:
        n, width, rows = self._capacity, self._heads * self._head_size, self.rows
        past, source_last, last = self._past, self._source_last, self._last
        self._tokens = np.zeros((n, 1), np.int64)
        self._past, self._source_last = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self._last = np.zeros((2 * self._layers, n, 1, width), np.float32)
        self._logits = np.empty((n, self.vocabulary), np.float32)
        self._past[:rows], self._source_last[:rows], self._last[:, :rows] = (
            past[:rows],
            source_last[:rows],
            last[:, :rows],
        )

    def _bind(self) -> None:
        """Bind the graph's inputs and outputs to the buffers. Needed again only when a shape changes."""
        binding, rows = self._binding, self.rows
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        self._source_total[...] = self._cross.positions
        inputs: dict[str, NDArray[Any]] = {
            "input_ids": self._tokens[:rows],
            "past_lengths": self._past[:rows],
            "total": self._total,
            "source_last": self._source_last[:rows],
            "source_total": self._source_total,
        }
        for layer in range(self._layers):
            for j, part in enumerate(("key", "value")):
                own, cross = self._self.view[2 * layer + j, :rows], self._cross.view[2 * layer + j, :rows]
                inputs[f"past.{layer}.{part}"] = own
                # In place in standard ONNX too: its Where node has read the past before it writes.
                bind_array(binding.bind_output, f"present.{layer}.{part}", own)
                inputs[f"cross.{layer}.{part}"] = cross
                if (last := f"cross.{layer}.last_{part}") in self._inputs:
                    inputs[last] = self._last[2 * layer + j, :rows]
                    bind_array(binding.bind_output, f"cross_present.{layer}.{part}", cross)
        for name in self._inputs:
            bind_array(binding.bind_input, name, inputs[name])
        bind_array(binding.bind_output, "logits", self._logits[:rows])
        self._bound = (rows, self._self.positions, self._cross.positions)
