"""Pack an export into one file for a Jetson, with everything to build its own engine offline and serve it."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict

import deploykit
from deploykit.artifacts import (
    MANIFEST,
    SAMPLES,
    Manifest,
    explained,
    hash_file,
    load_manifest,
    new_directory,
    new_file,
)
from deploykit.data.sample import evenly
from deploykit.errors import ArtifactError, CorruptArtifactError, DeploykitError, MissingDependencyError, UsageError
from deploykit.jetson import contents
from deploykit.jetson.boards import BOARDS, Board, JetPack, find_board, find_jetpack
from deploykit.jetson.contents import Description, RecordedRows
from deploykit.jetson.library import LIBRARY, library_for_arm
from deploykit.jetson.run_script import run_sh
from deploykit.runtime.engines.protocol import DecodeLimits
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import ServingSettings, check_name
from deploykit.signatures import sign, signature_of, verify_signature
from deploykit.tasks.bundle import BundledTask
from deploykit.tasks.protocol import TaskFacts
from deploykit.tasks.registry import task_of
from deploykit.tensorrt.options import Limits, Profile
from deploykit.triton.repository import CONFIG, STREAM_SUFFIX, config_text, validate_config

Say = Callable[[str], None]

PRECISIONS = ("int8", "fp16")
_ROWS = 64
_TIME = 315532800  # 1980, the earliest time that every archive format can store
# ONNX Runtime can replace TensorRT; 1.23 is its last release for Python 3.10.
_WHEELS = ("numpy==1.26.4", "psutil==7.2.2")
_MODULE_WHEELS = {
    "tokenizers": "tokenizers==0.23.3",
    "sentencepiece": "sentencepiece==0.2.3",
    "typing_extensions": "typing_extensions==4.16.0",
}
_ONNXRUNTIME = {"3.10": "onnxruntime==1.23.2", "3.12": "onnxruntime==1.31.1"}
_LEAST_GLIBC = 17  # lowest minor version in tags of aarch64 wheels


@dataclass(frozen=True)
class Bundled:
    """Result. ``files`` is their number in the bundle; ``native``: whether it has the engine for the board's CPU;
    ``signature`` is the path of its signature, if it is signed."""

    out: Path
    description: Description
    native: bool
    files: int
    size_bytes: int
    sha256: str
    signature: Path | None


def bundle(
    export_dir: Path,
    out: Path,
    target: str,
    jetpack: str,
    *,
    name: str | None = None,
    precision: str = "auto",
    data: str | None = None,
    wheels: Path | None = None,
    key: Path | None = None,
    require_signature: Path | None = None,
    force: bool = False,
    say: Say,
) -> Bundled:
    """Write ``out``, a .tar.gz whose bytes depend only on its inputs.

    ``precision`` is the device's default (auto: INT8 if the export has that graph). ``data`` is a file of
    texts to verify engines with, instead of the rows in the export. ``wheels`` is a folder of wheels for the device,
    which are included; missing ones are downloaded into it. ``key``, a private key in PEM, signs ``out``. With
    ``require_signature``, a public key, the export must be signed with its private key. The engine
    ``native`` is included if the export has its file, it runs here too, and ``library_for_arm`` finds its library.

    Raises UsageError, ArtifactError, MissingDependencyError or DeploykitError, leaving nothing at ``out``.
    """
    board = find_board(target)
    release = find_jetpack(jetpack, board)
    name = name or export_dir.resolve().name
    check_name(name)
    if out.exists() and not force:
        raise ArtifactError(f"{out}: already exists", "choose another --output, or pass --force to replace it")
    if require_signature is not None:
        verify_signature(export_dir, require_signature)
    whole = load_manifest(export_dir, "export")
    export = dataclasses.replace(whole, task=fitted(whole.task, BOARDS[board]), parent=whole.digest)
    part = task_of(export.task).bundle(export.task)
    graphs = _tensorrt_files(export_dir, export, part, precision)
    tokenizer = tuple(task_of(export.task).tokenizer_files(list(export.files)))
    most = BOARDS[board].max_batch
    description = Description(
        name=name,
        target=board,
        jetpack=release.version,
        l4t=release.l4t,
        tensorrt=release.tensorrt,
        python=release.python,
        graphs=graphs,
        inputs={
            file: part.inputs(export_dir / file)
            for files in graphs.values()
            for file in files
            if file.endswith(".onnx")
        },
        tokenizer=tokenizer,
        profile=str(_profile(part, export.task.shape_limits, most)),
        workspace_mib=BOARDS[board].workspace_mib,
        wheels=wheels is not None,
    )
    runs = [("onnxruntime", files) for files in graphs.values()]
    runs.append(("onnxruntime", find_graphs(export_dir, export, engine="onnxruntime", precision="auto").files))
    library = None
    if native := contents.native_files(export_dir, export):
        library = library_for_arm(wheels)
        if library is None:
            say(
                "without the engine native for the board's CPU: put deploykit's wheel for aarch64 into the folder of --wheels"
            )
        else:
            runs.append(("native", native))
    texts = _texts(export_dir, part, data)
    say(f"recording the answers to {len(texts)} rows")
    rows = _record(export_dir, part, runs, texts)

    config = config_text(export.task, part.settings(most))
    files: dict[str, bytes | Path] = {
        "run.sh": run_sh(part.modules).encode(),
        contents.DESCRIPTION: description.to_json().encode(),
        contents.ROWS: rows.to_json().encode(),
        contents.CONFIG_JSON: _config_json(config, name).encode(),
        f"{contents.REPOSITORY}/{name}/{CONFIG}": config.encode(),
        "wheels.txt": _wheel_list(release, part).encode(),
        **(_streamer(export, name) if part.streams else {}),
        **_export_files(export_dir, export, [*tokenizer, *(file for _, run in runs for file in run)]),
        **_own_source(),
    }
    if library is not None:
        files[f"lib/{LIBRARY}"] = library
    if wheels is not None:
        files.update({f"wheels/{path.name}": path for path in _wheels(wheels, release, part, say)})
    sums = {path: _digest(content) for path, content in files.items()}
    files[contents.SUMS] = contents.sums_of(sums).encode()
    say(f"writing {out}")
    with new_file(out) as file:
        _write_archive(file, f"{name}-{board}", files)
        if key is not None:
            sign(file, key, signature_of(out))
    signature = signature_of(out) if key is not None else None
    return Bundled(out, description, library is not None, len(files), out.stat().st_size, hash_file(out), signature)


def unpack(archive: Path, out: Path, *, public_key: Path | None = None) -> Path:
    """Verify a bundle and unpack it into a new folder ``out``, without running any of it. Returns the folder with
    run.sh.

    With ``public_key``, a PEM file, the signature is verified first. Raises ArtifactError for a file that is not a
    bundle, has links or paths that leave ``out``, or was changed; UsageError when ``out`` exists.
    """
    if out.exists():
        raise UsageError(
            f"{out}: already exists", "choose another --output-dir: a bundle is unpacked into a new folder"
        )
    if not archive.is_file():
        raise ArtifactError(f"{archive}: no such file", "check the path")
    if not hasattr(tarfile, "data_filter"):
        raise MissingDependencyError(
            "this Python unpacks archives without a filter", "use Python 3.10.12, 3.11.4 or newer"
        )
    if public_key is not None:
        verify_signature(archive, public_key, remedy="copy the bundle and its .sig file again")
    with new_directory(out) as folder:
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    if not (member.isreg() or member.isdir()):
                        raise ArtifactError(f"{archive}: {member.name} is not a plain file", "do not use this archive")
                    tar.extract(member, folder, filter="data")
        except tarfile.FilterError as error:
            raise ArtifactError(f"{archive}: {error}", "do not use this archive") from error
        except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorruptArtifactError(f"{archive}: is not a complete .tar.gz: {error}", "copy it again") from error
        tops = list(folder.iterdir())
        if len(tops) != 1 or not (tops[0] / "run.sh").is_file():
            raise ArtifactError(f"{archive}: is not a bundle", "give a file that deploykit bundle wrote")
        contents.verify_sums(tops[0])
    return out / tops[0].name


def _tensorrt_files(
    export_dir: Path, export: Manifest, part: BundledTask, precision: str
) -> dict[str, tuple[str, ...]]:
    """Return the export's files to build engines from, the default precision first."""
    present = {p: files for p in PRECISIONS if export.files.keys() >= set(files := part.files(p))}
    if precision not in ("auto", *PRECISIONS):
        raise UsageError(f"unknown --precision {precision!r}", f"choose one of: auto, {', '.join(PRECISIONS)}")
    if not present or precision not in ("auto", *present):
        missing = part.files("int8" if precision == "auto" else precision)[0]
        raise ArtifactError(
            f"{export_dir}: has no graph for TensorRT ({missing})",
            "export it again with --int8 --trt --precision fp16 --precision int8",
        )
    return dict(sorted(present.items(), key=lambda item: item[0] != precision))


def _profile(part: BundledTask, limits: Limits, most: int) -> Profile:
    lengths = {axis: (min(part.shortest, end), min(64, end), end) for axis, end in limits.items()}
    return Profile({"batch": (1, max(1, most // 4), most), **lengths})


def _texts(export_dir: Path, part: BundledTask, data: str | None) -> list[str]:
    source = data or str(export_dir / SAMPLES)
    if data is None and not (export_dir / SAMPLES).is_file():
        raise ArtifactError(
            f"{export_dir}: has no rows to verify an engine with",
            "give a file of texts with --data, or export the model again",
        )
    texts = [text for text in part.read(source, kept=data is None) if text]
    if not texts:
        raise ArtifactError(f"{source}: has no texts", "give another file with --data")
    return evenly(texts, _ROWS)


def _record(
    export_dir: Path, part: BundledTask, runs: Sequence[tuple[str, Sequence[str]]], texts: Sequence[str]
) -> RecordedRows:
    answers = {files[0]: part.answers(part.load(export_dir, files, engine, {}), texts) for engine, files in runs}
    return RecordedRows(tuple(texts), answers)


def _config_json(config: str, name: str) -> str:
    record = MessageToDict(validate_config(config), preserving_proto_field_name=True)
    return json.dumps({"name": name, **record}, indent=1, ensure_ascii=False) + "\n"


def _export_files(export_dir: Path, export: Manifest, needed: Sequence[str]) -> dict[str, bytes | Path]:
    """Return the needed files of the export, with a manifest of that part."""
    names = [*needed, *(n for n in ("calibration.json", "calibration.npz") if n in export.files)]
    part = dataclasses.replace(export, files={name: export.files[name] for name in names})
    files: dict[str, bytes | Path] = {f"{contents.EXPORT}/{name}": export_dir / name for name in names}
    return {**files, f"{contents.EXPORT}/{MANIFEST}": _manifest_text(part)}


def _streamer(export: Manifest, name: str) -> dict[str, bytes | Path]:
    """Return NAME_stream, which Triton serves in addition to the model."""
    model, options = f"{name}{STREAM_SUFFIX}", {"name": f"{name}{STREAM_SUFFIX}", "streams": name}
    manifest = dataclasses.replace(export, kind="model", files={}, options=options, metrics={})
    folder = f"{contents.REPOSITORY}/{model}"
    config = config_text(export.task, ServingSettings(), streams=name)
    return {f"{folder}/{CONFIG}": config.encode(), f"{folder}/{contents.VERSION}/{MANIFEST}": _manifest_text(manifest)}


def _manifest_text(manifest: Manifest) -> bytes:
    return (json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n").encode()


def _own_source() -> dict[str, bytes | Path]:
    package = Path(deploykit.__file__).parent
    return {f"lib/deploykit/{path.relative_to(package).as_posix()}": path for path in package.rglob("*.py")}


def _wheels_of(release: JetPack, part: BundledTask) -> list[str]:
    return sorted([*_WHEELS, _ONNXRUNTIME[release.python], *(_MODULE_WHEELS[module] for module in part.modules)])


def _wheel_list(release: JetPack, part: BundledTask) -> str:
    return (
        f"# For Python {release.python} on aarch64 (JetPack {release.version}); TensorRT comes with JetPack.\n"
        + "".join(f"{wheel}\n" for wheel in _wheels_of(release, part))
    )


def _wheels(folder: Path, release: JetPack, part: BundledTask, say: Say) -> list[Path]:
    """Return a file of ``folder`` for each required wheel, downloading missing ones. Raises DeploykitError."""
    wanted = _wheels_of(release, part)
    missing = [wheel for wheel in wanted if _find_wheel(folder, wheel, release) is None]
    if missing:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp",
            f"--python-version={release.python}", f"--dest={folder}", "--platform=manylinux2014_aarch64",
            *(f"--platform=manylinux_2_{minor}_aarch64" for minor in range(_LEAST_GLIBC, release.glibc + 1)), *missing,
        ]  # fmt: skip
        say(f"downloading {', '.join(missing)} into {folder}")
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        if done.returncode:
            raise DeploykitError(
                f"{folder}: lacks {', '.join(missing)}, and pip cannot download them: {' '.join(lines[-1:])}",
                f"put wheels for Python {release.python} on aarch64 there, or leave --wheels out",
            )
    return [path for wheel in wanted if (path := _find_wheel(folder, wheel, release)) is not None]


def _find_wheel(folder: Path, requirement: str, release: JetPack) -> Path | None:
    name, _, version = requirement.partition("==")
    paths = sorted(folder.glob(f"{name}-{version}-*.whl")) if folder.is_dir() else []
    return next((path for path in paths if fits(path.name, release)), None)


def fits(wheel: str, release: JetPack) -> bool:
    """Return whether a wheel's file name has tags for the JetPack's Python on aarch64 (PEP 425, PEP 600)."""
    pythons, abis, platforms = (tag.split(".") for tag in wheel.removesuffix(".whl").split("-")[-3:])
    minor = int(release.python.partition(".")[2])
    exact = f"cp3{minor}"
    stable = [tag for tag in pythons if (match := re.fullmatch(r"cp3(\d+)", tag)) and int(match[1]) <= minor]
    python = (
        (exact in pythons and exact in abis)
        or (bool(stable) and "abi3" in abis)
        or ("py3" in pythons and "none" in abis)
    )
    glibc = {f"manylinux_2_{n}_aarch64" for n in range(_LEAST_GLIBC, release.glibc + 1)}
    return python and not glibc.union({"manylinux2014_aarch64", "any"}).isdisjoint(platforms)


def _write_archive(path: Path, top: str, files: Mapping[str, bytes | Path]) -> None:
    """Write an archive with sorted names, one time and no owner, so that the same files give the same bytes (same
    zlib).
    """
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(f"{top}/{name}")
            member.mtime, member.mode = _TIME, 0o755 if name == "run.sh" else 0o644
            member.size = len(content) if isinstance(content, bytes) else content.stat().st_size
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
                tar.addfile(member, file)


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content)


def fitted(facts: TaskFacts, board: Board) -> TaskFacts:
    """Return the facts of a model limited to the cache positions of ``board``."""
    limits = DecodeLimits(board.max_batch, board.max_positions, board.max_positions)
    return task_of(facts).within(facts, limits)
