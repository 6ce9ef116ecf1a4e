"""Run whole models on the engine ``native`` and write what they compute. Imports no torch, so that an emulated Python runs it.

Usage: whole_models.py LIBRARY OUT KIND=FILE... where KIND is encoder, translator or causal. OUT is an .npz. Prints the
instruction set.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.runtime.engines.native import loader
from deploykit.runtime.engines.native.causal_lm import NativeCausalLm
from deploykit.runtime.engines.native.encoder import NativeEngine
from deploykit.runtime.engines.native.translator import NativeModel

TOKENS = np.random.default_rng(0).integers(5, 100, 64)


def run_encoder(path: Path) -> Any:
    lengths = np.array([16, 9, 1])
    ids = np.where(np.arange(16) < lengths[:, None], TOKENS[:48].reshape(3, 16), 1)
    return NativeEngine(path, 2).run({"input_ids": ids, "attention_mask": (ids != 1).astype(np.int64)})[0]


def run_causal(path: Path) -> Any:
    model = NativeCausalLm(path, 2, context=64)
    model.begin()
    prompt = model.feed(TOKENS[:20].tolist(), range(20)).copy()
    return np.concatenate([prompt, *(model.feed([token], range(1)).copy() for token in TOKENS[20:24].tolist())])


def run_translator(path: Path) -> Any:
    model = NativeModel(path.parent, [path.name], 2)
    sources = [TOKENS[:9].tolist(), TOKENS[9:12].tolist()]
    model.admit(model.encode(sources), [9, 3], [1, 1])
    return np.stack([model.step(np.full(2, token)).copy() for token in TOKENS[20:28]])


RUN = {"encoder": run_encoder, "causal": run_causal, "translator": run_translator}

library, out, *files = sys.argv[1:]
loader.library_file = lambda: Path(library)
np.savez(out, **{Path(name).stem: RUN[kind](Path(name)) for kind, _, name in (file.partition("=") for file in files)})
print(loader.instruction_set())
