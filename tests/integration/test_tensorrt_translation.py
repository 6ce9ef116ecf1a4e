"""Translators on TensorRT, on a fake GPU, and on a real one if there is one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_gpu import FakeDriver, fake_bindings, install_bindings, install_driver, write_engine

from deploykit.artifacts import load_manifest, write_manifest
from deploykit.cli import main
from deploykit.errors import DeploykitError, EngineError, MissingDependencyError
from deploykit.runtime import cuda
from deploykit.runtime.engines import load_decode_model
from deploykit.runtime.engines.best_tokens import BestTokens
from deploykit.runtime.engines.numpy_best_tokens import NumpyBestTokens
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.engines.tensorrt import BINDINGS, read_record
from deploykit.runtime.engines.tensorrt_seq2seq import TensorRtSeq2Seq
from deploykit.runtime.find_graphs import find_graphs
from deploykit.runtime.serving_settings import ServingSettings
from deploykit.tasks.opening import open_translator
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Translator, load_translator
from deploykit.tensorrt.build import build_engine, read_inputs
from deploykit.tensorrt.options import TRANSLATOR_GRAPHS, EngineOptions, Profile, parse_profile
from deploykit.triton.repository import config_text, read_config
from deploykit.triton.server import TritonServer

VERSION = "10.13.3"
LIMITS = {"length": 64, "past": 64}
WIDE, SMALL = "batch=1:4:12,length=1:32:64,past=1:32:64", "batch=1:2:2,length=1:8:16,past=1:16:32"
TEXTS = [
    "Save the file.",
    "The quick brown fox jumps over the lazy dog, and do you want to open 3 folders before you close the window?",
    "",
    "a",
    "Do you want to open 3 folders, {name}? Yes, 100%.",
    "the window",
    "Save the file before you close the window.",
    *(f"fox {'jumps over ' * n}the dog" for n in range(6)),
]


@pytest.fixture(scope="module")
def graphs(make_tiny_translation: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with the graphs of fp32 and fp16 engines, to be read only."""
    from transformers import AutoModelForSeq2SeqLM

    from deploykit.graphs.families import read_architecture
    from deploykit.graphs.seq2seq import build_decoder, build_encoder, save_graphs

    folder = tmp_path_factory.mktemp("graphs")
    make_tiny_translation(folder / "export", max_length=64, keep_checkpoint=folder / "checkpoint")
    architecture = read_architecture(AutoModelForSeq2SeqLM.from_pretrained(folder / "checkpoint"))
    for kind in ("fp32", "fp16"):
        both = [build(architecture, standard=kind) for build in (build_encoder, build_decoder)]
        save_graphs(folder / "export", *both, TRANSLATOR_GRAPHS[kind])
    return folder / "export"


@pytest.fixture(params=["tensorrt", "rtx", pytest.param("gpu", marks=pytest.mark.gpu)])
def export(request: pytest.FixtureRequest, tmp_path: Path, graphs: Path, monkeypatch: Any) -> Path:
    """An export with fp32 engines: by each builder on the fake GPU, and real ones."""
    folder = tmp_path / "export"
    shutil.copytree(graphs, folder)
    if request.param == "gpu":
        if not cuda.has_gpu():
            pytest.skip("needs an NVIDIA GPU")
        options = EngineOptions(("fp32",), (WIDE, SMALL), gpu="this-gpu")
        *both, weights = (folder / file for file in TRANSLATOR_GRAPHS["fp32"])
        build = partial(build_engine, precision="fp32", options=options, limits=LIMITS, say=lambda line: None)
        list_engines(folder, [build(graph, inputs=read_inputs(graph), weights=weights) for graph in both])
        return folder
    return with_engines(folder, request.getfixturevalue("driver"), monkeypatch, request.param)


def with_engines(folder: Path, driver: FakeDriver, monkeypatch: Any, builder: str = "tensorrt", precisions: Sequence[str] = ("fp32",),
                 profiles: Sequence[str] = (WIDE, SMALL)) -> Path:  # fmt: skip
    """Write engines for ``driver`` to ``folder``, list them in its manifest, and install bindings that run them."""
    install_bindings(monkeypatch, BINDINGS[builder], fake_bindings(driver, BINDINGS[builder], VERSION))
    list_engines(folder, paper_engines(folder, builder, precisions, [parse_profile(text, LIMITS) for text in profiles]))
    return folder


def paper_engines(folder: Path, builder: str, precisions: Sequence[str], profiles: Sequence[Profile]) -> list[Any]:
    return [
        write_engine(
            (folder / file).with_suffix(".engine"), folder / file, profiles, builder, VERSION, "sm_86",
            read_inputs(folder / file), precision,
        )
        for precision in precisions
        for file in TRANSLATOR_GRAPHS[precision][:2]
    ]  # fmt: skip


def list_engines(folder: Path, records: Sequence[Any]) -> None:
    old = load_manifest(folder, verify=False)
    engines = [dataclasses.asdict(record) for record in records]
    write_manifest(folder, "export", old.task, inputs=old.inputs, metrics={"engines": engines})


def on_cpu(folder: Path, precision: str = "fp32", **options: Any) -> Translator:
    """Load the engines' graphs with ONNX Runtime."""
    task = load_manifest(folder, verify=False).task
    assert isinstance(task, Translation)
    return load_translator(folder, task, TRANSLATOR_GRAPHS[precision], 1, **options)


def test_whole_translations_are_those_of_the_graphs(export: Path) -> None:
    """Greedy and with beams, with few rows: sentences wait, join and leave, and rows are reordered."""
    ours, theirs = open_translator(str(export), url="", engine="tensorrt"), on_cpu(export, max_rows=12)
    fake = isinstance(ours.decoder.model._gpu._library, FakeDriver)
    assert ours.decoder.max_rows == 12, "of the largest profile, not 64"
    for beams, least in ((1, 0), (4, 0), (2, 40)):
        generation = dataclasses.replace(theirs.task.generation, beam_size=beams, min_length=least)
        got, expected = (translator.translate(TEXTS * 2, generation) for translator in (ours, theirs))
        same = sum(a.text == b.text for a, b in zip(got, expected))
        assert same == len(TEXTS * 2) if fake else same >= 0.8 * len(TEXTS * 2)  # weights are random: ties are many
        assert max(t.target_tokens for t in got) > least
        assert max(t.source_tokens for t in got) > 32
        if fake:
            assert [t.score for t in got] == pytest.approx([t.score for t in expected], abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("profiles", [(WIDE,), (WIDE, SMALL), ("batch=3:4:9,length=10:20:50,past=5:20:60",)])
def test_rows_match_onnx_runtimes(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any, precision: str, profiles: Sequence[str]
) -> None:
    """Rows join, leave and are copied in any order. Buffers of the fake GPU are NaN until they are written."""
    folder = with_engines(
        shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch, "tensorrt", [precision], profiles
    )
    files = find_graphs(folder, load_manifest(folder), engine="tensorrt", precision=precision).files
    model = load_decode_model("tensorrt", folder, files)
    assert isinstance(model, TensorRtSeq2Seq)
    reference = Seq2SeqModel(folder, TRANSLATOR_GRAPHS[precision], 1)
    random = np.random.default_rng(len(profiles))
    groups = np.zeros(0, int)  # text of each row: rows are copied only within a text
    texts = 0
    longest = 0
    for turn in range(150):
        roll = random.random()
        oldest = np.flatnonzero(reference._past[: len(groups)] == model.limits.target)
        if not len(oldest) and (len(groups) < 3 or (roll < 0.2 and len(groups) <= model.limits.rows - 3)):
            lengths = random.integers(1, 8 if turn < 50 else 50, 2)
            token_ids = [random.integers(2, model.vocabulary - 1, n).tolist() for n in lengths]
            encoded = [each.encode(token_ids) for each in (model, reference)]
            for each, cross in zip((model, reference), encoded):
                each.admit(cross, lengths.tolist(), (1, 2))
            groups = np.append(groups, [texts, texts + 1, texts + 1])
            texts += 2
        elif len(oldest) or roll < 0.3:
            gone = np.union1d(oldest, random.integers(0, len(groups), 2))
            orders = [each.remove(gone) for each in (model, reference)]
            np.testing.assert_array_equal(*orders)
            groups = groups[orders[0]]
            continue
        elif roll < 0.5:
            pairs = [np.flatnonzero(groups == group) for group in set(groups.tolist())]
            pairs = [pair for pair in pairs if len(pair) == 2 and len(set(reference._past[pair].tolist())) == 1]
            for each in (model, reference):
                if pairs:
                    sources, targets = np.stack(pairs, axis=1)
                    each.copy(sources, targets, 0)
        tokens = random.integers(2, model.vocabulary - 1, len(groups))
        got, expected = (each.step(tokens) for each in (model, reference))
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-4 if precision == "fp32" else 0.05, rtol=1e-4)
        longest = max(longest, int(reference._past[: len(groups)].max()))
    assert longest > 40


def test_a_step_is_one_launch_of_a_cuda_graph(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch)
    model = TensorRtSeq2Seq(folder, ["encoder.trt.fp32.engine", "decoder.trt.fp32.engine"], 1)
    memory = len(driver.device), len(driver.host)
    model.reserve(5, 9)
    model.admit(model.encode([[5] * 9]), [9], [5])
    for _ in range(2):  # one graph for each direction between the buffers
        model.step(np.full(5, 7))
    counts = dict(driver.counts)
    for _ in range(4):
        model.step(np.full(5, 7))
    grown = {name: n - counts.get(name, 0) for name, n in driver.counts.items() if n != counts.get(name, 0)}
    assert grown == {"cuCtxSetCurrent": 4, "cuGraphLaunch": 4, "cuStreamSynchronize": 4}
    captured = driver.counts["cuGraphInstantiateWithFlags"]
    model.remove(np.array([1]))
    model.admit(model.encode([[5] * 9, [6] * 3]), [9, 3], [1, 3])
    for _ in range(2):
        model.step(np.full(8, 7))
    assert driver.counts["cuGraphInstantiateWithFlags"] == captured + 1, (
        "8 rows were computed already: one new encoding"
    )
    assert (len(driver.device), len(driver.host)) == memory, "no shape allocates any"
    logits = []
    for other in model.side_by_side(2):
        other.admit(other.encode([[5] * 9]), [9], [1])
        logits.append(other.step(np.array([7])).copy())
    np.testing.assert_array_equal(*logits)


def test_shapes_outside_the_profiles_are_refused_with_the_command(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch, profiles=["batch=1:4:4,length=1:8:20,past=1:8:12"])  # fmt: skip
    translator = open_translator(str(folder), url="", engine="tensorrt")
    assert (translator.task.max_source_length, translator.task.max_target_length) == (20, 12)
    model = translator.decoder.model
    for call, what, axis in (
        (partial(model.encode, [[5] * 21]), "21 tokens of a text", "length"),
        (partial(model.encode, [[5]] * 5), "5 rows at once", "batch"),
        (partial(model.reserve, 5, 1), "5 rows at once", "batch"),
        (partial(model.reserve, 1, 21), "21 tokens of a text", "length"),
    ):
        with pytest.raises(
            EngineError, match=rf"no profile allows {what} \(profiles: batch=1:4:4,length=1:8:20"
        ) as refused:
            call()
        assert f"larger {axis} in --maxShapes: deploykit export runs/a" in str(refused.value.remedy)
    model.admit(model.encode([[5]]), [1], [1])
    for _ in range(12):
        model.step(np.array([7]))
    with pytest.raises(EngineError, match="13 tokens of a translation"):
        model.step(np.array([7]))
    model.remove(np.array([0]))
    # A translator stays within the profiles: it splits long texts and cuts off long translations.
    long, short = translator.translate([TEXTS[1], "a"])
    assert long.source_tokens > 20
    assert short.text == open_translator(str(folder), url="", engine="tensorrt").translate(["a"])[0].text
    assert long.finish == "length"
    wide = dataclasses.replace(translator.task.generation, beam_size=5)
    with pytest.raises(EngineError, match="5 rows at once"):
        translator.translate(["a"], wide)


@pytest.mark.parametrize("of", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("values", "says", "remedy"),
    [
        ({"version": "10.3.0"}, "built by TensorRT 10.3.0; the installed version, 10.13.3", "--builder tensorrt --gpu this-gpu --force"),
        ({"target": "sm_90"}, r"built for sm_90, but this GPU \(Fake GPU\) is sm_86", "--builder tensorrt --gpu this-gpu"),
        ({"sha256": "0"}, "SHA-256 differs", "deploykit export runs/a"),
    ],
)  # fmt: skip
def test_engines_for_another_gpu_or_version_are_refused_with_the_command(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any, of: str, values: Mapping[str, str], says: str, remedy: str
) -> None:  # fmt: skip
    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch)
    file = folder / f"{of}.trt.fp32.engine"
    manifest = load_manifest(folder)
    assert find_graphs(folder, manifest, engine="auto", precision="auto").engine == "tensorrt"
    dataclasses.replace(read_record(file), **values).save(file)
    with pytest.raises(DeploykitError, match=rf"{file.name}: .*{says}") as refused:
        load_decode_model("tensorrt", folder, find_graphs(folder, manifest, engine="tensorrt", precision="auto").files)
    assert remedy in str(refused.value.remedy)
    if "sha256" not in values:
        assert find_graphs(folder, manifest, engine="auto", precision="auto").engine == "onnxruntime"


def test_engines_that_do_not_belong_together_are_refused(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch)
    files = ["encoder.trt.fp32.engine", "decoder.trt.fp32.engine"]
    write_engine(
        folder / files[1], folder / TRANSLATOR_GRAPHS["fp32"][1], [parse_profile(WIDE, LIMITS)], "tensorrt", VERSION,
        "sm_86", read_inputs(folder / TRANSLATOR_GRAPHS["fp32"][1]),
    )  # fmt: skip
    with pytest.raises(EngineError, match="has other profiles than encoder"):
        TensorRtSeq2Seq(folder, files, 1)
    # The layout of older exports: keys and values by position.
    write_engine(
        folder / files[0], folder / "encoder.onnx", [parse_profile(WIDE, LIMITS)], "tensorrt", VERSION, "sm_86",
        read_inputs(folder / "encoder.onnx"),
    )  # fmt: skip
    with pytest.raises(EngineError, match="an older deploykit exported it"):
        TensorRtSeq2Seq(folder, files, 1)
    (folder / files[1]).unlink()
    with pytest.raises(EngineError, match=r"decoder\.trt\.fp32\.engine: no such graph"):
        load_decode_model("tensorrt", folder, files)


def run(*words: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_commands_take_the_engine(driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch, precisions=["fp32", "fp16"])
    words = ("translate", folder, *TEXTS[:2], "--num-beams", 2)
    expected = run(*words, "--engine", "onnxruntime", "--precision", "fp32")
    launched = dict(driver.counts)
    assert "cuGraphLaunch" not in launched
    assert (
        run(*words, "--engine", "tensorrt", "--precision", "fp32")["results"][0]["translation"]
        == (expected["results"][0]["translation"])
    )
    assert driver.counts["cuGraphLaunch"] > 10
    manifest = load_manifest(folder)
    assert find_graphs(folder, manifest, engine="auto", precision="auto").precision == "fp16"
    rows = tmp_path / "rows.tsv"
    rows.write_text("en\tfr\nDelete %s?\tSupprimer %s ?\nSave {name}\tEnregistrer {name}\n")
    graded = run("evaluate", folder, "--data", rows, "--engine", "tensorrt", "--precision", "fp32")
    assert graded["metrics"] == run("evaluate", folder, "--data", rows, "--engine", "onnxruntime")["metrics"]
    measured = run("bench", folder, "--data", rows, "--engine", "tensorrt", "--engine", "onnxruntime", "--max-concurrency", 1,
                   "--seconds", 0.05, "--rounds", 1, "--max-new-tokens", 4)  # fmt: skip
    assert [c["engine"] for c in measured["candidates"]] == ["tensorrt", "onnxruntime"]
    refused = CliRunner().invoke(main, ["translate", str(folder), "a", "--engine", "tensorrt", "--precision", "bf16"])  # fmt: skip
    assert refused.exit_code == 1
    assert "--trt --precision bf16" in refused.stderr


def test_engines_that_run_here_are_graded_as_they_answer(
    driver: FakeDriver, graphs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from deploykit.tasks.translation.export import _Grader
    from deploykit.tasks.translation.pairs import Pair

    folder = with_engines(shutil.copytree(graphs, tmp_path / "e"), driver, monkeypatch)
    texts = [text for text in TEXTS if text]
    reference = on_cpu(folder)
    pairs = [Pair(text, said.text, "") for text, said in zip(texts, reference.translate(texts))]
    grader = _Grader(folder, reference.task, pairs)
    grader.grade_checkpoint(reference)
    records = [read_record(folder / f"{of}.trt.fp32.engine") for of in ("encoder", "decoder")]
    line = grader.grade_engines("fp32", records)
    assert (line.precision, line.engine, line.agreement) == ("fp32", "tensorrt", 1.0)
    assert line.figures["chrf"] == pytest.approx(100.0)


def test_a_translator_is_packaged_without_a_gpu_and_answers_on_one(
    graphs: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = shutil.copytree(graphs, tmp_path / "e")
    list_engines(folder, paper_engines(folder, "tensorrt", ["fp32"], [parse_profile(WIDE, LIMITS)]))
    record = run(
        "package", folder, "--name", "en-fr", "--engine", "tensorrt", "--model-repository", tmp_path / "models"
    )
    assert (record["engine"], record["precision"]) == ("tensorrt", "fp32")
    assert record["container"].startswith("ENGINE=tensorrt==10.13.3 ")
    version = Path(record["path"])
    engines = {f"{of}.trt.fp32{suffix}" for of in ("encoder", "decoder") for suffix in (".engine", ".json")}
    files = set(load_manifest(version).files)
    assert engines <= files
    assert not [file for file in files if file.endswith((".onnx", ".bin"))]
    # The config is valid and differs from the CPU's only in the device; the streaming model has no engine.
    config = read_config(version.parent / "config.pbtxt")
    assert [(group.kind, group.count) for group in config.instance_group] == [(config.instance_group[0].KIND_GPU, 1)]
    task = load_manifest(version).task
    on_gpu, on_cpu_ = (config_text(task, ServingSettings(), engine=name) for name in ("tensorrt", "onnxruntime"))
    assert on_gpu != on_cpu_
    assert on_gpu.replace("KIND_GPU count", "KIND_CPU count") == on_cpu_
    stream = read_config(tmp_path / "models" / "en-fr_stream" / "config.pbtxt")
    assert [group.kind for group in stream.instance_group] == [stream.instance_group[0].KIND_CPU]

    with pytest.raises(MissingDependencyError, match="engine tensorrt needs an NVIDIA GPU"):
        open_translator(str(version), url="")
    with pytest.raises(MissingDependencyError, match="engine tensorrt needs an NVIDIA GPU"):
        TritonServer(tmp_path / "models", http_port=0, grpc_port=0, metrics_port=0).start()
    driver = FakeDriver()
    install_driver(monkeypatch, driver)
    install_bindings(monkeypatch, "tensorrt", fake_bindings(driver, "tensorrt", VERSION))
    got, expected = open_translator(str(version), url="").translate(TEXTS), on_cpu(folder).translate(TEXTS)
    assert [t.text for t in got] == [t.text for t in expected]


def test_a_machine_with_a_gpu_need_not_have_onnx_runtime() -> None:
    program = (
        "import sys, deploykit.tasks.translation.predictor, deploykit.runtime.engines.tensorrt_seq2seq\n"
        "import deploykit.runtime.engines.tensorrt_classifier\n"
        "print([m for m in ('onnxruntime', 'torch', 'onnx', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("width", [7, 300, 5000])
def test_numpy_finds_the_best_tokens_that_onnx_runtime_finds(width: int) -> None:
    logits = np.random.default_rng(width).normal(0, 4, (6, width)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many are equal: the lower id comes first
    logits[2, width // 2 :] = -np.inf
    k = min(9, width)
    theirs, ours = BestTokens(1), NumpyBestTokens()
    (values, columns), (expected, expected_columns) = ours(logits, k), theirs(logits, k)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(columns[finite], expected_columns[finite])
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    tokens = logits.argmax(axis=1)
    np.testing.assert_allclose(ours.of(logits, tokens), theirs.of(logits, tokens), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.log_sums(logits), theirs.log_sums(logits), rtol=1e-5, atol=1e-5)
