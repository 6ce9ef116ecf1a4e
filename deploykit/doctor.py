"""Report this machine's hardware and packages, and what each command still needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import MissingDependencyError
from deploykit.hardware import available_cpus
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.engines.native import loader as native
from deploykit.tasks.registry import loadable_commands
from deploykit.triton.preflight import find_triton

_PACKAGES = (
    "numpy", "tokenizers", "tritonclient", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch",
    "transformers", "optimum", "datasets", "accelerate", "peft", "onnx", "pyarrow", "tensorboard", "nvidia-pytriton", "matplotlib",
)  # fmt: skip
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
_TRAINING = ("torch", "transformers", "optimum", "accelerate", "tokenizers", "onnx", "tensorboard", "tomli_w")
# command -> (modules it needs, the extra that installs them); the tasks name what their own commands need
_NEEDS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "finetune": (_TRAINING, "finetune"),
    "calibrate": ((*_TRAINING, "onnxruntime"), "finetune,cpu"),
    "export": ((*_TRAINING, "onnxruntime"), "finetune,cpu"),
    "package": (("tritonclient", "google.protobuf"), ""),
    "bundle": (("tritonclient", "google.protobuf", "onnxruntime"), "cpu"),
    "predict": (("tritonclient",), ""),
    "evaluate": (("tritonclient",), ""),
    "explain": (("tritonclient",), ""),
    "bench": (("matplotlib", "psutil"), "bench"),
    "tune": (("tritonclient", "google.protobuf", "matplotlib", "psutil"), "bench"),
    "sign": (("model_signing",), "sign"),
    "inspect": ((), ""),
}


@dataclass(frozen=True)
class Need:
    """Whether a command can run here; ``missing`` and ``remedy`` are empty if it can."""

    ready: bool
    missing: str = ""
    remedy: str = ""


def examine() -> dict[str, Any]:
    """Return all findings, with stable keys: python, platform, cpu, memory_mb, gpu, packages, engines, native,
    commands.

    ``native`` says what that engine ``lacks``, if it does not run. Raises UsageError if the environment names an unknown instruction
    set.
    """
    cpu = _cpu()
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "cpu": cpu,
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000,
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "engines": {name: info.installed for name, info in ENGINES.items()},
        "native": _native(cpu["features"]),
        "commands": {name: need.__dict__ for name, need in _commands().items()},
    }


def _commands() -> dict[str, Need]:
    needs = {}
    of_tasks = {name: (command.packages, "") for name, command in loadable_commands().items()}
    for command, (modules, extra) in {**_NEEDS, **of_tasks, **_NEEDS}.items():
        missing = [name for name in modules if not _importable(name)]
        remedy = f"pip install 'deploykit[{extra}]'" if extra else "pip install deploykit"
        needs[command] = Need(not missing, ", ".join(missing), remedy if missing else "")
    if not any(info.installed for info in ENGINES.values()):
        for command in ("predict", *of_tasks, "evaluate", "explain", "bench", "tune"):
            if needs[command].ready:
                needs[command] = Need(
                    False, "an engine (not for served models)", "pip install 'deploykit[cpu,openvino]'"
                )
    try:
        find_triton()
        needs["serve"] = Need(True)
    except MissingDependencyError as error:
        needs["serve"] = Need(False, error.message, error.remedy or "")
        if needs["tune"].ready:  # tune serves the models that it measures
            needs["tune"] = needs["serve"]
    gpu = _gpu()
    if not gpu["devices"]:
        needs["GPU engines"] = Need(False, "an NVIDIA GPU and its driver", "use a CPU engine, or a machine with a GPU")
    elif not ENGINES["tensorrt"].installed:
        needs["GPU engines"] = Need(False, "TensorRT", "pip install 'deploykit[tensorrt]', or 'deploykit[rtx]'")
    return needs


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass  # not Linux: only the model is known
    return {"model": model, "cores": available_cpus(), "features": [flag for flag in _CPU_FLAGS if flag in flags]}


def _native(features: Sequence[str]) -> dict[str, Any]:
    """Return the instruction set that the engine ``native`` uses, all that it can use, and the CPU's sets that it refuses; or
    what it lacks to run here, and the remedy."""
    if lacks := native.lacks():
        none: dict[str, Any] = {"instruction_set": None, "available": [], "refused": None}
        return {**none, "lacks": lacks, "remedy": native.remedy()}
    available = list(native.instruction_sets())
    refused = "Linux does not give AMX to this process" if "amx_int8" in features and "amx" not in available else None
    return {
        "instruction_set": native.instruction_set(), "available": available, "refused": refused,
        "lacks": None, "remedy": None,
    }  # fmt: skip


def _gpu() -> dict[str, Any]:
    """Return the NVIDIA devices that nvidia-smi lists, and the CUDA toolkit's compiler."""
    devices: list[dict[str, str]] = []
    if shutil.which("nvidia-smi"):
        query = "name,driver_version,memory.total,compute_cap"
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        if answer.returncode == 0:
            keys = ("name", "driver", "memory", "compute_capability")
            devices = [dict(zip(keys, (v.strip() for v in line.split(",")))) for line in answer.stdout.splitlines()]
    nvcc = None
    if shutil.which("nvcc"):
        answer = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30, check=False)
        nvcc = next(
            (line.split("release ")[1].split(",")[0] for line in answer.stdout.splitlines() if "release " in line), None
        )
    return {"devices": devices, "cuda_compiler": nvcc}


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
