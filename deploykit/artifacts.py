"""Write and read artifacts: directories with a manifest that lists every file with size and hash.

A directory is written under a temporary name next to its destination and renamed when it is complete. So a reader
finds the old one, the new one, or none.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from deploykit import __version__
from deploykit.errors import ArtifactError, CorruptArtifactError
from deploykit.locks import lock, unlocked
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_from_json, task_to_json

MANIFEST = "manifest.json"
SAMPLES = "samples.jsonl"
"""File of an export with some of the measured rows, to compare later artifacts on."""
FORMAT = 1

_REFUSALS: Mapping[int | None, tuple[str, str]] = {
    errno.ENOSPC: ("no space left on its disk", "free some space, or write to another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or write to another disk"),
    errno.EFBIG: (
        "it would be larger than its file system or this user's limit allows",
        "write to another disk; see ulimit -f",
    ),
    errno.EROFS: ("its file system is read-only", "write to another folder"),
    errno.EACCES: ("permission denied", "write to a folder you own"),
    errno.EPERM: ("permission denied", "write to a folder you own"),
    errno.EEXIST: ("a file is in the place of a folder", "check the path"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.ELOOP: ("a symbolic link leads to itself", "check the path"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "check the path"),
}

# Libraries wrap "no space left" in exceptions of their own; torch.save says only that its file is too short.
_NO_SPACE = (os.strerror(errno.ENOSPC), "inline_container.cc", "PytorchStreamWriter failed writing")

Kind = Literal["checkpoint", "calibration", "export", "model"]

_MADE_BY: Mapping[str, str] = {
    "checkpoint": "deploykit finetune",
    "calibration": "deploykit calibrate",
    "export": "deploykit export",
    "model": "deploykit package",
}
_VERSIONED = ("torch", "transformers", "tokenizers", "onnx", "onnxruntime", "openvino", "numpy")


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file of an artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json.

    ``inputs`` is the digest of everything that determined the artifact (options, data, parent): a run with the same
    inputs need not be repeated. ``parent`` is the digest of the artifact it was made from. ``metrics`` holds what was
    measured while making it.
    """

    kind: Kind
    task: TaskFacts
    files: Mapping[str, FileRecord]
    inputs: str
    parent: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    recorded_task: Mapping[str, Any] | None = None
    """The task as the file describes it. Earlier versions of deploykit wrote fewer fields."""

    @property
    def digest(self) -> str:
        """Digest of the contents: task and files, but not time and versions."""
        files = {name: record.sha256 for name, record in self.files.items()}
        return digest_of(self.kind, self._task_json, files)

    @property
    def _task_json(self) -> Mapping[str, Any]:
        return task_to_json(self.task) if self.recorded_task is None else self.recorded_task

    def to_json(self) -> dict[str, Any]:
        """Return the contents of manifest.json."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "digest": self.digest,
            "inputs": self.inputs,
            "parent": self.parent,
            "task": self._task_json,
            "options": dict(self.options),
            "metrics": dict(self.metrics),
            "versions": dict(self.versions),
            "created": self.created,
            "files": {n: {"bytes": r.bytes, "sha256": r.sha256} for n, r in sorted(self.files.items())},
        }


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of the parts' canonical JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_path(path: Path) -> str:
    """Return the SHA-256 over the names and contents of a file, or of every file of a directory."""
    if path.is_file():
        return hash_file(path)
    return digest_of({str(p.relative_to(path)): hash_file(p) for p in _files_of(path)})


def load_manifest(path: Path, kind: Kind | None = None, *, verify: bool = True) -> Manifest:
    """Read an artifact's manifest and check its files against it.

    Raises:
        ArtifactError: not an artifact, another kind than ``kind``, or an unknown format.
        CorruptArtifactError: a file is missing or differs from its recorded size or hash.
    """
    if not path.is_dir():
        what = "is a file, not the directory of an artifact" if path.exists() else "no such directory"
        raise ArtifactError(f"{path}: {what}", "check the path")
    try:
        record = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        made_by = _MADE_BY[kind] if kind else "a deploykit stage"
        raise ArtifactError(f"{path}: has no {MANIFEST}", f"pass a directory that {made_by} wrote") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CorruptArtifactError(f"{path / MANIFEST}: is not JSON ({error})", _again(kind)) from error
    try:
        if record["format"] != FORMAT:
            raise ArtifactError(
                f"{path}: has format {record['format']}; this deploykit reads format {FORMAT}",
                "use the version of deploykit that wrote it, or create it again",
            )
        manifest = Manifest(
            kind=record["kind"],
            task=task_from_json(record["task"]),
            files={n: FileRecord(r["bytes"], r["sha256"]) for n, r in record["files"].items()},
            inputs=record["inputs"],
            parent=record["parent"],
            options=record["options"],
            metrics=record["metrics"],
            versions=record["versions"],
            created=record["created"],
            recorded_task=record["task"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(f"{path / MANIFEST}: has no {error}", _again(kind)) from error
    if manifest.kind not in get_args(Kind):
        raise CorruptArtifactError(f"{path / MANIFEST}: is of an unknown kind: {manifest.kind!r}", _again(kind))
    if manifest.digest != record.get("digest"):
        raise CorruptArtifactError(f"{path / MANIFEST}: its digest does not match its contents", _again(kind))
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{path}: is {_article(manifest.kind)}, not {_article(kind)}",
            f"pass a directory that {_MADE_BY[kind]} wrote; {_MADE_BY[manifest.kind]} wrote this one",
        )
    if verify:
        verify_files(path, manifest)
    return manifest


def verify_files(path: Path, manifest: Manifest) -> None:
    """Hash every file of an artifact. Raises CorruptArtifactError naming the first that differs."""
    for name, record in manifest.files.items():
        file = path / name
        if "\0" in name or not file.resolve().is_relative_to(path.resolve()):
            raise CorruptArtifactError(f"{path / MANIFEST}: names a file outside its folder: {name!r}")
        if not file.is_file():
            raise CorruptArtifactError(f"{file}: is missing", _again(manifest.kind))
        if file.stat().st_size != record.bytes:
            raise CorruptArtifactError(
                f"{file}: has {file.stat().st_size} bytes, not {record.bytes} as in its manifest", _again(manifest.kind)
            )
        if hash_file(file) != record.sha256:
            raise CorruptArtifactError(f"{file}: its SHA-256 differs from the manifest's", _again(manifest.kind))


def write_manifest(
    directory: Path,
    kind: Kind,
    task: TaskFacts,
    *,
    inputs: str,
    parent: str | None = None,
    options: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Manifest:
    """Hash all files of ``directory`` and write its manifest."""
    manifest = Manifest(
        kind=kind,
        task=task,
        files={str(p.relative_to(directory)): FileRecord(p.stat().st_size, hash_file(p)) for p in _files_of(directory)},
        inputs=inputs,
        parent=parent,
        options=options or {},
        metrics=metrics or {},
        versions=installed_versions(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    (directory / MANIFEST).write_text(
        json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return manifest


def existing(out: Path, kind: Kind, inputs: str, *, force: bool) -> Manifest | None:
    """Check a stage's destination before the work starts.

    Returns the manifest if the same inputs already made ``out``; None if there is work to do. Raises ArtifactError if
    ``out`` has other content and ``force`` is not set, or content that no stage wrote, which ``force`` does not replace:
    it may be a checkpoint of someone else, the rows, or, of an empty --output-dir, the working directory.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise ArtifactError(
            f"{out}: already exists, and no deploykit stage wrote it", "choose another --output-dir, or remove it"
        )
    if force:
        return None
    try:
        manifest = load_manifest(out)
    except ArtifactError as error:
        raise ArtifactError(
            f"{out}: already exists and cannot be reused: {error.message}",
            "choose another --output-dir, or pass --force",
        ) from error
    if manifest.kind == kind and manifest.inputs == inputs:
        return manifest
    raise ArtifactError(
        f"{out}: already exists, made from other inputs or options",
        "choose another --output-dir, or pass --force to replace it",
    )


@contextmanager
def new_directory(out: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield an empty directory that replaces ``out`` if the block succeeds.

    On an error it is removed and ``out`` stays unchanged. Directories that killed commands left are removed too. If another process has
    replaced ``out`` in the meantime, its content stays: raises ArtifactError, or, if ``shared`` (as for a cache), assumes that the
    content is the same.
    """
    out = Path(os.path.abspath(out))
    with explained(out):
        before = _identity(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        temporary, held = _temporary_directory(out)
    try:
        with explained(out):
            temporary.chmod(_usual_mode(temporary))
            yield temporary
            for path in _files_of(temporary):
                _sync(path)
            if _identity(out) == before:
                replace_directory(temporary, out)
            elif not shared:
                raise ArtifactError(f"{out}: another command wrote it in the meantime", "choose another --output-dir")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if held is not None:
            os.close(held)


def _temporary_directory(out: Path) -> tuple[Path, int | None]:
    """Create a directory next to ``out``. Returns it, and a descriptor that locks it while this process lives."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        held = _locked(temporary)
        if temporary.is_dir():  # else another process took it for abandoned before it was locked
            return temporary, held
        if held is not None:
            os.close(held)


def _usual_mode(folder: Path) -> int:
    """Return the permissions of a new folder in ``folder``, which depend on the umask. ``mkdtemp`` ignores it."""
    made = folder / "made"
    made.mkdir()
    mode = made.stat().st_mode
    made.rmdir()
    return stat.S_IMODE(mode)


def _remove_abandoned(out: Path) -> None:
    """Remove the temporary directories of ``out`` that no process holds."""
    name = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.partial")
    with contextlib.suppress(OSError):  # a folder that may be written and not listed
        for path in [path for path in out.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()]:
            with unlocked(path) as found:
                if found:
                    shutil.rmtree(path, ignore_errors=True)


def _locked(directory: Path) -> int | None:
    """Return a descriptor that locks a new directory until it is closed, or None where that is impossible (see ``unlocked``)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        lock(descriptor, wait=True)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to ``out`` if the block succeeds."""
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors into errors that name the path."""
    try:
        yield
    except Exception as error:
        if refused := write_refusal(error, path):
            raise refused from error
        raise


def write_refusal(error: BaseException, path: Path | None = None) -> ArtifactError | None:
    """Return a message for a write error of the operating system, or for a file that may not be read; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if any(words in str(error) for words in _NO_SPACE):
        number = errno.ENOSPC
    if number not in _REFUSALS:
        return None
    what, remedy = _REFUSALS[number]
    named = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # filename2: a copy's target
    read = error.filename if isinstance(error, PermissionError) else None
    if isinstance(read, str | bytes) and not _readable(Path(os.fsdecode(read))):  # it may also be a file's number
        return ArtifactError(
            f"{os.fsdecode(read)}: cannot be opened: {what}",
            "let this user read it and enter its folders: chmod, chown",
        )
    return ArtifactError(f"{named or path or 'a file'}: cannot be written: {what}", remedy)


def _readable(path: Path) -> bool:
    """Return whether this user may enter the folders of ``path``, and read it if it is there."""
    if not all(os.access(folder, os.X_OK) for folder in path.parents if os.path.isdir(folder)):
        return False
    return not os.path.lexists(path) or os.access(path, os.R_OK)


def replace_directory(new: Path, out: Path) -> None:
    """Put ``new`` at ``out`` in one step, and then remove the old content."""
    if not out.exists():
        os.rename(new, out)
        return
    if not _exchange(new, out):
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        os.rename(out, old)
        os.rename(new, out)
        new = old
    shutil.rmtree(new)


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that determine a stage's output."""
    versions = {"deploykit": __version__}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what changes when ``path`` is replaced; None if it does not exist."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_dev, found.st_ino


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically (Linux renameat2 with RENAME_EXCHANGE); False where it cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _files_of(directory: Path) -> Iterable[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _again(kind: str | None) -> str:
    return f"copy it again, or run {_MADE_BY[kind]} again" if kind else "copy it again, or make it again"
