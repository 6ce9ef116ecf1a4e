"""Get the library of the engine ``native`` for a Jetson's CPU."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import deploykit
from deploykit.errors import DeploykitError
from deploykit.runtime.engines.native import loader

_TARGET = "linux-aarch64"
LIBRARY = "deploykit/runtime/engines/native/_native.abi3.so"


def library_for_arm(wheels: Path | None) -> bytes | None:
    """Return the library: from deploykit's wheel in ``wheels``, from this installation if it is for the same CPU, or
    compiled by Zig if deploykit runs from its source. None if none of these is possible.

    Raises DeploykitError if the compiler fails.
    """
    wheel = f"deploykit-{deploykit.__version__}-*manylinux*_aarch64.whl"
    for path in sorted(wheels.glob(wheel)) if wheels is not None else ():
        with zipfile.ZipFile(path) as archive:
            if LIBRARY in archive.namelist():
                return archive.read(LIBRARY)
    own = loader.library_file()
    if own is not None and f"{sys.platform}-{platform.machine()}" == _TARGET:
        return own.read_bytes()
    source = Path(deploykit.__file__).parents[1]
    if (source / "setup.py").is_file() and importlib.util.find_spec("ziglang") is not None:
        return _compiled(source)
    return None


def _compiled(source: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "setup.py",
            "-q",
            "build_ext",
            "--build-lib",
            folder,
            "--build-temp",
            f"{folder}/temp",
        ]
        environment = {**os.environ, "DEPLOYKIT_TARGET": _TARGET}
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeploykitError(
                f"the engine native cannot be compiled for {_TARGET}: {done.stderr.strip().splitlines()[-1:]}",
                f"see the error: cd {source} && DEPLOYKIT_TARGET={_TARGET} {sys.executable} setup.py build_ext",
            )
        return (Path(folder) / LIBRARY).read_bytes()
