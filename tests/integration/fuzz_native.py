"""Open damaged weight files with a sanitized library, and run those that are not refused. Imports no torch.

Usage: fuzz_native.py LIBRARY SEED ROUNDS KIND=FILE... where KIND is encoder, translator or causal. Prints counts as JSON.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError
from deploykit.runtime.engines.native import loader, weights
from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
from deploykit.runtime.engines.native.encoder import NativeEngine
from deploykit.runtime.engines.native.sampling import native_draw
from deploykit.runtime.engines.native.translator import NativeModel


def on_the_heap(path: Path, kind: Any, mode: str) -> Any:
    """Return a file's bytes in memory of just their size, so that AddressSanitizer sees reads outside them."""
    content = path.read_bytes()
    if not content:
        raise ValueError("an empty file cannot be mapped")
    address = ctypes.c_void_p()
    ctypes.CDLL(None).posix_memalign(ctypes.byref(address), ctypes.c_size_t(64), ctypes.c_size_t(len(content)))
    ctypes.memmove(address, content, len(content))
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (len(content),))


def run_encoder(path: Path) -> None:
    ids = np.array([[5, 6, 7, 8], [9, 10, 1, 1]], np.int64)
    NativeEngine(path, 2).run({"input_ids": ids, "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]])})


def run_causal(path: Path) -> None:
    model = NativeCausalLm(path, 2, context=64)
    model.begin()
    model.feed([5, 6, 7], range(3))
    model.admit(8)
    logits, draw = model.step(np.array([8]))[0].copy(), native_draw()
    assert draw is not None
    for rules in ((0, 1.0, 0.0, 1.0), (3, 1.0, 0.0, 0.5), (0, 0.9, 0.1, 1.0), (150, 0.5, 0.0, 0.9)):
        assert -1 <= draw(logits, 0.8, *rules, 0.7) < len(logits)


def run_translator(path: Path) -> None:
    model = NativeModel(path.parent, [path.name], 2)
    sources = [[5, 6, 7], [8, 9]]
    model.admit(model.encode(sources), [3, 2], [1, 1])
    for token in (5, 6):
        model.step(np.full(2, token))


RUN = {"encoder": run_encoder, "causal": run_causal, "translator": run_translator}


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return a truncated file, or one with flipped bytes: in the header every other time."""
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(header if chance.random() < 0.5 else len(content))
        changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def main() -> None:
    library, seed, rounds, *files = sys.argv[1:]
    loader.library_file = lambda: Path(library)
    weights.np.memmap = on_the_heap
    chance = random.Random(int(seed))
    refused = ran = 0
    for kind, _, name in (file.partition("=") for file in files):
        path = Path(name)
        content = path.read_bytes()
        RUN[kind](path)
        for _ in range(int(rounds)):
            path.write_bytes(damaged(content, chance))
            try:
                RUN[kind](path)
                ran += 1
            except DeploykitError:
                refused += 1
        path.write_bytes(content)
    print(json.dumps({"ran": ran, "refused": refused}))


main()
