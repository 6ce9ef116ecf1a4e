"""Sample tokens with the library of the engine ``native``, from the logits of any engine."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np

from deploykit.runtime.engines.native.loader import lacks, open_library
from deploykit.runtime.engines.protocol import Floats

Draw = Callable[[Floats, float, int, float, float, float, float], int]


@cache
def native_draw() -> Draw | None:
    """Return a function that samples a token, or None if the library does not run here.

    It takes logits, float32 [vocabulary], temperature, top_k (0: none), top_p, min_p, typical_p, and a random number from [0, 1).
    It returns -1 if no logit is finite.
    """
    if lacks() is not None:
        return None
    path = open_library()._name
    # A call takes microseconds: waiting for Python's lock after it would take longer. It also guards the memory.
    library = ctypes.PyDLL(path)
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
