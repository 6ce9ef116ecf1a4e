"""Run language models with deploykit's own engine, the C code in ``csrc/``.

A row has a slot of the caches: address space for the longest text, whose pages are allocated as tokens arrive. The prompt
area is a slot too, and becomes the slot of the first row that is admitted with it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_void_p
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.causal_lm import MAX_ROWS, Logits, Part, cached_tokens
from deploykit.runtime.engines.native.causal_weights import CausalBatchStruct, CausalModelStruct, CausalWeights
from deploykit.runtime.engines.native.loader import open_library
from deploykit.runtime.engines.reserved_memory import ReservedArray
from deploykit.runtime.engines.rows import Ints, power_of_two, without

_TOGETHER = 16
"""Positions whose keys are stored together."""
_LEAST_ROTATIONS = 512
_READ = 512
"""Maximum number of prompt tokens that are computed at once."""


@dataclass(eq=False)
class _Area:
    """A prompt area: a slot, and the number of tokens in it. ``admitted``: the slot belongs to a row."""

    slot: int
    length: int = 0
    admitted: bool = False


Block = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Keys of whole groups of 16 positions, and values of some tokens, in the bytes of ``csrc/causal.h``."""


def _library() -> ctypes.CDLL:
    library = open_library()
    library.deploykit_new_causal.restype = c_void_p
    library.deploykit_new_causal.argtypes = (POINTER(CausalModelStruct), ctypes.c_int)
    library.deploykit_free_causal.argtypes = (c_void_p,)
    library.deploykit_free_causal.restype = None
    library.deploykit_tokens_of_a_step.argtypes = (c_void_p,)
    library.deploykit_step_causal.argtypes = (c_void_p, POINTER(CausalBatchStruct))
    return library


class NativeCausalLm:
    """``CausalLm`` on the engine ``native``. A token's logits depend neither on other rows, nor on the
    parts that a prompt is read in, nor on the number of threads, to the bit.

    ``beside``: bytes of a token in the caches of another model that shares ``max_cache_bytes`` and holds as many tokens."""

    def __init__(
        self,
        file: Path,
        threads: int,
        *,
        context: int,
        max_rows: int = MAX_ROWS,
        max_cache_bytes: int | None = None,
        beside: int = 0,
    ) -> None:
        self._library = _library()
        self._weights = weights = CausalWeights(file)
        self.context = context
        if weights.longest is not None and context > weights.longest:
            raise EngineError(f"{file}: the model knows {weights.longest} positions, not {context}", "export it again")
        self.vocabulary = weights.vocabulary
        key_bytes, value_bytes = weights.head_bytes
        self.token_bytes = weights.token_bytes
        self.max_rows, self.rows = max_rows, 0
        self.max_tokens, self.prefix_tokens = cached_tokens(max_cache_bytes, self.token_bytes + beside, context)
        groups = -(-min(context, max(self.max_tokens, 1)) // _TOGETHER)
        self._longest = groups * _TOGETHER
        slots = (max_rows + 1, weights.layers, weights.key_heads)
        self._caches = [
            ReservedArray((*slots, groups, key_bytes * _TOGETHER), np.uint8),
            ReservedArray((*slots, self._longest, value_bytes), np.uint8),
        ]
        self._keys, self._values = (cache.view for cache in self._caches)
        self._touched = np.zeros(max_rows + 1, np.int64)  # number of tokens whose memory is allocated, by slot
        self._free = list(range(max_rows, 0, -1))
        self.area = _Area(0)
        self._areas = [self.area]
        self._tables: list[NDArray[np.float32]] = []
        self._rotate(min(_LEAST_ROTATIONS, self._longest))
        self._past, self._slots = np.zeros(max_rows, np.int32), np.zeros(max_rows, np.int32)
        self._numbers = np.arange(max_rows, dtype=np.int32)
        self._logits: Logits = np.zeros((max_rows, self.vocabulary), np.float32)
        self._read: Logits = np.empty((1, self.vocabulary), np.float32)
        self._context = self._library.deploykit_new_causal(byref(weights.model), threads)
        if not self._context:
            raise EngineError("there is not enough memory for another model", "close other programs")
        self.tokens_of_a_step: int = self._library.deploykit_tokens_of_a_step(self._context)

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.deploykit_free_causal(self._context)
            self._context = None

    def begin(self) -> None:
        if self.area.admitted:
            self.area.slot, self.area.admitted = self._free.pop(), False
        self.area.length = 0

    def feed(self, ids: Sequence[int], wanted: Sequence[int]) -> Logits:
        if len(self._read) < len(wanted):
            self._read = np.empty((power_of_two(len(wanted)), self.vocabulary), np.float32)
        places = np.array(sorted(wanted), np.int32)
        done, area = 0, self.area
        self._make_room(area.length + len(ids) - int(self._touched[area.slot]))
        for start in range(0, len(ids), _READ):
            part = np.array(ids[start : start + _READ], np.int64)
            here = places[(places >= start) & (places < start + len(part))] - start
            positions = np.arange(area.length, area.length + len(part), dtype=np.int32)
            self._compute(
                part, positions, np.full(len(part), area.slot, np.int32), here, self._read[done : done + len(here)]
            )
            self._read_up_to(area, area.length + len(part))
            done += len(here)
        found = self._read[: len(wanted)]
        return found if places.tolist() == list(wanted) else found[np.searchsorted(places, wanted)]

    def saved(self, start: int, end: int) -> Block:
        groups, slot = slice(start // _TOGETHER, -(-end // _TOGETHER)), self.area.slot
        return self._keys[slot, :, :, groups].copy(), self._values[slot, :, :, start:end].copy()

    def restore(self, block: Block) -> None:
        keys, values = block
        slot, start = self.area.slot, self.area.length
        first, end = start // _TOGETHER, start + values.shape[2]
        self._make_room(end - int(self._touched[slot]))
        self._keys[slot, :, :, first : first + keys.shape[2]] = keys
        self._values[slot, :, :, start:end] = values
        self._read_up_to(self.area, end)

    def _read_up_to(self, area: _Area, end: int) -> None:
        area.length = end
        self._touched[area.slot] = max(self._touched[area.slot], end)

    def admit(self, reserved: int) -> None:
        area = self.area
        slot = self._free.pop() if area.admitted else area.slot
        self._make_room(reserved - int(self._past[: self.rows].sum()))
        if area.admitted:
            self._copy(area.slot, slot, 0, area.length)
        area.admitted = True
        self._slots[self.rows], self._past[self.rows] = slot, area.length
        self.rows += 1

    def step(self, tokens: Ints) -> Logits:
        rows = self.rows
        slots, past, logits = self._slots[:rows], self._past[:rows], self._logits[:rows]
        self._compute(tokens, past, slots, self._numbers[:rows], logits)
        past += 1
        self._touched[slots] = np.maximum(self._touched[slots], past)
        return logits

    def new_area(self) -> _Area:
        area = _Area(self._free.pop())
        self._areas.append(area)
        return area

    def release_others(self) -> None:
        self._free += [area.slot for area in self._areas if area is not self.area and not area.admitted]
        self._areas = [self.area]

    def mix(self, tokens: Sequence[Sequence[int]], parts: Sequence[Part] = ()) -> Logits:
        counts = np.array([len(each) for each in tokens], np.int64)
        slots, past = self._slots[: self.rows], self._past[: self.rows]
        ids = [np.array([token for each in tokens for token in each], np.int64)]
        positions = [np.repeat(past - counts.cumsum() + counts, counts) + np.arange(len(ids[0]))]
        places, total = [np.arange(len(ids[0]))], len(ids[0])
        self._make_room(sum(max(0, area.length + len(some) - int(self._touched[area.slot])) for area, some, _ in parts))
        for area, some, wanted in parts:
            ids.append(np.array(some, np.int64))
            positions.append(np.arange(area.length, area.length + len(some)))
            total += len(some)
            places.append(np.arange(total - wanted, total))
        computed = np.concatenate(places, dtype=np.int32)
        if len(computed) > len(self._logits):
            self._logits = np.empty((power_of_two(len(computed)), self.vocabulary), np.float32)
        logits = self._logits[: len(computed)]
        self._compute(
            np.concatenate(ids),
            np.concatenate(positions, dtype=np.int32),
            np.repeat(
                [*slots, *(part.area.slot for part in parts)], [*counts, *(len(part.ids) for part in parts)]
            ).astype(np.int32),
            computed,
            logits,
        )
        self._touched[slots] = np.maximum(self._touched[slots], past + counts)
        for area, some, _ in parts:
            self._read_up_to(area, area.length + len(some))
        return logits

    def keep(self, counts: Sequence[int]) -> None:
        self._past[: self.rows] += np.array(counts, np.int32)

    def copy(self, sources: Sequence[int], targets: Sequence[int], begin: int) -> None:
        for source, target in zip(sources, targets):
            self._copy(int(self._slots[source]), int(self._slots[target]), begin, int(self._past[source]))

    def remove(self, gone: Ints) -> Ints:
        order, holes, movers = without(self.rows, gone)
        for slot in self._slots[gone].tolist():
            area = next((area for area in self._areas if area.slot == slot), None)
            if area is None:
                self._free.append(slot)
            else:
                area.admitted = False
        for array in (self._slots, self._past):
            array[holes] = array[movers]
        self.rows = len(order)
        return order

    def int8_kernels(self) -> int:
        """Return the number of INT8 and INT4 matrices."""
        return self._weights.quantized_matrices

    def _compute(
        self,
        tokens: Ints,
        positions: NDArray[np.int32],
        slots: NDArray[np.int32],
        places: NDArray[np.int32],
        logits: Logits,
    ) -> None:
        """Check the arguments that the library does not check, and compute. ``logits``: [places, vocabulary]."""
        rows = len(tokens)
        if not rows:
            return
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise EngineError(f"a token is not one of the model's {self.vocabulary}", "export the model again")
        last = int(positions.max())
        if last >= min(self._longest, self._weights.longest or self._longest):
            raise EngineError(
                f"the caches hold {self._longest} tokens of a row", "raise --max-cache-mb, or give shorter texts"
            )
        if self._tables and last >= len(self._tables[0]):
            self._rotate(min(power_of_two(last + 1), self._longest))
        tokens = np.ascontiguousarray(tokens, np.int64)
        batch = CausalBatchStruct(
            rows, len(places), tokens.ctypes.data, positions.ctypes.data, slots.ctypes.data, places.ctypes.data,
            ctypes.addressof(self._rope), self._keys.ctypes.data, self._values.ctypes.data, self._longest, logits.ctypes.data,
        )  # fmt: skip
        if not self._library.deploykit_step_causal(self._context, byref(batch)):
            raise EngineError(
                "there is not enough memory for this batch", "lower --max-num-seqs, or close other programs"
            )

    def _rotate(self, positions: int) -> None:
        """Compute the rotations of the first ``positions``."""
        self._tables = []
        for frequencies, scale in self._weights.ropes:
            angles = (np.arange(positions, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
            self._tables.append(
                np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32) * np.float32(scale)
            )
        self._rope = (c_void_p * max(1, len(self._tables)))(*(table.ctypes.data for table in self._tables))

    def _copy(self, source: int, target: int, begin: int, end: int) -> None:
        groups = slice(begin // _TOGETHER, -(-end // _TOGETHER))
        self._keys[target, :, :, groups] = self._keys[source, :, :, groups]
        self._values[target, :, :, begin:end] = self._values[source, :, :, begin:end]
        self._touched[target] = max(self._touched[target], end)

    def _make_room(self, tokens: int) -> None:
        """Release the memory after each slot's tokens to the system, if ``tokens`` more would exceed the limit."""
        if int(self._touched.sum()) + tokens <= self.max_tokens:
            return
        held = np.zeros(len(self._touched), np.int64)
        for area in self._areas:
            held[area.slot] = area.length
        held[self._slots[: self.rows]] = np.maximum(held[self._slots[: self.rows]], self._past[: self.rows])
        held = -(-held // _TOGETHER) * _TOGETHER
        _, layers, heads, _, value_bytes = self._values.shape
        of_token, regions = (self._keys.shape[-1] // _TOGETHER, value_bytes), layers * heads
        for slot in np.flatnonzero(self._touched > held).tolist():
            for region in range(slot * regions, (slot + 1) * regions):
                for cache, token in zip(self._caches, of_token):
                    first = region * self._longest * token
                    cache.give_back(first + int(held[slot]) * token, first + self._longest * token)
            self._touched[slot] = held[slot]
