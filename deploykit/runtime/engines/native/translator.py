"""Run INT8 translators with deploykit's own engine, the C code in ``csrc/``.

Weights are memory-mapped, so all processes that serve a model share them. The keys and values of a row's position are
in the slot that was written at that position, and a table lists the slots of each row. So when beam search drops,
copies or moves rows, it only changes their tables.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.native.loader import open_library
from deploykit.runtime.engines.native.weights import StackStruct, Weights
from deploykit.runtime.engines.numpy_best_tokens import NumpyBestTokens
from deploykit.runtime.engines.protocol import BestTokens, DecodeLimits, SearchState, TokenSelection
from deploykit.runtime.engines.rows import power_of_two, without
from deploykit.runtime.search import Beam, Finished, candidates
from deploykit.runtime.token_selection import select

_SMALL = 8 << 20  # bytes of weights below which the threads of a step would wait longer than they compute
_TOKENS_PER_ENCODE = 256  # enough to read weights rarely, few enough for results to stay in the CPU's caches
_TARGET_BLOCK = 32  # minimum positions of a cache
_LEAST_ROWS = 4
_MOST_BEST, _MOST_BEAMS = 64, 32

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32), ("tokens", c_void_p), ("past", c_void_p), ("slots", c_void_p), ("tables", c_void_p),
        ("cache", c_void_p), ("cache_scale", c_void_p), ("cross", c_void_p), ("source", c_void_p),
        ("table", c_int32), ("cache_slots", c_int32), ("cache_positions", c_int32),
    )  # fmt: skip


class _Selection(ctypes.Structure):
    _fields_ = (
        ("logits", c_void_p), ("forced", c_void_p), ("forbidden", c_void_p), ("begin", c_void_p), ("scored", c_void_p),
        ("before", c_void_p), ("values", c_void_p), ("ids", c_void_p), ("best", c_int32),
    )  # fmt: skip


class _Greedy(ctypes.Structure):
    _fields_ = (
        ("tokens", c_void_p), ("lengths", c_void_p), ("limits", c_void_p), ("sums", c_void_p), ("ends", c_void_p),
        ("stride", c_int64), ("most", c_int32),
    )  # fmt: skip


class _Beam(ctypes.Structure):
    _fields_ = (
        ("scores", c_void_p), ("lengths", c_void_p), ("tokens", c_void_p), ("stride", c_int64), ("length_penalty", c_double),
        ("beams", c_int32), ("max_length", c_int32), ("early_stopping", c_int32), ("finished", c_int32),
        ("improvable", c_int32), ("done", c_int32),
    )  # fmt: skip


class _Search(ctypes.Structure):
    _fields_ = (
        ("tokens", c_void_p), ("lengths", c_void_p), ("sums", c_void_p), ("ends", c_void_p), ("rows", c_void_p),
        ("beams", c_void_p), ("stride", c_int64), ("sentences", c_int32), ("candidates", c_int32), ("most", c_int32),
    )  # fmt: skip


class _HeldBeam:
    """A ``Beam`` in the library's representation."""

    def __init__(self, beam: Beam) -> None:
        g = beam.generation
        self._beam = beam
        self._scores = np.zeros(g.beam_size, np.float32)
        self._lengths = np.zeros(g.beam_size, np.int32)
        self._tokens = np.zeros((g.beam_size, g.max_length), np.int64)
        for i, hypothesis in enumerate(beam.finished):
            length = len(hypothesis.tokens)
            self._scores[i], self._lengths[i], self._tokens[i, :length] = hypothesis.score, length, hypothesis.tokens
        early = {False: 0, True: 1, "never": 2}[g.early_stopping]
        self.struct = _Beam(
            self._scores.ctypes.data, self._lengths.ctypes.data, self._tokens.ctypes.data, g.max_length,
            g.length_penalty, g.beam_size, g.max_length, early, len(beam.finished), beam.improvable,
        )  # fmt: skip

    @property
    def done(self) -> bool:
        return bool(self.struct.done)

    def give_back(self) -> Beam:
        self._beam.finished = [
            Finished(self._tokens[i, : self._lengths[i]].copy(), float(self._scores[i]))
            for i in range(self.struct.finished)
        ]
        self._beam.improvable = bool(self.struct.improvable)
        return self._beam


def _library() -> ctypes.CDLL:
    library = open_library()
    library.deploykit_new.restype = c_void_p
    library.deploykit_new.argtypes = (POINTER(StackStruct), POINTER(StackStruct), ctypes.c_int)
    library.deploykit_encode.argtypes = (c_void_p, c_void_p, c_void_p, ctypes.c_int, c_void_p)
    library.deploykit_projection_share.argtypes = (c_void_p,)
    library.deploykit_projection_share.restype = ctypes.c_double
    library.deploykit_step.argtypes = (c_void_p, POINTER(_Batch), POINTER(_Selection))
    library.deploykit_beams.argtypes = (c_void_p, POINTER(_Batch), POINTER(_Selection), POINTER(_Search))
    library.deploykit_greedy.argtypes = (c_void_p, POINTER(_Batch), POINTER(_Selection), POINTER(_Greedy))
    return library


class NativeModel:
    """The model of ``files[0]`` in ``folder`` on ``threads`` CPU threads, with its running rows. Not for concurrent
    calls.

    Raises EngineError or CorruptArtifactError naming the file that cannot be read.
    """

    pads = False
    limits: DecodeLimits | None = None

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        self._library = _library()
        self._weights = Weights(folder / files[0])
        small = (folder / files[0]).stat().st_size < _SMALL
        # Parallel decoders each read all weights. With large weights, use one decoder's threads first.
        self.rows_of_a_worker = 16 if small else 32
        self._begin(1 if small else threads)

    def side_by_side(self, n: int) -> list[NativeModel]:
        """Return ``n`` models with their own rows, which share this one's threads and weights."""
        models = []
        for _ in range(n):
            model = object.__new__(NativeModel)
            model._library, model._weights = self._library, self._weights
            model._begin(max(1, self._threads // n))
            models.append(model)
        return models

    def _begin(self, threads: int) -> None:
        w = self._weights
        self._threads = threads
        self.vocabulary = w.vocabulary
        self._layers, self._heads = w.decoder.layers, w.decoder.heads
        self._head_size = -(-w.decoder.head_size // 16) * 16
        self._context = self._library.deploykit_new(byref(w.encoder), byref(w.decoder), threads)
        if not self._context:
            raise EngineError("there is not enough memory for another model", "close other programs")
        self.rows = 0
        self._capacity = self._positions = 0
        self._batch, self._choice, self._greedy, self._search = _Batch(), _Selection(), _Greedy(), _Search()
        self._held = np.zeros(0, np.uint64)
        self._selection_of: TokenSelection | None = None
        self._changed = 0
        self._chosen = np.empty((0, 1), np.float32), np.empty((0, 1), np.int64)
        self._state_of: SearchState | None = None
        self._rows_of: Ints | None = None
        self._tokens = np.zeros(0, np.int64)
        self._past = self._slots = self._source = np.zeros(0, np.int32)
        self._free: list[int] = []
        self._tables = np.zeros((0, 0), np.int32)
        self._addresses = np.zeros(0, np.uint64)
        self._texts: list[NDArray[np.uint8]] = []
        self._cache = np.zeros((2 * self._layers, 0, self._heads, 0, self._head_size), np.int8)
        self._scales = np.zeros(self._cache.shape[:-1], np.float32)
        self._logits = np.zeros((0, self.vocabulary), np.float32)
        self.reserve(_LEAST_ROWS, 1)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.deploykit_free(self._context)
            self._context = None

    @property
    def projection_share(self) -> float:
        """Share of the steps' time, 0 to 1, spent in output projection and token selection."""
        return float(self._library.deploykit_projection_share(self._context))

    @property
    def best(self) -> BestTokens:
        """Selects the best tokens of logits that Python has changed."""
        return NumpyBestTokens()

    def encode(self, token_ids: Sequence[Sequence[int]]) -> list[NDArray[np.uint8]]:
        """Encode texts. Returns the cross-attention keys and values of each, in the library's own layout."""
        heads = 2 * self._layers * self._heads
        # The library processes 16 keys at a time.
        texts = [np.empty(heads * (-(-len(ids) // 16) * 16) * (self._head_size + 4), np.uint8) for ids in token_ids]
        first = 0
        while first < len(texts):
            last, tokens = first + 1, len(token_ids[first])
            while last < len(texts) and tokens + len(token_ids[last]) <= _TOKENS_PER_ENCODE:
                tokens += len(token_ids[last])
                last += 1
            part = token_ids[first:last]
            ids = np.fromiter((i for text in part for i in text), np.int64, tokens)
            self._check(ids, self._weights.source_vocabulary, max(map(len, part)), self._weights.longest[0])
            starts = np.zeros(len(part) + 1, np.int32)
            np.cumsum([len(text) for text in part], out=starts[1:])
            addresses = np.array([text.ctypes.data for text in texts[first:last]], np.uint64)
            self._done(
                self._library.deploykit_encode(
                    self._context, ids.ctypes.data, starts.ctypes.data, len(part), addresses.ctypes.data
                )
            )
            first = last
        return texts

    def reserve(self, rows: int, source: int) -> None:
        """Reserve memory for ``rows`` rows in all. It is kept while the model lives."""
        if rows > self._capacity:
            self._grow(power_of_two(rows, _LEAST_ROWS), max(self._positions, _TARGET_BLOCK))

    def admit(self, cross: Sequence[NDArray[np.uint8]], lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for the i-th encoded text, of ``lengths[i]`` tokens, ``copies[i]`` rows that attend to
        it."""
        first, last = self.rows, self.rows + sum(copies)
        self.reserve(last, max(lengths))
        rows = slice(first, last)
        self._texts += [text for text, n in zip(cross, copies) for _ in range(n)]
        self._slots[rows] = [self._free.pop() for _ in range(last - first)]
        self._addresses[rows] = np.repeat([text.ctypes.data for text in cross], copies)
        self._source[rows] = np.repeat(lengths, copies)
        self._past[rows] = 0
        self.rows = last

    def replace(self, rows: Ints, cross: Sequence[NDArray[np.uint8]], lengths: Sequence[int]) -> None:
        """Reuse ``rows``, whose texts are done, for new encoded texts of ``lengths`` tokens."""
        for row, text in zip(rows.tolist(), cross):
            self._texts[row] = text
        self._addresses[rows] = [text.ctypes.data for text in cross]
        self._source[rows] = lengths
        self._past[rows] = 0

    def step(self, tokens: Ints) -> Floats:
        """Feed each row its next token. Returns logits, float32 [rows, vocabulary].

        The array belongs to the model: the next step overwrites it. The caller may change it.
        """
        self._choice, self._selection_of = _Selection(logits=self._room_for_logits().ctypes.data), None
        self._step(tokens)
        return self._logits[: self.rows]

    def _room_for_logits(self) -> Floats:
        if len(self._logits) < self.rows:
            self._logits = np.empty((self._capacity, self.vocabulary), np.float32)
        return self._logits

    def choose(self, tokens: Ints, selection: TokenSelection) -> tuple[Floats, Ints]:
        """Feed each row its next token, and apply ``select`` to the logits. Returns its result."""
        if selection.best > _MOST_BEST:
            return select(self.step(tokens), selection, self.best)
        values, ids = self._prepare_selection(selection)
        if not selection.penalties:
            self._step(tokens)
            return values, ids
        # The library has no penalties. It computes every row, so that the scores of other rows are the same bits as without penalties.
        self._choice.logits, self._selection_of = self._room_for_logits().ctypes.data, None
        self._step(tokens)
        rows = sorted({row for row, _, _ in selection.penalties})
        values[rows], ids[rows] = select(self._logits[rows], selection.of_rows(rows), self.best)
        return values, ids

    def run_greedily(self, state: SearchState, selection: TokenSelection, most: int) -> int:
        """Append tokens to all rows until one row ends, in at most ``most`` steps.

        Returns the number of steps.
        """
        if self._state_of is not state:
            self._state_of = state
            self._greedy = _Greedy(
                state.tokens.ctypes.data, state.lengths.ctypes.data, state.limits.ctypes.data, state.sums.ctypes.data,
                state.ends.ctypes.data, state.tokens.shape[1],
            )  # fmt: skip
        self._greedy.most = self._prepare_steps(state, selection, most)
        return self._done(
            self._library.deploykit_greedy(self._context, byref(self._batch), byref(self._choice), byref(self._greedy))
        )

    def hold_beam(self, beam: Beam) -> _HeldBeam | None:
        """Take over ``beam`` for ``run_beams``; None if it is too wide."""
        wide = beam.beams > _MOST_BEAMS or candidates(beam.beams, beam.eos_token_ids) > _MOST_BEST
        return None if wide else _HeldBeam(beam)

    def run_beams(
        self, state: SearchState, selection: TokenSelection, rows: Ints, beams: Sequence[_HeldBeam], most: int
    ) -> int:
        """Run beam search until one of the ``beams`` is done, in at most ``most`` steps. Returns the number of steps.

        ``rows``, [sentences, beams], are the hypotheses of each sentence, best first; they are updated.
        """
        if self._rows_of is not rows:
            self._rows_of = rows
            self._held = np.array([ctypes.addressof(beam.struct) for beam in beams], np.uint64)
            self._search = _Search(
                state.tokens.ctypes.data, state.lengths.ctypes.data, state.sums.ctypes.data, state.ends.ctypes.data,
                rows.ctypes.data, self._held.ctypes.data, state.tokens.shape[1], len(rows),
                candidates(rows.shape[1], np.flatnonzero(state.ends).tolist()),
            )  # fmt: skip
        self._search.most = self._prepare_steps(state, selection, most)
        return self._done(
            self._library.deploykit_beams(self._context, byref(self._batch), byref(self._choice), byref(self._search))
        )

    def _prepare_steps(self, state: SearchState, selection: TokenSelection, most: int) -> int:
        """Prepare the rows of ``state`` for at most ``most`` steps. Returns the number of steps that there is room
        for."""
        self._prepare_selection(selection)
        rows = self.rows
        return self._set_tokens(state.tokens[np.arange(rows), state.lengths[:rows] - 1], most)

    def _set_tokens(self, tokens: Ints, most: int) -> int:
        """Set each row's next token. Returns the number of steps, at most ``most``, that there is room for."""
        rows = self._batch.rows = self.rows
        past = int(self._past[:rows].max())
        if past >= self._positions:
            self._grow(self._capacity, 2 * self._positions)
        most = min(most, self._positions - past)
        self._tokens[:rows] = tokens
        self._check(self._tokens[:rows], self.vocabulary, past + most, self._weights.longest[1])
        return most

    def _prepare_selection(self, selection: TokenSelection) -> tuple[Floats, Ints]:
        """Return the arrays for the tokens that the library selects. They are valid until the next step."""
        # Avoid taking addresses of arrays again: that takes longer than a small layer.
        if self._selection_of is not selection or selection.changed != self._changed:
            values = np.empty((self.rows, selection.best), np.float32)
            ids = np.empty((self.rows, selection.best), np.int64)
            self._selection_of, self._changed, self._chosen = selection, selection.changed, (values, ids)
            self._choice = _Selection(
                None, selection.forced.ctypes.data, selection.forbidden.ctypes.data, selection.begin.ctypes.data,
                selection.scored.ctypes.data, selection.before.ctypes.data, values.ctypes.data, ids.ctypes.data, selection.best,
            )  # fmt: skip
        return self._chosen

    def _step(self, tokens: Ints) -> None:
        self._set_tokens(tokens, 1)
        self._done(self._library.deploykit_step(self._context, byref(self._batch), byref(self._choice)))
        self._past[: self.rows] += 1

    def copy(self, sources: Ints, targets: Ints, begin: int) -> None:
        """Copy the state of the rows ``sources`` to the rows ``targets`` of the same texts."""
        self._tables[targets] = self._tables[sources]
        self._past[targets] = self._past[sources]

    def remove(self, gone: Ints) -> Ints:
        """Remove the rows ``gone``; the last rows move into their places. Returns the former number of each row
        left."""
        order, holes, movers = without(self.rows, gone)
        self._free += self._slots[gone].tolist()
        for array in (self._tables, self._past, self._slots, self._source, self._addresses):
            array[holes] = array[movers]
        for hole, mover in zip(holes, movers):
            self._texts[hole] = self._texts[mover]
        del self._texts[len(order) :]
        self.rows = len(order)
        return order

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Return the memory of the caches of ``rows`` rows with that many target and source tokens, in bytes."""
        positions = power_of_two(rows, _LEAST_ROWS) * power_of_two(target, _TARGET_BLOCK) + rows * (source + 15)
        return int(positions * 2 * self._layers * self._heads * (self._head_size + 4))

    def _grow(self, capacity: int, positions: int) -> None:
        rows, held = self.rows, self._positions
        old, scales, tables = self._cache, self._scales, self._tables
        shape = (2 * self._layers, capacity, self._heads, positions, self._head_size)
        self._cache, self._scales = np.zeros(shape, np.int8), np.zeros(shape[:-1], np.float32)
        self._tables = np.zeros((capacity, positions), np.int32)
        if rows:
            self._cache[:, : self._capacity, :, :held] = old
            self._scales[:, : self._capacity, :, :held] = scales
        self._tables[:rows, :held] = tables[:rows]
        for name in ("_tokens", "_past", "_slots", "_source", "_addresses"):
            array = getattr(self, name)
            grown = np.zeros(capacity, array.dtype)
            grown[:rows] = array[:rows]
            setattr(self, name, grown)
        self._free += range(self._capacity, capacity)
        self._capacity, self._positions = capacity, positions
        self._batch = _Batch(
            rows, self._tokens.ctypes.data, self._past.ctypes.data, self._slots.ctypes.data, self._tables.ctypes.data,
            self._cache.ctypes.data, self._scales.ctypes.data, self._addresses.ctypes.data, self._source.ctypes.data,
            positions, capacity, positions,
        )  # fmt: skip

    @staticmethod
    def _check(ids: Ints, vocabulary: int, length: int, longest: int | None) -> None:
        """Check token ids and lengths, because the library does not."""
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise EngineError(f"a token is not one of the model's {vocabulary}", "export the model again")
        if longest is not None and length > longest:
            raise EngineError(f"the model knows {longest} positions, not {length}", "give shorter texts")

    @staticmethod
    def _done(steps: int) -> int:
        if not steps:
            raise EngineError(
                "there is not enough memory for this batch", "lower --max-num-seqs, or close other programs"
            )
        return steps
