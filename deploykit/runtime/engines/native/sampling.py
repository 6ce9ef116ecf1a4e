"""Mask and penalize logits, and sample tokens, with the library of the engine ``native``, for the logits of any engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploykit.runtime.engines.native.loader import lacks, open_library
from deploykit.runtime.engines.protocol import Floats

Mask = Callable[[Floats, NDArray[np.uint8]], Floats]
Draw = Callable[[Floats, float, int, float, float, float, float], int]


class PenalizedTokens(ctypes.Structure):
    """The tokens whose logits change, and how; see ``PenalizedTokens`` in sample.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("biased", "seen", "answered", "bias", "counts", "before")),
        *((name, ctypes.c_int32) for name in ("biased_count", "seen_count", "answered_count")),
        *((name, ctypes.c_float) for name in ("repetition", "presence", "frequency")),
    )


class NativePenalties(NamedTuple):
    """Functions that change logits, float32 [vocabulary], contiguous, in place, and change them back. All tokens must be in the
    vocabulary."""

    apply: Callable[[Floats, PenalizedTokens], None]
    undo: Callable[[Floats, PenalizedTokens], None]


@cache
def _library() -> ctypes.PyDLL | None:
    # A call takes microseconds: waiting for Python's lock after it would take longer. It also guards the memory.
    return None if lacks() is not None else ctypes.PyDLL(open_library()._name)


@cache
def native_mask() -> Mask | None:
    """Return a function that masks logits, or None where the library does not run.

    It takes logits, float32 [vocabulary], and a bit for each token, uint8, the lowest of a byte first. It
    returns a copy of the logits with -inf where the bit is 0, or there is none.
    """
    library = _library()
    if library is None:
        return None
    library.deploykit_mask.argtypes = (
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_void_p,
    )
    library.deploykit_mask.restype = None

    def mask(logits: Floats, allowed: NDArray[np.uint8]) -> Floats:
        logits = np.ascontiguousarray(logits, np.float32)
        masked = np.empty_like(logits)
        library.deploykit_mask(logits.ctypes.data, len(logits), allowed.ctypes.data, len(allowed), masked.ctypes.data)
        return masked

    return mask


@cache
def native_penalties() -> NativePenalties | None:
    """Return the functions of ``NativePenalties``, or None where the library does not run."""
    library = _library()
    if library is None:
        return None

    def of(function: Any) -> Callable[[Floats, PenalizedTokens], None]:
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.POINTER(PenalizedTokens)), None
        return lambda logits, tokens: function(logits.ctypes.data, tokens)

    return NativePenalties(of(library.deploykit_penalize), of(library.deploykit_unpenalize))


@cache
def native_draw() -> Draw | None:
    """Return a function that samples a token, or None if the library does not run here.

    It takes logits, float32 [vocabulary], temperature, top_k (0: none), top_p, min_p, typical_p, and a random number from [0, 1).
    It returns -1 if no logit is finite.
    """
    library = _library()
    if library is None:
        return None
    library.deploykit_draw_room.argtypes = (ctypes.c_int32,)
    library.deploykit_draw_room.restype = ctypes.c_int64
    library.deploykit_draw.argtypes = (
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_double, ctypes.c_int32, ctypes.c_double, ctypes.c_double, ctypes.c_double,
        ctypes.c_double, ctypes.c_void_p,
    )  # fmt: skip
    room = np.empty(0, np.uint8)

    def draw(
        logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, uniform: float
    ) -> int:
        nonlocal room
        logits = np.ascontiguousarray(logits, np.float32)
        needed = library.deploykit_draw_room(len(logits))
        if room.nbytes < needed:
            room = np.empty(needed, np.uint8)
        token: int = library.deploykit_draw(
            logits.ctypes.data,
            len(logits),
            temperature,
            min(top_k, len(logits)),
            top_p,
            min_p,
            typical_p,
            uniform,
            room.ctypes.data,
        )
        return token

    return draw
