"""A bundle has the library of the engine ``native`` that Zig compiled for its board."""

from __future__ import annotations

from pathlib import Path

import pytest
from jetson_bundles import silent
from native_encoders import runs_here

from deploykit.jetson import device
from deploykit.jetson.bundle import bundle, unpack
from deploykit.jetson.library import LIBRARY
from deploykit.runtime.engines import NATIVE_FILE


@runs_here
def test_a_translators_bundle_runs_native_where_tensorrt_is_missing(
    tiny_translation_to_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a.tgz", "b.tgz"):
        bundle(tiny_translation_to_bundle, tmp_path / name, "orin-nano", "6.2", name="fr", say=silent)
    assert (tmp_path / "a.tgz").read_bytes() == (tmp_path / "b.tgz").read_bytes()
    unpacked = unpack(tmp_path / "a.tgz", tmp_path / "device")
    assert (unpacked / "lib" / LIBRARY).read_bytes()[:20].endswith(b"\xb7\x00"), "an ELF file for aarch64"
    described = device.read_description(unpacked)
    native = device.Bundle(unpacked, described, "native", "auto")
    monkeypatch.setattr(device, "tensorrt_version", lambda: None)
    assert device.choose_engine(unpacked) == "native"
    assert "TensorRT is not installed: the engine native runs" in capsys.readouterr().out
    manifest = device.build(native)
    assert (manifest.options["precision"], *manifest.options["files"]) == ("int8", NATIVE_FILE)
    device.verify(native)
    assert "100% equal" in capsys.readouterr().out
    monkeypatch.setattr(device, "tensorrt_version", lambda: "10.3.0")
    assert device.choose_engine(unpacked) == "tensorrt"
