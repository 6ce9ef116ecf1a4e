"""The steps on the device, with a fake TensorRT. tests/e2e tests run.sh."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from jetson_bundles import silent, with_tensorrt_graphs

from deploykit.artifacts import load_manifest
from deploykit.errors import ArtifactError, CorruptArtifactError, EngineError, MissingDependencyError
from deploykit.jetson import check as checks
from deploykit.jetson import device
from deploykit.jetson.boards import JETPACKS
from deploykit.jetson.bundle import bundle, unpack
from deploykit.jetson.check import Finding, examine
from deploykit.jetson.contents import Description
from deploykit.jetson.library import LIBRARY
from deploykit.runtime.engines import load_engine
from deploykit.runtime.engines.native import loader
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.tasks.classification import bundle as classifier_bundle
from deploykit.tasks.translation import bundle as translator_bundle
from deploykit.tasks.translation.predictor import load_translator
from deploykit.tensorrt.build import Inputs
from deploykit.tensorrt.options import EngineOptions, Limits


def description(target: str = "orin-nano", jetpack: str = "6.2", *, wheels: bool = False) -> Description:
    release = JETPACKS[jetpack]
    return Description("m", target, jetpack, release.l4t, release.tensorrt, release.python, {"int8": ("model.qdq.onnx",)},
                       {}, (), "batch=1:4:16,length=16:64:128", 512, wheels)  # fmt: skip


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Examine a fake Jetson: its files are in a folder, and only its programs are on PATH."""

    def examined(
        needs: Description, *, model: str = "NVIDIA Jetson Orin Nano Developer Kit Super", release: str | None = "36.4.3",
        jetpack: str = "6.2+b77", tensorrt: str | None = "10.3.0", free_mib: int = 6000, mode: str = "MAXN_SUPER",
        engine: str = "tensorrt",
    ) -> list[Finding]:  # fmt: skip
        root, programs = tmp_path / "root", tmp_path / "bin"
        shutil.rmtree(root, ignore_errors=True)
        programs.mkdir(exist_ok=True)
        for folder in ("etc", "proc/device-tree"):
            (root / folder).mkdir(parents=True)
        (root / "proc/meminfo").write_text(f"MemTotal: 7990000 kB\nMemAvailable:  {free_mib * 1024} kB\n")
        (root / "proc/device-tree/model").write_text(f"{model}\0")
        if release is not None:
            major, _, revision = release.partition(".")
            (root / "etc/nv_tegra_release").write_text(f"# R{major} (release), REVISION: {revision}, GCID: 38968081\n")
        (root / "etc/nvpmodel.conf").write_text(
            "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"
        )
        for name, prints in (("nvpmodel", f"NV Power Mode: {mode}"), ("dpkg-query", jetpack)):
            (programs / name).write_text(f"#!/bin/sh\nprintf '%s' '{prints}'\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setattr(checks, "tensorrt_version", lambda: tensorrt)
        real = checks.importlib.util.find_spec
        monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: True if name == "tensorrt" else real(name))
        return examine(needs, engine, 35_000_000, root)

    return examined


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings if finding.what != "Python"}


def test_a_suitable_jetson_has_no_remarks(jetson: Callable[..., list[Finding]]) -> None:
    assert levels(jetson(description())) == dict.fromkeys(
        ("board", "JetPack", "Jetson Linux", "power mode", "TensorRT", "memory"), "ok"
    )


@pytest.mark.parametrize(
    ("differs", "what", "level", "said"),
    [
        ({"model": "NVIDIA Jetson AGX Orin Developer Kit"}, "board", "note", "bundle for this one"),
        ({"jetpack": "7.2"}, "JetPack", "problem", "--jetpack"),
        ({"jetpack": "6.2.1"}, "JetPack", "note", ""),
        ({"jetpack": ""}, "JetPack", "ok", ""),
        ({"release": "38.2"}, "Jetson Linux", "problem", "--jetpack"),
        ({"release": "36.5"}, "Jetson Linux", "note", ""),
        ({"tensorrt": None}, "TensorRT", "problem", "apt-get install nvidia-jetpack"),
        ({"tensorrt": "8.6.2"}, "TensorRT", "problem", "--jetpack"),
        ({"tensorrt": "10.7.0"}, "TensorRT", "note", ""),
        ({"free_mib": 900}, "memory", "problem", "isolate multi-user.target"),
        ({"mode": "15W"}, "power mode", "note", "sudo nvpmodel -m 2 (MAXN_SUPER)"),
    ],
)
def test_differences_are_named_with_a_remedy(
    jetson: Callable[..., list[Finding]], differs: dict[str, Any], what: str, level: str, said: str
) -> None:
    found = jetson(description(), **differs)
    (finding,) = [f for f in found if f.what == what]
    assert finding.level == level
    assert said in finding.remedy
    others = {other: of for other, of in levels(found).items() if other != what}
    assert set(others.values()) == {"ok"}


def test_a_machine_that_is_no_jetson_is_refused(jetson: Callable[..., list[Finding]]) -> None:
    found = jetson(description(), release=None)
    assert found[0].level == "problem"
    assert "not a Jetson" in str(found[0])
    assert "--engine onnxruntime" in found[0].remedy
    assert not {"board", "power mode"} & set(levels(found))
    on_cpu = jetson(description(), release=None, engine="onnxruntime")
    assert "problem" not in levels(on_cpu).values()
    assert on_cpu[0].level == "note"


def test_native_takes_tensorrts_place_on_a_jetsons_cpu(
    jetson: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "lacks", lambda: None)
    monkeypatch.setattr(loader, "instruction_set", lambda: "dotprod")
    found = jetson(description(), tensorrt=None, engine="native")
    assert levels(found) == {**dict.fromkeys(levels(found), "ok"), "TensorRT": "note"}
    assert "the model runs on the CPU" in next(finding.remedy for finding in found if finding.what == "TensorRT")
    assert next(finding.found for finding in found if finding.what == "native") == "dotprod"
    monkeypatch.setattr(loader, "lacks", lambda: "not built")
    assert levels(jetson(description(), engine="native"))["native"] == "problem"


@pytest.fixture
def unpacked(make_tiny_export: Callable[..., Path], tmp_path: Path) -> Path:
    export = with_tensorrt_graphs(make_tiny_export(tmp_path / "tiny"))
    bundle(export, tmp_path / "a.tgz", "orin-nano", "6.2", say=silent)
    return unpack(tmp_path / "a.tgz", tmp_path / "device")


@pytest.fixture
def unpacked_translator(tiny_translation_to_bundle: Path, tmp_path: Path) -> Path:
    bundle(tiny_translation_to_bundle, tmp_path / "fr.tgz", "orin-nano", "6.2", say=silent)
    return unpack(tmp_path / "fr.tgz", tmp_path / "device")


@dataclasses.dataclass(frozen=True)
class Built:
    file: str
    precision: str


class TensorRT:
    """A fake TensorRT: building copies the graph, and ONNX Runtime runs it with outputs multiplied by ``gain``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[EngineOptions] = []
        self.given: list[tuple[Limits, Inputs, Path | None]] = []
        self.gain = 1.0
        monkeypatch.setattr(device, "build_engine", self.build)
        monkeypatch.setattr(classifier_bundle, "load_engine", self.load)
        monkeypatch.setattr(translator_bundle, "load_translator", self.load_translator)
        step = Seq2SeqModel.step
        monkeypatch.setattr(Seq2SeqModel, "step", lambda model, tokens: step(model, tokens) * np.float32(self.gain))
        monkeypatch.setattr(device, "choose_builder", lambda name: name)
        monkeypatch.setattr(device, "tensorrt_version", lambda: "10.3.0")

    def build(
        self, graph: Path, precision: str, options: EngineOptions, limits: Limits, say: Any, *,
        inputs: Inputs, weights: Path | None,
    ) -> Built:  # fmt: skip
        options.check()
        self.options.append(options)
        self.given.append((limits, inputs, weights))
        engine = graph.with_name(f"{graph.stem}.engine")
        onnx.save(onnx.load(graph), engine)  # with its weights, as an engine has them
        return Built(engine.name, precision)

    def load_translator(
        self, folder: Path, task: Any, files: Sequence[str], threads: int, *, engine: str, max_rows: int
    ) -> Any:
        assert (engine, max_rows, {Path(file).suffix for file in files}) == ("tensorrt", 16, {".engine"})
        return load_translator(folder, task, files, threads, max_rows=max_rows)

    def load(self, name: str, graph: Path) -> Any:
        assert (name, graph.suffix) == ("tensorrt", ".engine")
        engine = load_engine("onnxruntime", graph)
        run = engine.run
        engine.run = lambda inputs: [self.gain * output for output in run(inputs)]  # type: ignore[method-assign]
        return engine


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    return TensorRT(monkeypatch)


def on(root: Path, engine: str = "tensorrt", precision: str = "auto") -> device.Bundle:
    return device.Bundle(root, device.read_description(root), engine, precision)


def test_an_engine_is_built_within_the_boards_caps_verified_and_reused(
    unpacked: Path, tensorrt: TensorRT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = device.build(on(unpacked))
    (options,) = tensorrt.options
    assert (options.builder, options.gpu, options.workspace) == ("tensorrt", "this-gpu", "512MiB")
    assert options.profiles == ("batch=1:4:16,length=16:64:64",)
    assert (manifest.options["precision"], manifest.options["files"]) == ("int8", ["model.qdq.engine"])
    assert set(manifest.files) == {"model.qdq.engine", "tokenizer.json"}, "the graph itself is not served"
    assert manifest.metrics["engines"] == [{"file": "model.qdq.engine", "precision": "int8"}]
    device.verify(on(unpacked))
    assert "100% equal answers" in capsys.readouterr().out
    device.build(on(unpacked))
    assert len(tensorrt.options) == 1
    monkeypatch.setattr(device, "tensorrt_version", lambda: "10.7.0")
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 30)
    device.build(on(unpacked))
    assert tensorrt.options[-1].workspace == "256MiB", "another TensorRT needs another engine; less memory is left"
    assert device.build(on(unpacked, precision="fp16")).options["graph"] == "model.fp16.onnx"
    device.verify(on(unpacked))


def test_a_wrong_engine_is_refused_and_never_served(unpacked: Path, tensorrt: TensorRT) -> None:
    device.build(on(unpacked))
    for tensorrt.gain in (-1.0, float("nan")):
        with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="wrong answers: 64 rows") as refusal:
            device.verify(on(unpacked))
    assert "build again" in str(refusal.value.remedy)
    with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="wrong answers"):
        device.serve(on(unpacked), "127.0.0.1", 0)
    tensorrt.gain = 1.0 + 1e-4
    device.verify(on(unpacked))


def test_both_engines_of_a_translator_are_built_verified_and_a_wrong_one_is_refused(
    unpacked_translator: Path, tensorrt: TensorRT, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = device.build(on(unpacked_translator))
    engines = ["encoder.trt.int8.engine", "decoder.trt.int8.engine"]
    assert manifest.options["files"] == engines
    assert [engine["file"] for engine in manifest.metrics["engines"]] == engines
    assert {*engines, *device.read_description(unpacked_translator).tokenizer} == set(manifest.files)
    assert {options.profiles for options in tensorrt.options} == {("batch=1:4:16,length=1:64:128,past=1:64:128",)}
    for (limits, inputs, weights), name in zip(tensorrt.given, ("lengths", "past.0.key")):
        assert limits == {"length": 128, "past": 128}
        assert name in inputs
        assert weights is not None
        assert weights.name == "shared.trt.int8.bin"
    device.verify(on(unpacked_translator))
    assert "6 rows: translations have a chrF of 100.0 against the recorded ones (100% equal)" in capsys.readouterr().out
    tensorrt.gain = 1.0 + 1e-4
    device.verify(on(unpacked_translator))
    for tensorrt.gain in (-1.0, float("nan"), 1.5):  # with the last, a greedy search says the same, too sure of it
        with np.errstate(invalid="ignore"), pytest.raises(EngineError, match="wrong answers: 6 rows"):
            device.verify(on(unpacked_translator))


def test_a_bundle_without_native_needs_tensorrt(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not (unpacked / "lib" / LIBRARY).exists()
    monkeypatch.setattr(device, "tensorrt_version", lambda: None)
    assert device.choose_engine(unpacked) == "tensorrt"


def test_errors_of_a_step_have_a_remedy(
    unpacked: Path, tensorrt: TensorRT, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match="is not built yet"):
        device.verify(on(unpacked))
    device.build(on(unpacked, "onnxruntime"))
    with pytest.raises(ArtifactError, match="is built for onnxruntime"):
        device.verify(on(unpacked))
    with pytest.raises(ArtifactError, match="has no bf16 graph") as refusal:
        device.build(on(unpacked, precision="bf16"))
    assert "int8 or fp16" in str(refusal.value.remedy)
    manifest = device.build(on(unpacked))
    (unpacked / "model_repository/tiny/1" / manifest.options["files"][0]).write_bytes(b"changed")
    with pytest.raises(CorruptArtifactError, match="as in its manifest"):
        device.verify(on(unpacked))
    device.build(on(unpacked))
    assert "building again" in capsys.readouterr().out
    assert load_manifest(unpacked / "model_repository/tiny/1").files

    def missing(name: str) -> str:
        raise MissingDependencyError(name)

    monkeypatch.setattr(device, "choose_builder", missing)
    with pytest.raises(MissingDependencyError, match="neither TensorRT's Python module nor trtexec"):
        device.build(on(unpacked, precision="fp16"))
    monkeypatch.chdir(unpacked)
    assert device.main(["build", "--precision", "fp16"]) == 1
    assert "remedy: sudo apt-get install nvidia-jetpack" in capsys.readouterr().err
    (unpacked / "bundle.json").write_text(json.dumps({"name": "m"}))
    assert device.main(["check"]) == 1
    assert "bundle.json" in capsys.readouterr().err
