"""The engine ``native`` for Arm on CPUs that qemu emulates: kernels give the same bits as plain C (native_kernels.c), whole models
the same as here (whole_models.py)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from language_models import random_model as random_language_model
from native_builds import KERNELS, compile_engine, link
from native_encoders import random_model as random_encoder
from native_encoders import runs_here
from paths import ROOT
from transformers import AutoModelForSequenceClassification
from translators import FAMILIES

from deploykit.graphs.causal_architecture import read_causal_architecture
from deploykit.graphs.encoders import read_encoder
from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_causal import NativeCausalWriter
from deploykit.graphs.native_encoder import linear_parts, save_native_encoder
from deploykit.graphs.native_writer import save_native
from deploykit.runtime.engines.native import loader

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
LINKER = shutil.which("aarch64-linux-gnu-gcc")
"""It has a C library for Arm, which Zig would have to compile first."""
PYTHON = ROOT / "build/arm-python/usr/bin/python3"
KINDS = ("encoder", "translator")
CPUS = {"cortex-a72": "neon scalar", "neoverse-n1": "dotprod neon scalar", "max": "i8mm dotprod neon scalar"}
"""Models of qemu's, and the instruction sets that the engine has for each. Only newer versions of qemu have a Neoverse V1."""

pytestmark = [
    pytest.mark.skipif(not QEMU, reason="no qemu: sudo apt-get install qemu-user-static"),
    pytest.mark.skipif(
        not LINKER, reason="no linker for Arm: sudo apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
    ),
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no Zig: pip install ziglang"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    objects = compile_engine(folder, "linux-aarch64", KERNELS)
    subprocess.run((LINKER, "-static", *objects, "-o", str(folder / "kernels"), "-lm", "-lpthread"), check=True)
    return folder / "kernels"


@pytest.mark.parametrize("cpu", CPUS)
def test_kernels_equal_the_reference_on_an_emulated_cpu(program: Path, cpu: str) -> None:
    done = subprocess.run((str(QEMU), "-cpu", cpu, str(program)), capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (CPUS[cpu], "", 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    link("linux-aarch64", folder / "native.so", "-shared", *compile_engine(folder, "linux-aarch64"))
    return folder / "native.so"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weight files of a small model of each kind, after its name."""
    folder = tmp_path_factory.mktemp("weights")
    encoder = read_encoder(
        random_encoder(AutoModelForSequenceClassification, "bert", layers=2, longest=16, num_labels=3)
    )
    save_native_encoder(folder / "encoder", encoder, linear_parts(encoder))
    save_native(folder / "translator", read_architecture(FAMILIES["marian"]().eval()), {})
    for bits in (8, 4):
        NativeCausalWriter(read_causal_architecture(random_language_model("llama"))).save(folder / f"int{bits}", bits)
    return [f"{kind}={folder / name}" for kind, name in (*zip(KINDS, KINDS), ("causal", "int8"), ("causal", "int4"))]


@runs_here
@pytest.mark.skipif(not PYTHON.exists(), reason="no Python for Arm: bash setup.sh --emulator")
@pytest.mark.parametrize("cpu", CPUS)
def test_whole_models_compute_the_same_as_here(library: Path, models: list[str], tmp_path: Path, cpu: str) -> None:
    here, there = tmp_path / "here.npz", tmp_path / "there.npz"
    script = ROOT / "tests/integration/whole_models.py"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{PYTHON.parents[2] / 'site'}", "OPENBLAS_NUM_THREADS": "1"}
    arm = (str(QEMU), "-cpu", cpu, "-L", str(PYTHON.parents[2]), str(PYTHON))
    done = subprocess.run((*arm, script, library, there, *models), env=environment, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (CPUS[cpu].split()[:1], "")
    subprocess.run(
        (sys.executable, script, str(loader.library_file()), here, *models), env={**environment, "PYTHONPATH": str(ROOT)},
        check=True,
    )  # fmt: skip
    with np.load(here) as expected, np.load(there) as found:
        assert list(found) == ["encoder", "translator", "int8", "int4"]
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name], name)
