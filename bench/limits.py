"""Compare steps of a language model on ``native`` with what the CPU allows (AVX-512 VNNI).

A step reads each weight once, and multiplies it once for each row. So it takes at least as long as a loop that only reads the
weights, and as products of bytes that are in registers already. Loops and steps take turns and have as many threads; the model
makes no guesses. Writes bench/results/<date>-limits-avx512vnni.json.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import math
import mmap
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from suite import begin, say, write_record

from deploykit.artifacts import load_manifest
from deploykit.bench.run import spread
from deploykit.hardware import available_cpus
from deploykit.runtime.engines import NATIVE_LANGUAGE_MODELS
from deploykit.runtime.engines.native import loader
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.prompt_lookup import PromptLookup

ROOT = Path(__file__).parents[1]
NEEDED = "avx512vnni"
ROWS = (1, 8, 32)
PROMPT_TOKENS, STEPS = 32, 64
ROUNDS_OF_PRODUCTS, PRODUCTS = 2_000_000, 20 * 64
"""Each thread's work in the loop of products, and the products of a round."""


def main() -> None:
    options = _options()
    if loader.instruction_set() != NEEDED:
        raise SystemExit(f"limits.py: this CPU's fastest instruction set is {loader.instruction_set()}, not {NEEDED}")
    suite = begin("limits.py", options.threads, {}, ())
    task = load_manifest(options.export, "export").task
    assert isinstance(task, TextGeneration)
    PromptLookup.guess = lambda lookup, most: []  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        loops = _compile(Path(folder))
        for precision, (name,) in NATIVE_LANGUAGE_MODELS.items():
            file = options.export / name
            if not file.is_file():
                suite["skipped"][precision] = f"the export has no {name}"
                continue
            model = load_generator(options.export, task, "native", name, options.threads)
            measured = _measure(loops, model, file, options.threads, options.rounds)
            suite["workloads"].append({"precision": precision, **measured})
            for rows, found in measured["steps"].items():
                say(
                    f"{precision}, {rows} rows: a step takes {found['ms']['median']:.2f} ms, the limit is "
                    f"{found['limit_ms']['median']:.2f} ms ({found['share']['median']:.0%})"
                )
    write_record(suite, options.out or ROOT / f"bench/results/{datetime.date.today()}-limits-{NEEDED}.json")


def _measure(loops: ctypes.CDLL, model: LocalGenerator, file: Path, threads: int, rounds: int) -> dict[str, Any]:
    with file.open("rb") as opened:  # mapped as the engine maps it
        content = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    products = _products(file)
    reads, rates, steps = [], [], {rows: [] for rows in ROWS}  # type: ignore[var-annotated]
    for number in range(-1, rounds):  # the first round warms up
        read = _ms(lambda: loops.read_all(content.ctypes.data, len(content), threads), STEPS)
        multiply = _ms(lambda: loops.multiply(ROUNDS_OF_PRODUCTS, threads), 1)
        took = {rows: _step_ms(model, rows, number) for rows in ROWS}
        if number >= 0:
            reads.append(read)
            rates.append(threads * ROUNDS_OF_PRODUCTS * PRODUCTS / multiply / 1e6)
            for rows in ROWS:
                steps[rows].append(took[rows])
    limits = {rows: [max(read, rows * products / rate / 1e6) for read, rate in zip(reads, rates)] for rows in ROWS}
    return {
        "bytes": len(content),
        "products": products,
        "rounds": rounds,
        "read_ms": spread(reads),
        "read_gb_per_s": len(content) / statistics.median(reads) / 1e6,
        "products_g_per_s": spread(rates),
        "steps": {
            str(rows): {
                "ms": spread(steps[rows]),
                "limit_ms": spread(limits[rows]),
                "share": spread([limit / step for limit, step in zip(limits[rows], steps[rows])]),
            }
            for rows in ROWS
        },
    }


def _compile(folder: Path) -> ctypes.CDLL:
    library = folder / "limits.so"
    source = Path(__file__).with_suffix(".c")
    command = ("cc", "-O2", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library), "-lpthread")
    subprocess.run(command, check=True)
    loops = ctypes.CDLL(str(library))
    loops.read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    loops.multiply.argtypes = (ctypes.c_int64, ctypes.c_int)
    return loops


def _products(file: Path) -> int:
    """Return the number of weights: products of a step with one row. Two 4-bit weights share a byte."""
    with safe_open(file, "np") as tensors:
        names = tensors.keys()
        slices = [tensors.get_slice(name) for name in names]
    return sum({"I8": 1, "U8": 2}.get(each.get_dtype(), 0) * math.prod(each.get_shape()) for each in slices)


def _ms(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times * 1e3


def _step_ms(model: LocalGenerator, rows: int, number: int) -> float:
    """Return the time of a step: how much longer answers of ``STEPS`` more tokens take than those of one token."""
    took = []
    for tokens in (1, 1 + STEPS):
        # Other prompts each time, because the engine keeps those that it has read.
        random = np.random.default_rng((rows, number + 1, tokens))
        prompts = random.integers(100, 10_000, (rows, PROMPT_TOKENS)).tolist()
        sampling = Sampling(max_new_tokens=tokens, ignore_eos=True)
        took.append(_ms(lambda: list(model.generate(prompts, sampling)), 1))  # noqa: B023
    return (took[1] - took[0]) / STEPS


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="a folder that `export --int8` wrote from a language model")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
