"""The TensorRT engine on a fake GPU, and on a real one if there is one."""

from __future__ import annotations

import ast
import dataclasses
import gc
import hashlib
import json
import re
import shutil
import sys
import threading
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import (
    HEADER,
    FakeDriver,
    fake_bindings,
    install_bindings,
    install_driver,
    names_used,
    overloads,
    real,
    write_engine,
)

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.doctor import examine
from deploykit.errors import ArtifactError, CorruptArtifactError, DeploykitError, EngineError, MissingDependencyError
from deploykit.runtime import cuda
from deploykit.runtime.cuda import Buffer, Gpu, Stream
from deploykit.runtime.engines import check_engine, load_engine
from deploykit.runtime.engines import tensorrt as module
from deploykit.runtime.engines.tensorrt import BINDINGS, read_record, record_path, runs_here
from deploykit.runtime.find_graphs import find_graphs
from deploykit.tasks.classification.rows import Example
from deploykit.tasks.opening import open_classifier
from deploykit.tensorrt.build import build_engine
from deploykit.tensorrt.options import EngineOptions, parse_profile

VERSION = "10.13.3"
PROFILES = ("batch=1:2:4,length=16:32:64", "batch=1:8:16,length=16:16:32")
TEXTS = [" ".join(f"w{i * n % 200}" for i in range(n)) for n in (1, 3, 12, 20, 33, 50, 7, 60, 61, 2, 15, 40, 5)]


def copy_export(export: Path, folder: Path) -> Path:
    shutil.copytree(export, folder)
    return folder


def add_engine(folder: Path, record: Any) -> Path:
    """Add an engine in an export's folder to its manifest."""
    old = load_manifest(folder, verify=False)
    write_manifest(folder, "export", old.task, inputs=old.inputs, metrics={"engines": [dataclasses.asdict(record)]})
    return folder / record.file


@pytest.fixture(params=["tensorrt", "rtx", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine_file(request: pytest.FixtureRequest, tmp_path: Path, tiny_export: Path, monkeypatch: Any) -> Path:
    """An engine of the tiny model in an export: by each builder on the fake GPU, and a real one."""
    folder = copy_export(tiny_export, tmp_path / "export")
    graph = folder / "model.onnx"
    if request.param == "gpu":
        if not cuda.has_gpu():
            pytest.skip("needs an NVIDIA GPU")
        options = EngineOptions(("fp32",), PROFILES, gpu="this-gpu")
        return add_engine(folder, build_engine(graph, "fp32", options, {"length": 64}, lambda line: None))
    fake = request.getfixturevalue("driver")
    install_bindings(monkeypatch, BINDINGS[request.param], fake_bindings(fake, BINDINGS[request.param], VERSION))
    profiles = [parse_profile(text) for text in PROFILES]
    record = write_engine(folder / "model.engine", graph, profiles, request.param, VERSION, "sm_86")
    return add_engine(folder, record)


def inputs(rows: int, length: int, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    mask = (np.arange(length) < random.integers(1, length + 1, (rows, 1))).astype(np.int64)
    return {"input_ids": random.integers(0, 200, (rows, length)) * mask, "attention_mask": mask}


def test_an_engine_answers_as_the_graph_that_it_was_built_from(engine_file: Path) -> None:
    engine = load_engine("tensorrt", engine_file)
    reference = load_engine("onnxruntime", engine_file.with_name("model.onnx"))
    assert engine.token_budget == 512, "of the largest profile"
    # Sizes of each profile, more rows than a profile has, and each shape twice, because the second run may use a CUDA
    # graph.
    for rows, length in [
        (1, 16),
        (4, 64),
        (3, 48),
        (16, 32),
        (16, 16),
        (1, 16),
        (9, 64),
        (37, 32),
        (4, 64),
        (1, 16),
        (9, 64),
    ]:
        given = inputs(rows, length, rows * length)
        (got,), (expected,) = engine.run(given), reference.run(given)
        assert got.dtype == np.float32
        np.testing.assert_allclose(
            got, expected, atol=0 if isinstance(engine._loaded.gpu._library, FakeDriver) else 1e-2
        )


def test_answers_are_the_callers_own(engine_file: Path) -> None:
    engine = load_engine("tensorrt", engine_file)
    first = engine.run(inputs(2, 16, 1))[0]
    kept = first.copy()
    engine.run(inputs(2, 16, 2))
    assert (first == kept).all()


def test_any_thread_may_run_an_engine(engine_file: Path) -> None:
    engine = load_engine("tensorrt", engine_file)
    expected, got = engine.run(inputs(2, 16))[0], []
    thread = threading.Thread(target=lambda: got.append(engine.run(inputs(2, 16))[0]))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(got[0], expected)


def test_a_length_outside_the_profiles_is_refused_with_the_command(engine_file: Path) -> None:
    engine = load_engine("tensorrt", engine_file)
    with pytest.raises(
        EngineError, match=r"no profile allows texts padded to 80 tokens \(profiles: batch=1:2:4"
    ) as refused:
        engine.run(inputs(1, 80))
    assert "longer --maxShapes: deploykit export" in str(refused.value.remedy)


def test_texts_are_classified_as_on_the_cpu(engine_file: Path) -> None:
    on_gpu = open_classifier(str(engine_file.parent), url="", engine="tensorrt")
    on_cpu = open_classifier(str(engine_file.parent), url="", engine="onnxruntime", precision="fp32")
    np.testing.assert_allclose(on_gpu.scores(TEXTS * 3), on_cpu.scores(TEXTS * 3), atol=1e-3)


def test_an_engine_that_runs_here_is_graded_as_it_answers(engine_file: Path) -> None:
    from deploykit.tasks.classification.export import _Grader

    reference = open_classifier(str(engine_file.parent), url="", engine="onnxruntime", precision="fp32")
    rows = [Example(text, label, "") for text, label in zip(TEXTS, reference.task.decide(reference.scores(TEXTS)))]
    grader = _Grader(engine_file.parent, reference.task, rows, lambda: TEXTS)
    grader.grade_checkpoint(reference)
    line = grader.grade_engine(read_record(engine_file))
    assert (line.precision, line.engine, line.figures["accuracy"], line.agreement) == ("fp32", "tensorrt", 1.0, 1.0)


def test_auto_picks_only_an_engine_that_runs_here(engine_file: Path) -> None:
    manifest = load_manifest(engine_file.parent)
    graphs = find_graphs(engine_file.parent, manifest, engine="auto", precision="auto")
    assert (graphs.engine, graphs.precision) == ("tensorrt", "fp32")
    assert graphs.files == (engine_file.name, record_path(engine_file).name)
    assert find_graphs(engine_file.parent, manifest, engine="auto", precision="int8").engine == "openvino"
    change(engine_file, target="sm_99")
    assert not runs_here(engine_file)
    assert find_graphs(engine_file.parent, manifest, engine="auto", precision="auto").engine == "openvino"
    with pytest.raises(ArtifactError, match="no bf16 graph for the engine tensorrt") as missing:
        find_graphs(engine_file.parent, manifest, engine="tensorrt", precision="bf16")
    assert "--trt --precision bf16" in str(missing.value.remedy)


def change(engine: Path, **values: Any) -> None:
    record = dataclasses.replace(read_record(engine), **values)
    record.save(engine)


@pytest.mark.parametrize(
    ("values", "says", "remedy"),
    [
        ({"version": "10.3.0"}, "built by TensorRT 10.3.0; the installed version, 10.13.3", r"--trt --precision fp32 --builder tensorrt --gpu this-gpu --force"),
        ({"version": "10.3.0", "target": "portable"}, "built by TensorRT 10.3.0", "--gpu portable --force"),
        ({"target": "sm_90"}, r"built for sm_90, but this GPU \(Fake GPU\) is sm_86", "--builder tensorrt --gpu this-gpu"),
        ({"builder": "rtx", "version": "1.2.3"}, "TensorRT-RTX 1.2.3; the installed version", r"pip install tensorrt-rtx==1\.2\.3"),
        ({"sha256": "0"}, "SHA-256 differs", "deploykit export runs/a"),
    ],
)  # fmt: skip
def test_an_engine_for_another_gpu_or_version_is_refused_before_it_is_deserialized(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any, values: Any, says: str, remedy: str
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        bindings = fake_bindings(driver, name, VERSION)
        bindings.Runtime = None
        install_bindings(monkeypatch, name, bindings)
    file = tmp_path / "model.engine"
    write_engine(file, tiny_export / "model.onnx", [parse_profile(PROFILES[0])], "tensorrt", VERSION, "sm_86")
    change(file, **values)
    with pytest.raises(DeploykitError, match=says) as refused:
        load_engine("tensorrt", file)
    assert re.search(remedy, str(refused.value.remedy)), refused.value.remedy


def test_a_portable_engine_is_for_the_gpus_that_its_builder_makes_it_for(driver: FakeDriver, tmp_path: Path, tiny_export: Path,
                                                                         monkeypatch: Any) -> None:  # fmt: skip
    driver.capability = (7, 5)
    for builder, runs in (("rtx", True), ("tensorrt", False)):
        install_bindings(monkeypatch, BINDINGS[builder], fake_bindings(driver, BINDINGS[builder], VERSION))
        file = tmp_path / f"{builder}.engine"
        write_engine(file, tiny_export / "model.onnx", [parse_profile(PROFILES[0])], builder, VERSION, "portable")
        assert runs_here(file) is runs
    driver.capability = (12, 0)
    assert runs_here(file)


def test_an_invalid_engine_is_refused_with_tensorrts_message(engine_file: Path) -> None:
    engine_file.write_bytes(b"no engine" * 500)
    change(engine_file, sha256=hashlib.sha256(engine_file.read_bytes()).hexdigest())
    with pytest.raises(EngineError, match=r"cannot be loaded: .*Serialization") as refused:
        load_engine("tensorrt", engine_file)
    assert "deploykit export" in str(refused.value.remedy)


def test_an_engine_without_a_readable_record_is_refused(engine_file: Path) -> None:
    record_path(engine_file).write_text(json.dumps({"file": "x"}))
    with pytest.raises(CorruptArtifactError, match=r"\.json: is not an engine's record"):
        load_engine("tensorrt", engine_file)
    record_path(engine_file).unlink()
    with pytest.raises(EngineError, match=r"\.json: no such file"):
        load_engine("tensorrt", engine_file)


def test_without_bindings_the_package_is_named(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "model.engine"
    write_engine(file, tiny_export / "model.onnx", [parse_profile(PROFILES[0])], "tensorrt", VERSION, "sm_86")
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # makes the import fail
    with pytest.raises(
        MissingDependencyError, match=rf"was built by TensorRT {VERSION}, which is not installed"
    ) as missing:
        load_engine("tensorrt", file)
    assert missing.value.remedy == f"pip install tensorrt=={VERSION}"


def test_without_a_driver_or_gpu_the_engine_is_refused_and_never_chosen(
    tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    for fake, says in ((None, "driver is not installed"), (FakeDriver(devices=0), "no GPU 0: the driver sees 0")):
        install_driver(monkeypatch, fake)
        with pytest.raises(MissingDependencyError, match=says):
            Gpu()
        with pytest.raises(MissingDependencyError, match="engine tensorrt needs an NVIDIA GPU") as missing:
            check_engine("tensorrt")
        assert "--engine onnxruntime" in str(missing.value.remedy)
        assert not examine()["engines"]["tensorrt"]
        assert (
            find_graphs(tiny_export, load_manifest(tiny_export), engine="auto", precision="auto").engine == "openvino"
        )


def test_a_driver_without_the_functions_is_too_old(monkeypatch: Any) -> None:
    fake = FakeDriver()
    del fake.cuGraphInstantiateWithFlags
    install_driver(monkeypatch, fake)
    with pytest.raises(MissingDependencyError, match="too old"):
        Gpu()


def test_a_full_gpu_is_named_and_all_memory_is_freed(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    driver.free = 70_000  # enough for the engine's scratch memory, not for the tensors
    with pytest.raises(EngineError, match="out of memory") as full:
        make(driver, tmp_path, tiny_export, monkeypatch, "tensorrt")
    assert "smaller --maxShapes" in str(full.value.remedy)


def test_other_driver_failures_have_the_drivers_message(driver: FakeDriver) -> None:
    with pytest.raises(EngineError, match=r"CUDA: cuStreamCreate: invalid device context \(201\)"):
        Stream(Gpu())


def make(driver: FakeDriver, tmp_path: Path, export: Path, monkeypatch: Any, builder: str, **options: Any) -> Any:
    install_bindings(monkeypatch, BINDINGS[builder], fake_bindings(driver, BINDINGS[builder], VERSION, **options))
    file = tmp_path / "model.engine"
    write_engine(file, export / "model.onnx", [parse_profile("batch=4:4:8,length=16:32:64")], builder, VERSION, "sm_86")
    return load_engine("tensorrt", file)


def test_a_shape_is_captured_once_and_then_launched_whole(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    engine = make(driver, tmp_path, tiny_export, monkeypatch, "tensorrt")
    engine.run(inputs(5, 32))
    memory = len(driver.device), len(driver.host)
    counts = dict(driver.counts)
    for seed in range(3):
        engine.run(inputs(5, 32, seed))
    grown = {name: n - counts.get(name, 0) for name, n in driver.counts.items() if n != counts.get(name, 0)}
    assert grown == {"cuCtxSetCurrent": 3, "cuGraphLaunch": 3, "cuStreamSynchronize": 3}
    captured = driver.counts["cuGraphInstantiateWithFlags"]
    for rows in (6, 7, 8):
        engine.run(inputs(rows, 32))
    assert driver.counts["cuGraphInstantiateWithFlags"] == captured, "all are filled up to 8 rows"
    engine.run(inputs(8, 64))
    assert (len(driver.device), len(driver.host)) == memory, "no shape allocates any"


def test_the_shapes_kept_are_bounded(driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_GRAPHS", 2)
    engine = make(driver, tmp_path, tiny_export, monkeypatch, "tensorrt")
    for length in (16, 32, 16, 48):
        engine.run(inputs(4, length))
    gc.collect()
    assert len(driver.ready) == 2
    captured = driver.counts["cuGraphInstantiateWithFlags"]
    engine.run(inputs(4, 16))
    assert driver.counts["cuGraphInstantiateWithFlags"] == captured, "32 tokens were used the longest ago"


@pytest.mark.parametrize("builder", ["tensorrt", "rtx"])
def test_an_engine_that_cannot_be_captured_still_runs(driver: FakeDriver, tmp_path: Path, tiny_export: Path,
                                                            monkeypatch: Any, builder: str) -> None:  # fmt: skip
    engine = make(driver, tmp_path, tiny_export, monkeypatch, builder, capturable=False)
    reference = load_engine("onnxruntime", tiny_export / "model.onnx")
    for rows in (1, 6, 1, 6, 8):  # fewer rows than the profile's minimum are padded
        given = inputs(rows, 32, rows)
        np.testing.assert_array_equal(engine.run(given)[0], reference.run(given)[0])
    assert driver.counts.get("cuGraphLaunch", 0) == 0


def test_inputs_that_disagree_on_a_profile_are_refused(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    bindings = fake_bindings(driver, "tensorrt", VERSION)
    load = bindings.Runtime.deserialize_cuda_engine

    def disagreeing(runtime: Any, plan: bytes) -> Any:
        engine = load(runtime, plan)
        engine.get_tensor_profile_shape = lambda name, i: [(1, 16), (2, 16), (4 if name == "input_ids" else 8, 16)]
        return engine

    bindings.Runtime.deserialize_cuda_engine = disagreeing
    install_bindings(monkeypatch, "tensorrt", bindings)
    file = tmp_path / "model.engine"
    write_engine(file, tiny_export / "model.onnx", [parse_profile(PROFILES[0])], "tensorrt", VERSION, "sm_86")
    with pytest.raises(EngineError, match="input_ids and attention_mask disagree in profile 0"):
        load_engine("tensorrt", file)


def test_a_failed_run_is_reported_with_tensorrts_message(
    driver: FakeDriver, tmp_path: Path, tiny_export: Path, monkeypatch: Any
) -> None:
    engine = make(driver, tmp_path, tiny_export, monkeypatch, "rtx")
    engine.run(inputs(1, 16))
    engine._loaded._contexts[0, 0]._addresses.clear()
    with pytest.raises(EngineError, match=r"model\.engine: did not run 4 rows of 16 tokens: an address is missing"):
        engine.run(inputs(1, 16))


def test_memory_is_copied_to_the_gpu_and_back(driver: FakeDriver) -> None:
    gpu = Gpu()
    gpu.enter()
    buffer, stream = Buffer(gpu, 64), Stream(gpu)
    view = buffer.view((2, 4), np.int64)
    view[:] = np.arange(8).reshape(2, 4)
    buffer.upload(64, stream)
    stream.synchronize()
    view[:] = 0
    buffer.download(32, stream)
    assert (view == 0).all(), "not before the stream is synchronized"
    stream.synchronize()
    assert view.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert gpu.capability == "sm_86"


def test_the_drivers_functions_are_called_as_cuda_h_declares_them() -> None:
    assert cuda.FUNCTIONS == HEADER


def test_every_name_of_the_bindings_exists_in_the_installed_ones() -> None:
    """The fake's classes are checked against pybind's; this checks the engine's use of names."""
    source = Path(module.__file__)
    assert names_used(source), "the bindings are called trt there"
    for name in names_used(source):
        assert attrgetter(name)(real) is not None, name
    kinds = (real.Runtime, real.ICudaEngine, real.IExecutionContext, real.IRuntimeConfig)
    owners = ("_runtime", "_engine", "engine", "context", "config")
    seen = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and getattr(node.value, "attr", getattr(node.value, "id", "")) in owners:
            seen.add(node.attr)
            assert any(hasattr(kind, node.attr) for kind in kinds), node.attr
    assert {"execute_async_v3", "set_tensor_address", "set_device_memory", "device_memory_size_v2"} <= seen
    # Caches of bf16 are copied by size only, because numpy has no such type and the bindings raise TypeError.
    assert (real.DataType.BF16.itemsize, real.DataType.HALF.itemsize, real.DataType.FLOAT.itemsize) == (2, 2, 4)
    with pytest.raises(TypeError):
        real.nptype(real.DataType.BF16)
    # Other modules run engines only through this one.
    for user in ("tensorrt_classifier.py", "tensorrt_seq2seq.py"):
        text = source.with_name(user).read_text(encoding="utf-8")
        assert not re.search(r"\btrt\.|tensorrt_rtx|import tensorrt\b|_engine\b", text), user
    assert overloads("set_input_shape", real.IExecutionContext.set_input_shape.__doc__)[0] == [
        ("str", False),
        ("tuple", False),
    ]
