"""Compare a device with the requirements of a bundle.

Sources: NVIDIA Jetson Linux Developer Guide ("/etc/nv_tegra_release", "nvpmodel"); the device tree's ``model``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploykit.jetson.boards import BOARDS
from deploykit.jetson.contents import Description
from deploykit.runtime.engines.native import loader

_LEAST_TENSORRT = (10, 3)
_NAMES = {"native": "deploykit's engine native", "onnxruntime": "ONNX Runtime"}
_WITHOUT_TENSORRT = "the model runs on the CPU; for the GPU: sudo apt-get install nvidia-jetpack"
_FLASH = "install that JetPack, or make the bundle again with this device's --jetpack"


@dataclass(frozen=True)
class Finding:
    """A property of the device. ``needed`` is empty if any value is fine. A ``problem`` is fatal; a ``note`` is
    advice."""

    what: str
    found: str
    needed: str = ""
    level: Literal["ok", "note", "problem"] = "ok"
    remedy: str = ""

    def __str__(self) -> str:
        needed = f" (needed: {self.needed})" if self.needed else ""
        remedy = f"\n{'':10}-> {self.remedy}" if self.remedy else ""
        return f"{self.level:<9} {self.what}: {self.found}{needed}{remedy}"


def examine(description: Description, engine: str, graph_bytes: int, root: Path = Path("/")) -> list[Finding]:
    """Compare the machine whose files are under ``root`` with the needs of ``engine`` and a graph of that size."""
    findings = []
    on_jetson = engine == "tensorrt"
    release = _tegra_release(root)
    if release is None:
        findings.append(
            Finding(
                "device",
                f"not a Jetson: no {root / 'etc/nv_tegra_release'}",
                "a Jetson" if on_jetson else "",
                "problem" if on_jetson else "note",
                f"run it on a Jetson {BOARDS[description.target].model}, or give --engine native or --engine onnxruntime"
                if on_jetson
                else f"{_NAMES[engine]} on this CPU takes the place of a Jetson {BOARDS[description.target].model}'s TensorRT",
            )
        )
    else:
        findings += [_board(description, root), _jetpack(description), _l4t(description, release), _power(root)]
        if not on_jetson and tensorrt_version() is None:
            findings.append(Finding("TensorRT", "not installed", description.tensorrt, "note", _WITHOUT_TENSORRT))
    needed = {"tensorrt": _tensorrt, "native": _native, "onnxruntime": _onnxruntime}
    findings.append(needed[engine](description))
    findings.append(_python(description))
    findings.append(_memory(description, engine, graph_bytes, root))
    return findings


def free_bytes(root: Path = Path("/")) -> int:
    """Return the memory available without swapping. On a Jetson, CPU and GPU share it."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _board(description: Description, root: Path) -> Finding:
    wanted = BOARDS[description.target].model
    try:
        model = (root / "proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    except OSError:
        model = "unknown"
    if wanted in model:
        return Finding("board", model, wanted)
    return Finding(
        "board", model, wanted, "note", "the limits on memory and batch are another board's: make a bundle for this one"
    )


def _jetpack(description: Description) -> Finding:
    """Return the JetPack version by its package, which a minimal installation does not have."""
    version = _deb_version("nvidia-jetpack")
    if version is None:
        return Finding("JetPack", "its package is not installed; see Jetson Linux", description.jetpack)
    if version.partition(".")[0] != description.jetpack.partition(".")[0]:
        return Finding("JetPack", version, description.jetpack, "problem", _FLASH)
    same = version == description.jetpack or version.startswith(f"{description.jetpack}+")
    return Finding("JetPack", version, description.jetpack, "ok" if same else "note")


def _l4t(description: Description, release: str) -> Finding:
    if release.partition(".")[0] != description.l4t.partition(".")[0]:
        return Finding("Jetson Linux", release, description.l4t, "problem", _FLASH)
    same = release == description.l4t or release.startswith(f"{description.l4t}.")
    return Finding("Jetson Linux", release, description.l4t, "ok" if same else "note")


def _power(root: Path) -> Finding:
    """Return the power mode by name; the fastest is called MAXN, or MAXN_SUPER."""
    mode = re.search(r"Power Mode: *(\S+)", _output("nvpmodel", "-q"))
    if mode is None:
        return Finding("power mode", "not shown by nvpmodel", "", "note", "ask as root: sudo nvpmodel -q")
    if mode[1].startswith("MAXN"):
        return Finding("power mode", mode[1])
    try:
        modes = (root / "etc/nvpmodel.conf").read_text(errors="replace")
    except OSError:
        modes = ""
    fastest = re.findall(r"POWER_MODEL ID=(\d+) NAME=(MAXN\w*)", modes)
    remedy = f"for full speed: sudo nvpmodel -m {fastest[-1][0]} ({fastest[-1][1]})" if fastest else ""
    return Finding("power mode", mode[1], "", "note", remedy)


def _tensorrt(description: Description) -> Finding:
    version = tensorrt_version()
    if version is None:
        return Finding(
            "TensorRT", "not installed", description.tensorrt, "problem", "sudo apt-get install nvidia-jetpack"
        )
    numbers = tuple(int(n) for n in version.split(".")[:2])
    if numbers < _LEAST_TENSORRT:
        return Finding("TensorRT", version, "10.3 or newer", "problem", _FLASH)
    if importlib.util.find_spec("tensorrt") is None:
        return Finding(
            "TensorRT", f"{version}, without its Python module", description.tensorrt, "problem",
            "sudo apt-get install python3-libnvinfer",
        )  # fmt: skip
    return Finding(
        "TensorRT", version, description.tensorrt, "ok" if version.startswith(description.tensorrt) else "note"
    )


def tensorrt_version() -> str | None:
    """Return the version of the Python module, or of the packages with the libraries."""
    try:
        return importlib.metadata.version("tensorrt")
    except importlib.metadata.PackageNotFoundError:
        version = _deb_version("libnvinfer-bin")
        return version.partition("-")[0] if version else None


def _onnxruntime(description: Description) -> Finding:
    if importlib.util.find_spec("onnxruntime") is not None:
        return Finding("ONNX Runtime", "installed")
    remedy = "python3 -m pip install --no-deps --target site -r wheels.txt"
    if description.wheels:
        remedy = f"the bundle's wheels are for Python {description.python} on aarch64; here: {remedy}"
    return Finding("ONNX Runtime", "not installed", "", "problem", remedy)


def _native(description: Description) -> Finding:
    lacks = loader.lacks()
    if lacks is None:
        return Finding("native", loader.instruction_set())
    return Finding(
        "native", lacks, "", "problem", "give --engine onnxruntime, or make the bundle again from an INT8 export"
    )


def _python(description: Description) -> Finding:
    here = "{}.{}".format(*sys.version_info)
    return Finding("Python", here, description.python, "ok" if here == description.python else "note")


def _memory(description: Description, engine: str, graph_bytes: int, root: Path) -> Finding:
    """Check free memory by a rule of thumb: several times the graph, TensorRT's workspace, and 1 GiB for CUDA."""
    needed = 3 * graph_bytes + (256 << 20)
    if engine == "tensorrt":
        needed = 3 * graph_bytes + (description.workspace_mib << 20) + (1 << 30)
    free = free_bytes(root)
    texts = f"{free >> 20:,} MiB free", f"about {needed >> 20:,} MiB"
    if free >= needed:
        return Finding("memory", *texts)
    remedy = "end other programs; on a Jetson also its desktop: sudo systemctl isolate multi-user.target"
    return Finding("memory", *texts, "problem", remedy)


def _tegra_release(root: Path) -> str | None:
    """Return a release such as 36.4.3, from ``# R36 (release), REVISION: 4.3, GCID: ...``; None if there is none."""
    try:
        text = (root / "etc/nv_tegra_release").read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else "unknown"


def _deb_version(package: str) -> str | None:
    return _output("dpkg-query", "--show", "--showformat=${Version}", package).strip() or None


def _output(*command: str) -> str:
    """Return the output of a program; "" if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    return done.stdout if done.returncode == 0 else ""
