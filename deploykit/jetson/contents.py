"""The contents of a bundle, for the machine that makes it and the device.

run.sh                        checks SHA256SUMS, then runs deploykit.jetson.device
SHA256SUMS                    of every other file
bundle.json                   its purpose: a ``Description``
rows.json                     texts, and the graphs' answers to them: ``RecordedRows``
export/                       an export with the graphs to build from, tokenizer and calibration
model_repository/NAME/        config.pbtxt; the device builds version 1 (for a translator also NAME_stream, without
weights) config.json                   the same config, for machines without protobuf lib/deploykit/                this
package wheels.txt, wheels/           the Python packages that the device needs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploykit.artifacts import Manifest, hash_file
from deploykit.errors import ArtifactError, CorruptArtifactError, MissingDependencyError
from deploykit.runtime.find_graphs import find_graphs
from deploykit.tensorrt.build import Inputs

DESCRIPTION, ROWS, CONFIG_JSON, SUMS = "bundle.json", "rows.json", "config.json", "SHA256SUMS"
EXPORT, REPOSITORY, VERSION = "export", "model_repository", "1"


@dataclass(frozen=True)
class Description:
    """Contents of bundle.json.

    - ``graphs``: files that TensorRT builds from, by precision, the default one first: graphs, then external weights.
    - ``inputs``: the inputs of each graph file. ``tokenizer``: the other files of the model.
    - ``profile`` and ``workspace_mib``: the board's limits. ``wheels``: whether they are in the bundle.
    """

    name: str
    target: str
    jetpack: str
    l4t: str
    tensorrt: str
    python: str
    graphs: Mapping[str, Sequence[str]]
    inputs: Mapping[str, Inputs]
    tokenizer: Sequence[str]
    profile: str
    workspace_mib: int
    wheels: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


@dataclass(frozen=True)
class RecordedRows:
    """Real texts, and the answers to them by name of the (first) graph, of ONNX Runtime or, for its file, ``native``; see
    ``BundledTask.answers``."""

    texts: tuple[str, ...]
    answers: Mapping[str, Sequence[Any]]

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def read_description(bundle: Path) -> Description:
    """Read bundle.json. Raises CorruptArtifactError."""
    try:
        return Description(**_read(bundle / DESCRIPTION))
    except TypeError as error:
        raise CorruptArtifactError(f"{bundle / DESCRIPTION}: {error}", "unpack the bundle again") from error


def native_files(folder: Path, export: Manifest) -> tuple[str, ...]:
    """Return the files of the engine ``native`` in an export, none if it has none or the engine does not run here."""
    try:
        return find_graphs(folder, export, engine="native", precision="auto").files
    except (ArtifactError, MissingDependencyError):
        return ()


def read_rows(bundle: Path) -> RecordedRows:
    """Read rows.json. Raises CorruptArtifactError."""
    record = _read(bundle / ROWS)
    return RecordedRows(tuple(record["texts"]), record["answers"])


def read_config(bundle: Path) -> dict[str, Any]:
    """Read the model's config in Triton's JSON form. Raises CorruptArtifactError."""
    return _read(bundle / CONFIG_JSON)


def sums_of(files: Mapping[str, str]) -> str:
    """Return the text of SHA256SUMS for paths and their hashes, in the format of ``sha256sum --check``."""
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))


def verify_sums(bundle: Path) -> None:
    """Raise CorruptArtifactError naming the first file that differs, is missing, or is not listed."""
    again = "get the bundle again"
    try:
        lines = (bundle / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise CorruptArtifactError(f"{bundle / SUMS}: is missing or unreadable", again) from None
    listed = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    present = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if not path.is_dir()} - {SUMS}
    for path in sorted(listed.keys() | present):
        if path not in listed:
            raise CorruptArtifactError(f"{bundle / path}: is not in {SUMS}", again)
        if path not in present:
            raise CorruptArtifactError(f"{bundle / path}: is missing", again)
        if hash_file(bundle / path) != listed[path]:
            raise CorruptArtifactError(f"{bundle / path}: its SHA-256 differs from that in {SUMS}", again)


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifactError(f"{path}: cannot be read ({error})", "unpack the bundle again") from error
    return record
