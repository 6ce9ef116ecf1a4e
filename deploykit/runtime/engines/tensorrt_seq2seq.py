"""Encoder and decoder of a translation model on TensorRT, with the decoder's rows; their caches stay on the GPU.

The rows in use are the first ones, as in ``Seq2SeqModel``. A step reads the caches from one buffer and writes them,
with the new token's keys and values, to another; the next step goes the other way. (Updating in place would need
outputs that alias inputs, which TensorRT guarantees only for its KVCacheUpdate layers and plugins: ``ICudaEngine``,
"get_aliased_input_tensor".) Only token ids and positions are copied to the GPU, and only logits back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.batching import bucket
from deploykit.runtime.cuda import Buffer, DeviceMemory, Place
from deploykit.runtime.engines.numpy_best_tokens import NumpyBestTokens
from deploykit.runtime.engines.protocol import DecodeLimits, TokenSelection
from deploykit.runtime.engines.rows import without
from deploykit.runtime.engines.tensorrt import EngineProfile, Job, LoadedEngine
from deploykit.runtime.token_selection import select

_TARGET_BLOCK, _SOURCE_BLOCK = 32, 16  # minimum positions of a cache, where profiles allow it
_ALIGNMENT = 256  # of tensor addresses, in bytes

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """Cross-attention keys and values of texts, on the GPU: [texts, 2 x layers, heads, positions, head size].

    The first text is at ``place``; each takes ``size`` bytes. The next ``encode`` overwrites them.
    """

    place: Place
    size: int

    def text(self, number: int) -> Place:
        return Place(self.place.address + number * self.size, self.place.pitch, self.place.height)


@dataclass(frozen=True)
class _Layout:
    """Layout of a cache in a buffer: [2 x layers, lines, positions, head size], with a line for each row and head.

    Some unused lines keep the addresses aligned.
    """

    positions: int
    heads: int
    lines: int
    position_bytes: int

    @classmethod
    def of(cls, positions: int, rows: int, heads: int, position_bytes: int) -> _Layout:
        step = _ALIGNMENT // math.gcd(_ALIGNMENT, positions * position_bytes)
        return cls(positions, heads, -(-rows * heads // step) * step, position_bytes)

    @property
    def pitch(self) -> int:
        return self.positions * self.position_bytes

    @property
    def part(self) -> int:
        """Bytes of the keys, or the values, of one layer."""
        return self.lines * self.pitch

    def place(self, buffer: DeviceMemory, row: int = 0, position: int = 0) -> Place:
        address = buffer.address + row * self.heads * self.pitch + position * self.position_bytes
        return Place(address, self.pitch, self.lines)


class TensorRtSeq2Seq:
    """The engines in ``folder``, encoder and decoder first in ``files``, on GPU ``device``. One caller at a time.

    ``threads`` is ignored. All memory is allocated at the start, for the ``limits``: those of the largest profile.
    Smaller profiles are used where a step fits them. Raises EngineError, CorruptArtifactError or
    MissingDependencyError, with the command that builds the engines again, when they cannot run here.
    """

    pads = True
    rows_of_a_worker = sys.maxsize  # one step of all rows uses a GPU better than several parallel steps
    _self: _Layout  # of the self-attention caches
    _cross: _Layout  # of the cross-attention caches

    def __init__(self, folder: Path, files: Sequence[str], threads: int, device: int = 0) -> None:
        self._given = folder, files, threads, device
        self._encoder = encoder = LoadedEngine(folder / files[0], device)
        self._decoder = decoder = LoadedEngine(folder / files[1], beside=encoder)
        self._gpu, self._stream = encoder.gpu, encoder.stream
        self._parts = [name.removeprefix("past.") for name in decoder.inputs if name.startswith("past.")]
        _, self._heads, _, self._head_size = decoder.shape(f"past.{self._parts[0]}")
        self._position_bytes = self._head_size * decoder.itemsize(f"past.{self._parts[0]}")
        self.vocabulary = decoder.shape("logits")[1]
        self.best = NumpyBestTokens()
        if encoder.shape("cross")[1:4:2] != (len(self._parts), -1):
            raise EngineError(
                f"{encoder.file}: its output does not have the layout of the caches: an older deploykit exported it",
                f"build it again: {encoder.record.rebuild()}",
            )
        if encoder.record.profiles != decoder.record.profiles:
            raise EngineError(
                f"{decoder.file}: has other profiles than {encoder.file.name}",
                f"build both again: {encoder.record.rebuild()}",
            )
        caches = {
            f"{of}.{part}": ("rows", self._heads, axis, self._head_size)
            for part in self._parts
            for of, axis in (("past", "target"), ("cross", "source"))
        }
        self._encoder_profiles = encoder.profiles({"input_ids": ("rows", "source"), "lengths": ("rows",)})
        self._decoder_profiles = decoder.profiles(
            {"input_ids": ("rows", 1), "past_lengths": ("rows",), "source_last": ("rows",), **caches}
        )
        self._widest = self._decoder_profiles[-1]
        self.limits = DecodeLimits(*(self._widest.most(axis) for axis in ("rows", "source", "target")))
        self._allocate()
        self._jobs: dict[tuple[int, ...], Job] = {}
        self.rows = 0
        self._now = 0  # the buffer with the current self-attention caches, 0 or 1
        self._shrink()

    def side_by_side(self, n: int) -> list[TensorRtSeq2Seq]:
        """Return ``n`` models with their own engines and rows."""
        return [TensorRtSeq2Seq(*self._given) for _ in range(n)]

    def encode(self, token_ids: Sequence[Sequence[int]]) -> Encoded:
        """Encode texts. Raises EngineError for more or longer texts than the profiles allow."""
        rows, longest = len(token_ids), max(map(len, token_ids))
        self._check(self._encoder, rows, source=longest)
        self._gpu.enter()
        least, _, most = self._widest.ranges["source"]
        length = min(max(bucket(longest), least), most)
        profile = _smallest(self._encoder_profiles, rows, source=length)
        filled = profile.filled(rows)
        ids = self._ids.view((filled, length), np.int64)
        lengths = self._lengths.view((filled,), np.int32)
        ids[:] = 0
        for row in range(filled):
            tokens = token_ids[min(row, rows - 1)]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        self._encoder.run(self._encoder_job(profile, filled, length))
        self._stream.synchronize()
        pitch = length * self._position_bytes
        return Encoded(Place(self._encoded.address, pitch, self._heads), pitch * self._heads * len(self._parts))

    def reserve(self, rows: int, source: int) -> None:
        """Reserve room for ``rows`` rows in all, with texts of up to ``source`` tokens. It is kept until no row is
        left.

        Raises EngineError if the profiles do not allow it.
        """
        self._check(self._decoder, rows, source=source)
        old, new = self._cross, self._layout("source", source)
        if new.positions <= old.positions:
            return
        self._cross = new
        if self.rows:
            self._gpu.enter()
            cross, spare = self._memory[2], self._memory[1 - self._now]
            width = int(self._source_last[: self.rows].max() + 1) * self._position_bytes
            for places in ((old.place(cross), new.place(spare)), (new.place(spare), new.place(cross))):
                self._stream.copy(*places, width, self.rows * self._heads, len(self._parts))

    def admit(self, cross: Encoded, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """Append empty rows: for the i-th encoded text, of ``lengths[i]`` tokens, ``copies[i]`` rows that attend to it."""
        self.reserve(self.rows + sum(copies), max(lengths))
        self._gpu.enter()
        for text, (length, n) in enumerate(zip(lengths, copies)):
            rows = slice(self.rows, self.rows + n)
            for row in range(rows.start, rows.stop):
                self._copy(cross.text(text), self._cross.place(self._memory[2], row), length)
            self._source_last[rows] = length - 1
            self._past[rows] = 0
            self.rows += n

    def step(self, tokens: Ints) -> Floats:
        """Feed each row its next token. Returns logits, float32 [rows, vocabulary].

        The array belongs to the model: the next step overwrites it. The caller may change it. Raises EngineError for a
        row that is longer than the profiles allow.
        """
        rows = self.rows
        longest = int(self._past[:rows].max()) + 1
        self._check(self._decoder, rows, target=longest)
        self._gpu.enter()
        if longest > self._self.positions:
            self._lengthen(longest)
        self._tokens[:rows, 0] = tokens
        self._past[rows:] = 0  # of padding rows
        axes = {"target": self._self.positions, "source": self._cross.positions}
        profile = _smallest(self._decoder_profiles, rows, **axes)
        self._decoder.run(self._decoder_job(profile, profile.filled(rows)))
        self._stream.synchronize()
        self._now = 1 - self._now
        self._past[:rows] += 1
        logits: Floats = self._logits.view((rows, self.vocabulary), np.float32)
        return logits

    def choose(self, tokens: NDArray[np.int64], selection: TokenSelection) -> tuple[Floats, NDArray[np.int64]]:
        """Feed each row its next token, and apply ``select`` to the logits. Returns its result."""
        return select(self.step(tokens), selection, self.best)

    def copy(self, sources: Ints, targets: Ints, begin: int) -> None:
        """Copy the state of the rows ``sources`` to the rows ``targets`` of the same texts.

        Both share the first ``begin`` positions. No row is in both.
        """
        end, own = int(self._past[sources].max()), self._memory[self._now]
        self._gpu.enter()
        for source, target in zip(sources.tolist(), targets.tolist()):
            self._copy(self._self.place(own, source, begin), self._self.place(own, target, begin), end - begin)
        self._past[targets] = self._past[sources]

    def remove(self, gone: Ints) -> Ints:
        """Remove the rows ``gone``; the last rows move into their places. Returns the former number of each row left."""
        order, holes, movers = without(self.rows, gone)
        own, cross = self._memory[self._now], self._memory[2]
        self._gpu.enter()
        for hole, row in zip(holes.tolist(), movers.tolist()):
            self._copy(self._self.place(own, row), self._self.place(own, hole), int(self._past[row]))
            length = int(self._source_last[row]) + 1
            self._copy(self._cross.place(cross, row), self._cross.place(cross, hole), length)
        self._past[holes] = self._past[movers]
        self._source_last[holes] = self._source_last[movers]
        self.rows = len(order)
        if not self.rows:
            self._shrink()
        return order

    def cache_bytes(self, rows: int, target: int, source: int) -> int:
        """Return 0: all cache memory is allocated at the start."""
        return 0

    def _allocate(self) -> None:
        gpu, rows = self._gpu, self.limits.rows
        gpu.enter()
        layouts = (
            self._layout(axis, positions)
            for axis in ("target", "source")
            for positions in range(1, self._widest.most(axis) + 1)
        )
        size = len(self._parts) * max(layout.part for layout in layouts)
        # Two for self-attention caches, one for cross-attention caches.
        self._memory = [DeviceMemory(gpu, size) for _ in range(3)]
        for memory in self._memory:
            self._stream.clear(memory)  # graphs multiply masked values by 0, so they must be finite
        source = self.limits.source
        self._ids, self._lengths = Buffer(gpu, rows * source * 8), Buffer(gpu, rows * 4)
        self._encoded = DeviceMemory(gpu, rows * source * self._heads * self._position_bytes * len(self._parts))
        self._tokens_buffer, self._logits = Buffer(gpu, rows * 8), Buffer(gpu, rows * self.vocabulary * 4)
        self._past_buffer, self._source_last_buffer = Buffer(gpu, rows * 4), Buffer(gpu, rows * 4)
        self._tokens = self._tokens_buffer.view((rows, 1), np.int64)
        self._past = self._past_buffer.view((rows,), np.int32)
        self._source_last = self._source_last_buffer.view((rows,), np.int32)
        for array in (self._tokens, self._past, self._source_last):
            array[:] = 0

    def _shrink(self) -> None:
        """Shrink the caches to as few positions as possible: a step computes all of them."""
        self._self, self._cross = self._layout("target", 1), self._layout("source", 1)

    def _layout(self, axis: str, positions: int) -> _Layout:
        """Return the layout of caches with room for ``positions``. Lengths double, because growing means copying."""
        block = _TARGET_BLOCK if axis == "target" else _SOURCE_BLOCK
        least, _, most = self._widest.ranges[axis]
        padded = min(max(block << (-(-positions // block) - 1).bit_length(), least), most)
        return _Layout.of(padded, self.limits.rows, self._heads, self._position_bytes)

    def _lengthen(self, positions: int) -> None:
        """Move the self-attention caches to the other buffer, with room for ``positions``."""
        new = self._layout("target", positions)
        places = self._self.place(self._memory[self._now]), new.place(self._memory[1 - self._now])
        width = int(self._past[: self.rows].max()) * self._position_bytes
        self._stream.copy(*places, width, self.rows * self._heads, len(self._parts))
        self._self, self._now = new, 1 - self._now

    def _copy(self, source: Place, target: Place, positions: int) -> None:
        """Copy keys and values of one row, for all layers and heads."""
        if positions > 0:
            self._stream.copy(source, target, positions * self._position_bytes, self._heads, len(self._parts))

    def _check(self, engine: LoadedEngine, rows: int, source: int = 0, target: int = 0) -> None:
        """Raise EngineError for a batch that the profiles do not allow."""
        for what, axis, n, most in (
            ("rows at once", "batch", rows, self.limits.rows),
            ("tokens of a text", "length", source, self.limits.source),
            ("tokens of a translation", "past", target, self.limits.target),
        ):
            if n > most:
                raise engine.too_long(f"{n} {what}", f"a larger {axis} in --maxShapes")

    def _encoder_job(self, profile: EngineProfile, rows: int, length: int) -> Job:
        key = (profile.number, rows, length)
        if key not in self._jobs:
            self._jobs[key] = Job(
                profile.number,
                {"input_ids": (rows, length), "lengths": (rows,)},
                {"input_ids": self._ids.address, "lengths": self._lengths.address, "cross": self._encoded.address},
                [(self._ids, rows * length * 8), (self._lengths, rows * 4)],
                [],
                f"{rows} texts of {length} tokens",
            )
        return self._jobs[key]

    def _decoder_job(self, profile: EngineProfile, rows: int) -> Job:
        own, cross, now = self._self, self._cross, self._now
        key = (profile.number, rows, own.positions, cross.positions, now)
        if key not in self._jobs:
            small = {
                "input_ids": (self._tokens_buffer, (rows, 1), 8),
                "past_lengths": (self._past_buffer, (rows,), 4),
                "source_last": (self._source_last_buffer, (rows,), 4),
            }
            shapes: dict[str, tuple[int, ...]] = {name: shape for name, (_, shape, _) in small.items()}
            addresses = {name: buffer.address for name, (buffer, _, _) in small.items()}
            addresses["logits"] = self._logits.address
            for i, part in enumerate(self._parts):
                shapes[f"past.{part}"] = (rows, self._heads, own.positions, self._head_size)
                shapes[f"cross.{part}"] = (rows, self._heads, cross.positions, self._head_size)
                addresses[f"past.{part}"] = self._memory[now].address + i * own.part
                addresses[f"present.{part}"] = self._memory[1 - now].address + i * own.part
                addresses[f"cross.{part}"] = self._memory[2].address + i * cross.part
            self._jobs[key] = Job(
                profile.number,
                shapes,
                addresses,
                [(buffer, rows * size) for buffer, _, size in small.values()],
                [(self._logits, rows * self.vocabulary * 4)],
                f"a step of {rows} rows, {own.positions} positions and texts of {cross.positions}",
                lane=now,
            )
        return self._jobs[key]


def _smallest(profiles: Sequence[EngineProfile], rows: int, **axes: int) -> EngineProfile:
    """Return the first of ``profiles``, sorted by size, that allows at least ``rows`` rows of that shape."""
    return next(profile for profile in profiles if profile.takes(**axes) and rows <= profile.most("rows"))
