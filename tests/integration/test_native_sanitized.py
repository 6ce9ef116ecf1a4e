"""The engine ``native`` under AddressSanitizer and UBSan, with whole and with damaged weight files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from language_models import random_model as random_language_model
from native_encoders import random_model, runs_here
from paths import CACHE, ROOT
from transformers import AutoModelForSequenceClassification
from translators import FAMILIES

from deploykit.graphs.causal_architecture import read_causal_architecture
from deploykit.graphs.encoders import read_encoder
from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_causal import NativeCausalWriter
from deploykit.graphs.native_encoder import linear_parts, save_native_encoder
from deploykit.graphs.native_writer import save_native
from deploykit.runtime.engines.native.loader import instruction_sets, lacks

CSRC = ROOT / "deploykit/runtime/engines/native/csrc"
FLAGS = ("-g1", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off")
SANITIZERS = ("-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CPUS = {
    "scalar": ("x86-64",),
    "avx2": ("x86-64-v3",),
    "avxvnni": ("x86-64-v3", "-mavxvnni"),
    "avx512": ("x86-64-v4",),
    "avx512vnni": ("x86-64-v4", "-mavx512vnni"),
    "amx": ("x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
}
HERE = () if lacks() else instruction_sets()
TRIED = [isa for isa in dict.fromkeys(("scalar", "avx2", *HERE[:1])) if isa in HERE]
"""Instruction sets that are run: the fastest of this machine too."""
ROUNDS = 150

pytestmark = [
    runs_here,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its sanitizers' libraries"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept in the user's cache until a source changes: compiling takes more than a minute of a CPU."""
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(compiler + repr(TRIED).encode())
    for file in (Path(__file__), *sorted(CSRC.rglob("*.[ch]"))):
        digest.update(file.read_bytes())
    kept = CACHE / "sanitized" / f"{digest.hexdigest()}.so"
    if kept.exists():
        return kept
    folder = tmp_path_factory.mktemp("sanitized")

    def compile_file(source: Path, cpu: tuple[str, ...]) -> Path:
        target = folder / f"{source.stem}.o"
        # Optimized and sanitized, the kernels take gcc minutes. What does not run here is only linked.
        sanitizers = SANITIZERS if cpu == CPUS["scalar"] or source.stem in TRIED else ()
        how = ("-O0" if source.stem in {"scalar", *TRIED} else "-O1", *sanitizers)
        subprocess.run(["gcc", *FLAGS, f"-march={cpu[0]}", *cpu[1:], *how, "-c", source, "-o", target], check=True)
        return target

    sources = dict.fromkeys(CSRC.glob("*.c"), CPUS["scalar"])
    sources |= {CSRC / "isa" / f"{name}.c": cpu for name, cpu in CPUS.items()}
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_file, sources, sources.values()))
    out = folder / "native.so"
    subprocess.run(["gcc", *SANITIZERS, "-shared", *objects, "-o", out, "-lm", "-lpthread", "-ldl"], check=True)
    shutil.rmtree(kept.parent, ignore_errors=True)
    kept.parent.mkdir(parents=True)
    partial = shutil.copy(out, kept.with_suffix(".partial"))
    return partial.replace(kept)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weight files of a small model of each kind, after its name."""
    folder = tmp_path_factory.mktemp("weights")
    encoder = read_encoder(random_model(AutoModelForSequenceClassification, "bert", layers=1, longest=16, num_labels=3))
    save_native_encoder(folder / "encoder", encoder, linear_parts(encoder))
    save_native(folder / "translator", read_architecture(FAMILIES["marian"]().eval()), {})
    for bits in (8, 4):
        NativeCausalWriter(read_causal_architecture(random_language_model("llama"))).save(folder / f"int{bits}", bits)
    kinds = {"encoder": "encoder", "translator": "translator", "int8": "causal", "int4": "causal"}
    return [f"{kind}={folder / name}" for name, kind in kinds.items()]


@pytest.mark.parametrize("isa", TRIED)
def test_no_damaged_file_makes_it_read_outside_the_file(library: Path, files: list[str], isa: str) -> None:
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1",
        "DEPLOYKIT_NATIVE_ISA": isa, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    script = Path(__file__).with_name("fuzz_native.py")
    done = subprocess.run(
        [sys.executable, script, library, "0", str(ROUNDS), *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout)
    assert counts["ran"] + counts["refused"] == ROUNDS * len(files)
    assert counts["ran"] > ROUNDS / 4, "weights that differ are no reason to refuse a file"
    assert counts["refused"] > ROUNDS / 4
