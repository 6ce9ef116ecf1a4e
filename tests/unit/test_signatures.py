"""Signatures of exports and models, made and verified offline."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from key_pairs import make_key_pair

from deploykit.cli import main
from deploykit.errors import ArtifactError, UsageError
from deploykit.signatures import SIGNATURE, sign, verify_signature
from deploykit.triton.repository import package

pytest.importorskip("model_signing", reason="needs model-signing: pip install 'deploykit[sign]'")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = tmp_path / "model"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text("backend: 'x'")
    (folder / "1" / "it's [a] model.onnx").write_bytes(b"weights")
    sign(folder, keys[0])
    verify_signature(folder, keys[1])
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "1" / "it's [a] model.onnx").write_bytes(b"Weights"),
         r"1/it's \[a\] model.onnx: was changed after it was signed"),
        (lambda folder: (folder / "config.pbtxt").unlink(), "config.pbtxt: was signed, and is missing"),
        (lambda folder: (folder / "1" / "b.onnx").touch(), "1/b.onnx: was added after"),
        (lambda folder: (folder / "2").symlink_to("1"), "2' because it is a symlink"),
        (lambda folder: (folder / SIGNATURE).unlink(), f"model: is not signed: .*{SIGNATURE} is missing"),
        (lambda folder: (folder / SIGNATURE).write_text("{}"), f"{SIGNATURE}: is no valid signature"),
        (lambda folder: (folder / SIGNATURE).write_bytes(b"\xff"), f"{SIGNATURE}: is no valid signature"),
        (lambda folder: shutil.rmtree(folder), "model: no such file or folder"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_signed_is_named(signed: Path, keys: tuple[Path, Path], change, message: str) -> None:
    change(signed)
    with pytest.raises(ArtifactError, match=message):
        verify_signature(signed, keys[1])


def test_a_changed_list_of_files_is_no_valid_signature(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "config.pbtxt").rename(signed / "xonfig.pbtxt")
    record = json.loads((signed / SIGNATURE).read_text())
    payload = base64.b64decode(record["dsseEnvelope"]["payload"]).replace(b"config.pbtxt", b"xonfig.pbtxt")
    record["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    (signed / SIGNATURE).write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="is no valid signature"):
        verify_signature(signed, keys[1])


def test_another_owner_is_refused(signed: Path, tmp_path: Path) -> None:
    private, public = make_key_pair(tmp_path, "other")
    with pytest.raises(ArtifactError, match=f"{SIGNATURE}: was made with another key than that of .*other.pub.pem"):
        verify_signature(signed, public)
    sign(signed, private)
    verify_signature(signed, public)


def test_keys_that_cannot_be_used_are_named(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    rsa, locked = tmp_path / "rsa.pem", tmp_path / "locked.pem"
    subprocess.run(["openssl", "genrsa", "-out", rsa, "2048"], check=True, capture_output=True)
    subprocess.run(["openssl", "ec", "-in", keys[0], "-aes256", "-passout", "pass:x", "-out", locked],
                   check=True, capture_output=True)  # fmt: skip
    for key, message in ((rsa, "not a private key of an elliptic curve"), (keys[1], "not a private key"),
                         (locked, "a key with a password"), (tmp_path / "gone", "No such file")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            sign(signed, key)
    with pytest.raises(UsageError, match="not a public key"):
        verify_signature(signed, keys[0])


def test_only_signed_exports_are_packaged_and_only_signed_models_served(
    tiny_export: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(*words: object) -> str:
        """Run a command that is refused. Returns its first line."""
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 1, result.output
        return result.stderr.splitlines()[-2]

    private, public = keys
    export, models = tmp_path / "export", tmp_path / "models"
    shutil.copytree(tiny_export, export)
    packaging = ("package", export, "--name", "tiny", "--model-repository", models, "--require-signature", public)
    assert f"error: {export}: is not signed" in run(*packaging)
    assert CliRunner().invoke(main, ["sign", str(export), "--key", str(private)]).exit_code == 0
    package(export, "tiny", models, require_signature=public)

    serving = ("serve", "--model-repository", models, "--require-signature", public, "--http-port", "0",
               "--grpc-port", "0", "--metrics-port", "0")  # fmt: skip
    assert f"error: {models}/tiny: is not signed" in run(*serving)
    sign(models / "tiny", private)
    with (models / "tiny" / "config.pbtxt").open("a") as config:
        config.write("# edited\n")
    assert f"error: {models}/tiny/config.pbtxt: was changed after it was signed" in run(*serving)
