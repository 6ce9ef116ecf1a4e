"""Folders that a download or a disk damaged: each file, cut, empty or with one byte changed, is named before it is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import deploykit
from deploykit.artifacts import MANIFEST
from deploykit.errors import ArtifactError, CorruptArtifactError
from deploykit.triton.server import TritonServer

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "flipped": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :],
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(make_tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("made") / "checkpoint")


def _refuses(folder: Path, use: Callable[[], object], error: type[ArtifactError], damages: list[str]) -> None:
    """Damage each file of ``folder`` in each way. ``use`` must raise ``error``, which names the file.

    A byte of the manifest may belong to what it only tells, such as the versions of packages.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 2
    for path in files:
        whole = path.read_bytes()
        for damage in damages if path.name != MANIFEST else ["half", "empty"]:
            path.write_bytes(DAMAGES[damage](whole))
            with pytest.raises(error) as caught:
                use()
            assert str(path) in caught.value.message
            assert caught.value.remedy
        path.write_bytes(whole)
    use()


@pytest.mark.parametrize("stage", ["export", "finetune"])
def test_a_checkpoint_without_digests(stage: str, checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    out = tmp_path / "out"

    def use() -> None:
        if stage == "export":
            deploykit.export(folder, out, data=rows)
        else:
            deploykit.finetune(folder, train=rows, output_dir=out, max_steps=1)

    _refuses(folder, use, ArtifactError, ["half", "empty"])


def test_a_run(checkpoint: Path, rows: Path, tmp_path: Path) -> None:
    run = deploykit.finetune(checkpoint, train=rows, output_dir=tmp_path / "run", max_steps=1).path
    _refuses(run, lambda: deploykit.export(run, tmp_path / "out"), CorruptArtifactError, list(DAMAGES))


def test_an_export(tiny_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_export, tmp_path / "export")

    def load() -> None:
        with deploykit.load(folder, engine="onnxruntime"):
            pass

    _refuses(folder, load, CorruptArtifactError, list(DAMAGES))
    _refuses(
        folder,
        lambda: deploykit.package(folder, name="tiny", model_repository=tmp_path / "models"),
        CorruptArtifactError,
        list(DAMAGES),
    )


def test_a_packaged_model(tiny_export: Path, tmp_path: Path) -> None:
    deploykit.package(tiny_export, name="tiny", model_repository=tmp_path)
    server = TritonServer(tmp_path)
    _refuses(tmp_path / "tiny" / "1", server._servable, CorruptArtifactError, list(DAMAGES))
