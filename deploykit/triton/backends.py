"""The backend directory that Triton is given: its own Python backend and ours, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import deploykit

BACKEND = "deploykit"
_STUB = "triton_python_backend_stub"
_INSTALLED = Path("/opt/tritonserver")


@dataclass(frozen=True)
class InstalledTriton:
    """A Triton as NVIDIA's containers and its release for Jetson lay it out; the Python backend holds its stub."""

    binary: Path
    python_backend: Path
    stub: Path


def find_installed_triton() -> InstalledTriton | None:
    """The tritonserver on PATH or in /opt/tritonserver, if it has the Python backend."""
    found = shutil.which("tritonserver") or shutil.which("tritonserver", path=str(_INSTALLED / "bin"))
    if found is None:
        return None
    binary = Path(found).resolve()
    python = binary.parents[1] / "backends" / "python"
    triton = InstalledTriton(binary, python, python / _STUB)
    return triton if triton.stub.is_file() else None


def assemble_backends(folder: Path, python_backend: Path, stub: Path, modules: Iterable[Path] = ()) -> None:
    """Make ``folder`` a backend directory with Triton's Python backend and ours, which also finds ``modules``.

    Copies, because Triton refuses a backend's library that is a link to outside its directory.
    """
    python, own = folder / "python", folder / BACKEND
    shutil.copytree(python_backend, python, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(stub, python)
    (python / stub.name).chmod(0o755)
    own.mkdir()
    package = Path(deploykit.__file__).parent
    shutil.copy(package / "triton" / "backend" / "model.py", own)
    # The stub searches its backend's folder for modules, and ignores PYTHONPATH: these links make it
    # run the deploykit that launched it, installed or not.
    for module in (package, *modules):
        (own / module.name).symlink_to(module)
