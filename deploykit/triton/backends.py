"""Build the backend directory for Triton: its own Python backend and the backend ``deploykit``."""

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
    """A Triton in the layout of NVIDIA's containers and its Jetson release. The Python backend contains its stub."""

    binary: Path
    python_backend: Path
    stub: Path


def find_installed_triton() -> InstalledTriton | None:
    """Return the tritonserver on PATH or in /opt/tritonserver, if it has the Python backend."""
    found = shutil.which("tritonserver") or shutil.which("tritonserver", path=str(_INSTALLED / "bin"))
    if found is None:
        return None
    binary = Path(found).resolve()
    python = binary.parents[1] / "backends" / "python"
    triton = InstalledTriton(binary, python, python / _STUB)
    return triton if triton.stub.is_file() else None


def assemble_backends(folder: Path, python_backend: Path, stub: Path, modules: Iterable[Path] = ()) -> None:
    """Make ``folder`` a backend directory with Triton's Python backend and deploykit's, which can also import ``modules``.

    Files are copied, because Triton refuses a backend library that is a link out of its directory.
    """
    python, own = folder / "python", folder / BACKEND
    shutil.copytree(python_backend, python, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(stub, python)
    (python / stub.name).chmod(0o755)
    own.mkdir()
    package = Path(deploykit.__file__).parent
    shutil.copy(package / "triton" / "backend" / "model.py", own)
    # The stub ignores PYTHONPATH and imports from its backend's folder. These links make it run the deploykit that
    # launched it, installed or not.
    for module in (package, *modules):
        (own / module.name).symlink_to(module)
