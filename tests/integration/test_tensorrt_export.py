"""Building TensorRT engines: real ones by TensorRT-RTX without a GPU, and the calls of other builders."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from fake_gpu import FakeDriver, install_driver, names_used
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForSeq2SeqLM

from deploykit.artifacts import hash_file
from deploykit.cli import main
from deploykit.errors import ExportError, MissingDependencyError, UsageError
from deploykit.graphs.export_options import ExportOptions
from deploykit.graphs.families import read_architecture
from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs
from deploykit.quantization.qdq import quantize
from deploykit.runtime.engines.tensorrt import read_record
from deploykit.stages import export as run
from deploykit.tensorrt import build as tensorrt
from deploykit.tensorrt.build import build_engine, choose_builder, count_layers, read_inputs, trtexec_command
from deploykit.tensorrt.options import (
    EngineOptions,
    parse_profile,
    parse_size,
    profiles_of_shapes,
    shapes_of_profile,
    workspace_of_pools,
)

trt = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
WIDTH = 64
LIMITS = {"length": 64}
TRANSLATOR = {"length": 64, "past": 32}
RTX = EngineOptions(builder="rtx")


def write_graph(path: Path, *, quantized: bool = False, operator: str = "Relu", kind: type = np.float16) -> Path:
    """Write a graph with a classifier's inputs: embedding, linear layer, activation, linear layer, mean."""
    random = np.random.default_rng(0)
    of = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weights = {
        "table": random.normal(size=(100, WIDTH)).astype(kind),
        "up": (random.normal(size=(WIDTH, WIDTH)) / 8).astype(kind),
        "down": (random.normal(size=(WIDTH, WIDTH)) / 8).astype(kind),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "up"], ["raised"], "/model/layer.0/up/MatMul"),
        helper.make_node(operator, ["raised"], ["active"], "/model/layer.0/act/Act"),
        helper.make_node("MatMul", ["active", "down"], ["lowered"], "/model/layer.0/down/MatMul"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=of),
        helper.make_node("Unsqueeze", ["mask", "two"], ["column"]),
        helper.make_node("Mul", ["lowered", "column"], ["masked"]),
        helper.make_node("ReduceMean", ["masked", "one"], ["logits"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    tensors += [numpy_helper.from_array(np.array([n], np.int64), name) for name, n in (("one", 1), ("two", 2))]
    output = helper.make_tensor_value_info("logits", of, ["batch", WIDTH])
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    if quantized:
        model, _ = quantize(model, {"embedded": (-4, 4), "active": (-4, 4)}, "s8s8", embeddings=False)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("target", ["portable", "sm_86"])
def test_a_q_dq_graph_becomes_an_engine_of_int8_layers(tmp_path: Path, target: str) -> None:
    graph = write_graph(tmp_path / "model.qdq.onnx", quantized=True)
    options = EngineOptions(
        builder="rtx", gpu=target, profiles=("batch=1:4:8,length=1:16:64", "batch=1:1:1,length=1:8:16")
    )
    engine = build_engine(graph, "int8", options, LIMITS, lambda line: None)
    assert engine.int8_gemms == 2 * len(options.profiles), "two matrix products, of each profile's own"
    assert engine.layers["gemm Int8"] + engine.layers.get("runtime_fusion Int8", 0) == engine.int8_gemms
    assert (engine.builder, engine.target, engine.version) == ("rtx", target, trt.__version__)
    assert engine.profiles == options.profiles
    written = tmp_path / engine.file
    assert written.stat().st_size == engine.size_bytes > 1000
    assert "LayerType" in written.with_suffix(".log").read_text()


def test_a_half_graph_becomes_an_engine_without_int8(tmp_path: Path) -> None:
    lines: list[str] = []
    engine = build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", RTX, LIMITS, lines.append)
    assert engine.int8_gemms == 0
    assert any(kind.endswith("Half") for kind in engine.layers)
    assert engine.profiles == ("batch=1:8:32,length=1:64:64",)
    assert "0 INT8 matrix products" in lines[-1]


def test_an_engines_record_describes_it(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.qdq.onnx", quantized=True)
    options = EngineOptions(builder="rtx", gpu="sm_86", command="deploykit export a --out b --trt")
    engine = build_engine(graph, "int8", options, LIMITS, lambda line: None, calibration="ranges")
    assert read_record(tmp_path / engine.file) == engine
    assert engine.graph_digest == hash_file(graph)
    assert engine.sha256 == hash_file(tmp_path / engine.file)
    assert engine.calibration == "ranges"
    assert engine.rebuild() == "deploykit export a --out b --trt --builder rtx --gpu sm_86 --force"


@pytest.mark.parametrize(
    "options",
    [ExportOptions(trt=EngineOptions(("fp16",))),
     ExportOptions(int8=True, method="mse", max_drop=3.0, calibration_rows=8, data="a b.csv",
                   trt=EngineOptions(("fp32", "int8"), ("batch=1:1:1,length=8:8:8", "batch=1:2:4,length=8:8:8"), "2GiB"))],
)  # fmt: skip
def test_the_command_kept_for_building_again_asks_for_the_same(
    options: ExportOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        run, "export", lambda checkpoint, out, options, **_: asked.append((checkpoint, out, options)) or 1 / 0
    )
    words = shlex.split(run.command_of(Path("runs/a b"), Path("exports/a"), options))
    assert CliRunner().invoke(main, words[1:]).exit_code == 1
    assert asked == [(Path("runs/a b"), Path("exports/a"), options)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of engines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deploykit" / "engines"


def test_an_engine_is_built_once_for_all_exports_with_the_same_graph(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = [write_graph(_folder(tmp_path / name) / "model.qdq.onnx", quantized=True) for name in ("a", "b")]
    options = EngineOptions(builder="rtx", gpu="sm_86", command="first")
    first = build_engine(graphs[0], "int8", options, LIMITS, lambda line: None)
    monkeypatch.setattr(tensorrt, "_build_here", lambda *_: 1 / 0)
    said: list[str] = []
    again = build_engine(graphs[1], "int8", replace(options, command="second"), LIMITS, said.append)
    assert "reused from" in said[0]
    assert again == replace(first, command="second")
    for suffix in (".engine", ".log"):
        one, other = ((graph.parent / first.file).with_suffix(suffix) for graph in graphs)
        assert one.read_bytes() == other.read_bytes()
    assert read_record(graphs[1].parent / again.file) == again

    for other in (replace(options, workspace="2GiB"), replace(options, gpu="sm_89"),
                  replace(options, profiles=("batch=1:1:1,length=8:8:8",))):  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            build_engine(graphs[1], "int8", other, LIMITS, lambda line: None)
    for precision, graph in (("fp16", graphs[1]), ("int8", write_graph(graphs[1], kind=np.float32))):
        with pytest.raises(ZeroDivisionError):
            build_engine(graph, precision, options, LIMITS, lambda line: None)
    monkeypatch.setattr(trt, "__version__", "9.9")
    with pytest.raises(ZeroDivisionError):
        build_engine(graphs[0], "int8", options, LIMITS, lambda line: None)


def test_other_weights_beside_the_same_graph_are_another_engine(tmp_path: Path, cache: Path) -> None:
    graph, weights, said = write_graph(tmp_path / "model.fp16.onnx"), tmp_path / "shared.bin", []
    for content in (b"a", b"b", b"a"):
        weights.write_bytes(content)
        build_engine(graph, "fp16", RTX, LIMITS, said.append, weights=weights)
    assert [line.startswith("building") for line in said if "building" in line or "reused from" in line] == [
        True, True, False,
    ]  # fmt: skip


def test_a_classifiers_engine_is_built_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jetson has no onnx."""
    graph = write_graph(tmp_path / "model.fp16.onnx")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert build_engine(graph, "fp16", RTX, LIMITS, lambda line: None).size_bytes > 1000


def test_a_damaged_engine_in_the_cache_is_built_again(tmp_path: Path, cache: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    first = build_engine(graph, "fp16", RTX, LIMITS, lambda line: None)
    (kept,) = cache.glob("*/engine")
    kept.write_bytes(kept.read_bytes()[:-1])
    said: list[str] = []
    assert build_engine(graph, "fp16", RTX, LIMITS, said.append).sha256 == first.sha256
    assert said[0].startswith("building")
    assert hash_file(kept) == first.sha256, "and kept"


def test_an_unwritable_cache_does_not_fail_the_build(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file stands here")
    said: list[str] = []
    engine = build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", RTX, LIMITS, said.append)
    assert (tmp_path / engine.file).is_file()
    assert "is not cached" in said[-1]


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_same_graph_gives_the_same_engine(tmp_path: Path, cache: Path) -> None:
    graph = write_graph(tmp_path / "model.qdq.onnx", quantized=True)
    first = (tmp_path / build_engine(graph, "int8", RTX, LIMITS, lambda line: None).file).read_bytes()
    shutil.rmtree(cache)
    second = (tmp_path / build_engine(graph, "int8", RTX, LIMITS, lambda line: None).file).read_bytes()
    assert first == second


def test_int8_that_no_layer_computes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"rtx runs none of model\.qdq\.onnx's layers in INT8"):
        build_engine(write_graph(tmp_path / "model.qdq.onnx"), "int8", RTX, LIMITS, lambda line: None)


def test_an_operator_unsupported_by_tensorrt_is_named_with_its_module(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx", operator="Det")
    model = onnx.load(graph)
    model.graph.node[2].op_type = "SplitToSequence"
    onnx.save(model, graph)
    with pytest.raises(ExportError, match=r"operator SplitToSequence of model\.fp16\.onnx .*layer\.0\.act"):
        build_engine(graph, "fp16", RTX, LIMITS, lambda line: None)
    assert not list(tmp_path.glob("*.engine"))


def test_an_unknown_operator_is_named_with_a_remedy(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    model = onnx.load(graph)
    for node in (model.graph.node[2], model.graph.node[3]):
        node.op_type, node.domain = f"Secret{node.op_type}", "com.acme"
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    onnx.save(model, graph)
    with pytest.raises(ExportError, match=r"SecretRelu of model\.fp16\.onnx \(node /model/layer\.0/act/Act, from the PyTorch "
                       r"module layer\.0\.act\)") as refused:  # fmt: skip
        build_engine(graph, "fp16", RTX, LIMITS, lambda line: None)
    assert "change the module layer.0.act to use other operators" in str(refused.value.remedy)
    assert not list(tmp_path.glob("*.engine"))


def test_an_input_that_no_profile_fits_is_named(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    model = onnx.load(graph)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, graph)
    with pytest.raises(
        ExportError, match=r"attention_mask and profile 0\. At dimension axis 0, profile has min=1, opt=8"
    ) as refused:
        build_engine(graph, "fp16", RTX, LIMITS, lambda line: None)
    assert "fit every input" in str(refused.value.remedy)


def test_a_profile_that_the_builder_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.IBuilderConfig, "add_optimization_profile", lambda *_: -1)
    with pytest.raises(ExportError, match=r"rtx refuses the profile batch=1:8:32,length=1:64:64"):
        build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", RTX, LIMITS, lambda line: None)


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [("Error Code 2: OutOfMemory (no further information)", "smaller --memPoolSize"),
     ("Autotuner: no tactics to implement operation; insufficient memory", "smaller --memPoolSize"),
     ("CUDA initialization failure with error: 35", "driver is as new as"), ("an internal assertion", "report this graph")],
)  # fmt: skip
def test_a_failed_build_is_an_error_with_a_remedy_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, remedy: str
) -> None:
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda *_: None)
    monkeypatch.setattr(tensorrt, "last_error", lambda lines: reason)
    with pytest.raises(ExportError, match=f"cannot build model.fp16.onnx: {re.escape(reason)}") as failed:
        build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", RTX, LIMITS, lambda line: None)
    assert remedy in str(failed.value.remedy)
    assert not list(tmp_path.glob("*.engine"))


@pytest.mark.parametrize("builder", ["tensorrt", "trtexec"])
def test_a_builder_that_needs_a_gpu_says_so_before_any_work(builder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, None)
    monkeypatch.setattr(tensorrt, "choose_builder", lambda name: name)
    with pytest.raises(MissingDependencyError, match=f"--builder {builder} needs an NVIDIA GPU") as missing:
        tensorrt.plan(EngineOptions(builder=builder), LIMITS)
    assert "--builder rtx" in str(missing.value.remedy)


def test_a_file_that_is_no_graph_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.fp16.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"model\.fp16\.onnx"):
        build_engine(tmp_path / "model.fp16.onnx", "fp16", RTX, LIMITS, lambda line: None)


def test_a_builder_without_a_result_is_an_error(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    model = onnx.load(graph)
    # An INT8 constant that is no quantized weight: parsed, and refused when building.
    table = next(t for t in model.graph.initializer if t.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.ones((100, WIDTH), np.int8), "table"))
    model.graph.node[0].output[0] = "rows"
    model.graph.node.insert(1, helper.make_node("Cast", ["rows"], ["embedded"], to=TensorProto.FLOAT16))
    onnx.save(model, graph)
    with pytest.raises(ExportError, match=r"cannot build model\.fp16\.onnx: .*Quantized constant"):
        build_engine(graph, "fp16", RTX, LIMITS, lambda line: None)
    assert not list(tmp_path.glob("*.engine"))


def test_a_gpu_unknown_to_rtx_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(UsageError, match="sm_87") as refused:
        build_engine(graph, "fp16", EngineOptions(builder="rtx", gpu="sm_87"), LIMITS, lambda line: None)
    assert "sm_86" in str(refused.value.remedy)


@pytest.mark.skipif(tensorrt.has_gpu(), reason="there is a driver")
def test_an_engine_for_this_gpu_needs_a_driver(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(UsageError, match="no NVIDIA driver"):
        build_engine(graph, "fp16", EngineOptions(builder="rtx", gpu="this-gpu"), LIMITS, lambda line: None)


def test_a_timing_cache_is_not_for_rtx(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(UsageError, match="--timingCacheFile"):
        build_engine(graph, "fp16", EngineOptions(builder="rtx", timing_cache="t.cache"), LIMITS, lambda line: None)


@pytest.mark.parametrize(
    ("text", "says"),
    [("batch=1:8:32", "length is missing"), ("length=1:2:3", "batch is missing"), ("rows=1:2:3", "unknown axis 'rows'"),
     ("batch=1:8,length=1:2:3", "must be three numbers"), ("batch=8:4:2,length=1:2:3", "must grow"),
     ("batch=0:1:2,length=1:2:3", "must grow"), ("batch=1:1:1,length=1:2:999", "a length of up to 64, not 999"),
     ("", "unknown axis ''"), ("batch=-1:2:3,length=1:2:3", "must be three numbers")],
)  # fmt: skip
def test_a_senseless_profile_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_profile(text, LIMITS)


@pytest.mark.parametrize(
    ("text", "says"),
    [("batch=1:8:32,length=1:16:64", "past is missing"), ("batch=1:8:32,length=1:16:64,past=1:2:99", "a past of up to 32")],
)  # fmt: skip
def test_a_profile_of_a_translator_has_a_past(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        parse_profile(text, TRANSLATOR)
    assert "past:" in str(refused.value.remedy)
    with pytest.raises(UsageError, match="unknown axis 'past'"):
        parse_profile(f"{text},past=1:2:3", LIMITS)


@pytest.mark.parametrize("family", ["marian", "m2m_100", "t5"])
def test_both_graphs_of_a_translator_become_engines(
    make_tiny_translation: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    make_tiny_translation(tmp_path / "e", family, keep_checkpoint=tmp_path / "checkpoint")
    architecture = read_architecture(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint"))
    names = [build_encoder(architecture).activations, build_decoder(architecture).activations]
    ranges = dict.fromkeys([*names[0], *names[1]], (-8.0, 8.0))
    options = EngineOptions(builder="rtx", profiles=("batch=1:4:8,length=1:16:64,past=1:16:32", "batch=1:1:1,length=1:8:8,past=1:8:32"))  # fmt: skip
    for kind, some in (("bf16", None), ("fp16", ranges)):
        graphs = [build(architecture, some, standard=kind) for build in (build_encoder, build_decoder)]
        files = f"encoder.{kind}.onnx", f"decoder.{kind}.onnx", f"{kind}.bin"
        save_graphs(tmp_path, *graphs, files)
        for file, layers in zip(files, names):
            precision = "int8" if some else kind
            graph, weights = tmp_path / file, tmp_path / files[2]
            engine = build_engine(
                graph, precision, options, TRANSLATOR, lambda line: None, inputs=read_inputs(graph), weights=weights
            )
            least = len(layers) - 1 if some else 0  # the builder may fuse two
            assert least <= engine.int8_gemms / len(options.profiles) <= least + bool(some), engine.layers
            assert engine.profiles == options.profiles


def test_shapes_in_trtexecs_syntax_become_profiles_and_back() -> None:
    shapes = ["input_ids:1x1,past:1", "input_ids:4x16,past:8"], ["input_ids:8x64,past:32", "input_ids:4x16,past:8"]
    largest = ["input_ids:32x128,attention_mask:32x128,past:64", "input_ids:4x16,past:9"]
    profiles = profiles_of_shapes(*shapes, largest)
    assert profiles == ("batch=1:8:32,length=1:64:128,past=1:32:64", "batch=4:4:4,length=16:16:16,past=8:8:9")
    for profile in profiles:
        options = shapes_of_profile(profile)
        assert profiles_of_shapes(*([shape] for shape in options.values())) == (profile,)
    assert profiles_of_shapes([], [], []) == ()


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ((["input_ids:1x1"], ["input_ids:1x1"], []), "--maxShapes 0 times"),
        ((["input_ids:1"], ["input_ids:1x1"], ["input_ids:1x1"]), "--minShapes input_ids:1: .* is not the shape"),
        ((["input_ids:1x1"], ["tokens:1x1"], ["input_ids:1x1"]), "--optShapes tokens:1x1"),
        ((["input_ids:1x1"], ["input_ids:1x1,attention_mask:1x2"], ["input_ids:1x1"]), "length is both 1 and 2"),
    ],
)
def test_senseless_shapes_are_refused(shapes: tuple[list[str], list[str], list[str]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        profiles_of_shapes(*shapes)


@pytest.mark.parametrize(
    ("text", "size"),
    [("workspace:1GiB", 1 << 30), ("workspace:64", 64 << 20), ("512MiB", 512 << 20), ("workspace:2G", 2 << 30)],
)
def test_memory_pools_are_read_as_trtexec_reads_them(text: str, size: int) -> None:
    assert parse_size(workspace_of_pools(text)) == size


def test_a_profile_reads_as_it_is_written() -> None:
    text = "batch=1:8:32,length=16:64:64"
    assert str(parse_profile(text, LIMITS)) == text
    assert parse_profile(" length=16:64:64, batch=1:8:32").ranges["batch"] == (1, 8, 32)


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", 1 << 30), ("512MiB", 512 << 20), ("2 gb", 2 * 10**9), ("4096", 4096)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "1XB", "-1GiB", "0", "1.5GiB"])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--memPoolSize"):
        parse_size(text)


@pytest.mark.parametrize(
    "options",
    [EngineOptions(("fp8",)), EngineOptions(gpu="orin"), EngineOptions(builder="nvcc"), EngineOptions(workspace="x"),
     EngineOptions(profiles=("batch=1",))],
)  # fmt: skip
def test_senseless_options_are_refused(options: EngineOptions) -> None:
    with pytest.raises(UsageError):
        options.check()


def test_layers_are_counted_from_a_log() -> None:
    line = "Name: {}, LayerType: {}, Inputs: [ {{ Name: a, Dimensions: [-1,384], Datatype: {} }}], Outputs: []"
    log = [
        line.format("a", "gemm", "Int8"),
        line.format("b", "gemm", "Half"),
        line.format("c", "kgen", "Int8"),
        "other",
    ]
    assert count_layers(log) == ({"gemm Int8": 1, "gemm Half": 1, "kgen Int8": 1}, 1)


@pytest.mark.skipif(tensorrt.has_gpu(), reason="there is a driver")
def test_without_a_gpu_auto_is_rtx() -> None:
    assert choose_builder("auto") == "rtx"


@pytest.mark.parametrize("builder", ["tensorrt", "trtexec", "rtx"])
def test_a_builder_that_is_missing_is_named_with_the_remedy(builder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "_importable", lambda name: False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match=f"builder {builder} is not installed") as missing:
        choose_builder(builder)
    assert missing.value.remedy


def fake_trtexec(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_driver(monkeypatch, FakeDriver())
    script = folder / "trtexec"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_trtexec_is_asked_for_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trtexec(
        tmp_path,
        'for a in "$@"; do case $a in --saveEngine=*) echo engine > "${a#--saveEngine=}";; esac; done\n'
        'echo "[I] TensorRT version: 10.3.0"\necho "$@" > asked',
        monkeypatch,
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="builds only for this machine's GPU"):
        tensorrt.plan(EngineOptions(builder="trtexec", gpu="sm_86"), LIMITS)
    options = EngineOptions(builder="trtexec", profiles=("batch=1:4:8,length=1:16:64",), timing_cache="t.cache")
    engine = build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", options, LIMITS, lambda line: None)
    assert (engine.version, engine.layers) == ("10.3.0", {})
    asked = (tmp_path / "asked").read_text().split()
    assert {"--stronglyTyped", "--minShapes=input_ids:1x1,attention_mask:1x1", "--optShapes=input_ids:4x16,attention_mask:4x16",
            "--maxShapes=input_ids:8x64,attention_mask:8x64", "--memPoolSize=workspace:1024M", "--timingCacheFile=t.cache",
            "--hardwareCompatibilityLevel=ampere+"} <= set(asked)  # fmt: skip
    assert not {"--fp16", "--int8", "--best"} & set(asked), "gone in TensorRT 11"


def test_profiles_of_trtexec_are_numbered(tmp_path: Path) -> None:
    profiles = [parse_profile("batch=1:1:1,length=1:8:16"), parse_profile("batch=1:4:8,length=1:16:64")]
    command = trtexec_command(
        write_graph(tmp_path / "g.onnx"), Path("g.engine"), profiles, EngineOptions(gpu="this-gpu")
    )
    assert command.index("--profile=0") < command.index("--profile=1")
    assert sum(word.startswith("--maxShapes") for word in command) == 2


def test_trtexecs_last_message_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trtexec(tmp_path, 'echo "[E] Error: out of memory"\necho "&&&& FAILED"\nexit 1', monkeypatch)
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(ExportError, match=r"trtexec cannot build model\.fp16\.onnx: \[E\] Error: out of memory"):
        build_engine(graph, "fp16", EngineOptions(builder="trtexec"), LIMITS, lambda line: None)


def test_trtexec_that_linux_killed_ran_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trtexec(tmp_path, "kill -9 $$", monkeypatch)
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(ExportError, match="it was killed") as failed:
        build_engine(graph, "fp16", EngineOptions(builder="trtexec"), LIMITS, lambda line: None)
    assert "smaller --memPoolSize" in str(failed.value.remedy)


def test_an_engine_for_this_gpu_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'for a in "$@"; do case $a in --saveEngine=*) echo engine > "${a#--saveEngine=}";; esac; done'
    fake_trtexec(tmp_path, script, monkeypatch)
    options = EngineOptions(builder="trtexec", gpu="this-gpu")
    engine = build_engine(write_graph(tmp_path / "model.fp16.onnx"), "fp16", options, LIMITS, lambda line: None)
    assert (engine.target, engine.file) == ("sm_86", "model.fp16.trtexec-sm_86.engine")


def test_trtexec_that_ends_well_without_an_engine_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trtexec(tmp_path, "exit 0", monkeypatch)
    graph = write_graph(tmp_path / "model.fp16.onnx")
    with pytest.raises(ExportError, match="no message"):
        build_engine(graph, "fp16", EngineOptions(builder="trtexec"), LIMITS, lambda line: None)


def test_every_name_of_the_bindings_that_is_used_exists() -> None:
    """A typo in a branch that needs a GPU would only be found on one."""
    names = names_used(Path(tensorrt.__file__))
    assert len(names) > 8
    for name in names:
        assert attrgetter(name)(trt) is not None, name
    methods = {
        trt.IBuilderConfig: ("set_memory_pool_limit", "add_optimization_profile", "create_timing_cache", "set_timing_cache",
                             "get_timing_cache", "set_compute_capability", "num_compute_capabilities",
                             "hardware_compatibility_level", "profiling_verbosity"),
        trt.Builder: ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
        trt.OnnxParser: ("parse_from_file", "num_errors", "get_error"),
        trt.ParserError: ("node_name", "node_operator", "desc"),
        trt.INetworkDefinition: ("num_inputs", "get_input"),
        trt.IOptimizationProfile: ("set_shape",),
        trt.ITimingCache: ("serialize",),
    }  # fmt: skip
    for kind, used in methods.items():
        for name in used:
            assert hasattr(kind, name), f"{kind.__name__}.{name}"
