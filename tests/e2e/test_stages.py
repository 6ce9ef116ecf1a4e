"""The commands of all stages, on real weights and text."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killed_run import kill_at_step

from deploykit.artifacts import load_manifest
from deploykit.data.reading import Reading
from deploykit.data.texts import read_texts
from deploykit.runtime.engines.native.loader import lacks
from deploykit.runtime.find_graphs import find_graphs
from deploykit.tasks.opening import open_predictor

Deploykit = Callable[..., tuple[int, str, str]]
ENGINES = ["openvino", "onnxruntime"]


def test_a_run_has_the_documented_files_and_metrics(checkpoint: Path) -> None:
    names = {p.name for p in checkpoint.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "metrics.json", "README.md", "finetune.toml"} <= names
    assert list((checkpoint / "tensorboard").iterdir())
    metrics = json.loads((checkpoint / "metrics.json").read_text())["test"]
    assert {"accuracy", "macro_f1", "per_class", "confusion_matrix", "expected_calibration_error"} <= set(metrics)
    assert metrics["accuracy"] > 0.4, "it learned something"
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    splits = {
        n: (checkpoint / "splits" / f"{n}.jsonl").read_text().splitlines() for n in ("train", "validation", "test")
    }
    texts = [{json.loads(line)["text"] for line in lines} for lines in splits.values()]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_a_saved_toml_repeats_the_run(deploykit: Deploykit, checkpoint: Path, tmp_path: Path) -> None:
    code, out, err = deploykit(
        "finetune", "--config", checkpoint / "finetune.toml", "--output-dir", checkpoint, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["reused"], "the same options are the same inputs"
    (tmp_path / "bad.toml").write_text("learning_rat = 1e-5")
    code, _, err = deploykit("finetune", "--config", tmp_path / "bad.toml", "--output-dir", tmp_path / "x")
    assert code == 2
    assert "learning_rat" in err


def test_finetune_takes_the_options_of_trainer(
    deploykit: Deploykit, minilm: Path, small_csv: Path, tmp_path: Path
) -> None:
    code, out, err = deploykit(
        "finetune", minilm, "--train", small_csv, "--output-dir", tmp_path / "r", "--max-train-samples", 120, "--max-steps", 4,
        "--per-device-train-batch-size", 8, "--gradient-accumulation-steps", 2, "--max-length", 32, "--optimizer", "sgd", "--lr-scheduler-type", "cosine",
        "--warmup-ratio", 0.2, "--weight-decay", 0.1, "--dropout", 0.2, "--label-smoothing-factor", 0.1, "--class-weights", "balanced",
        "--early-stopping-patience", 2, "--eval-steps", 2, "--seed", 7, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["labels"] == ["negative", "neutral", "positive"]
    options = load_manifest(tmp_path / "r").options
    assert (options["optimizer"], options["seed"], options["dropout"]) == ("sgd", 7, 0.2)


def test_lora_is_merged_at_export(deploykit: Deploykit, minilm: Path, small_csv: Path, tmp_path: Path) -> None:
    words = (
        "--max-train-samples",
        120,
        "--max-steps",
        4,
        "--per-device-train-batch-size",
        8,
        "--max-length",
        32,
        "--lora-r",
        4,
    )
    code, _, err = deploykit("finetune", minilm, "--train", small_csv, "--output-dir", tmp_path / "r", *words)
    assert code == 0, err
    assert (tmp_path / "r" / "adapter_model.safetensors").stat().st_size < 5_000_000
    code, out, err = deploykit("export", tmp_path / "r", "--output-dir", tmp_path / "e", "--json")
    assert code == 0, err
    assert json.loads(out)["parity"]["max_difference"] < 1e-3


def test_multi_label_works_in_every_stage(deploykit: Deploykit, minilm: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{a} {b} number {i}", "labels": [n for n, on in (("cat", a != ""), ("dog", b != "")) if on]}
        for i in range(30)
        for a, b in (("meow", ""), ("", "woof"), ("meow", "woof"), ("", ""))
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = deploykit(
        "finetune", minilm, "--train", tmp_path / "t.jsonl", "--output-dir", tmp_path / "r", "--multi-label",
        "--max-steps", 6, "--per-device-train-batch-size", 8, "--max-length", 16, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["labels"] == ["cat", "dog"]
    code, out, err = deploykit("export", tmp_path / "r", "--output-dir", tmp_path / "e", "--json")
    assert code == 0, err
    code, out, err = deploykit("evaluate", tmp_path / "e", "--data", tmp_path / "t.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 120
    assert set(json.loads(out)["metrics"]["confusion_matrix"]) == {"cat", "dog"}


def test_a_killed_run_continues_to_the_same_end(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    model = make_tiny_checkpoint(tmp_path / "model")
    words = ("finetune", model, "--train", small_csv, "--max-train-samples", 300, "--max-steps", 12, "--eval-steps", 3,
             "--per-device-train-batch-size", 8, "--json")  # fmt: skip
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    whole = json.loads(out)
    kill_at_step(7, *words, "--output-dir", tmp_path / "killed")
    assert list(tmp_path.glob(".killed.*.training/trainer/checkpoint-6/trainer_state.json"))
    assert not (tmp_path / "killed").exists(), "nothing that looks finished"
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert json.loads(out)["metrics"] == whole["metrics"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1], "bit for bit"
    assert not list(tmp_path.glob(".killed*")), "the work directory is gone"


def test_an_export_reports_its_checks(deploykit: Deploykit, checkpoint: Path, exported: Path) -> None:
    code, out, _ = deploykit("export", checkpoint, "--output-dir", exported, "--int8", "--max-drop", 10, "--calibration-rows", 64,
                             "--json")  # fmt: skip
    assert code == 0
    record = json.loads(out)
    assert record["reused"]
    assert record["parity"]["batch_sizes"] == [1, 4, 32]
    assert record["parity"]["argmax_agreement"] == 1
    assert record["quantization"]["quantize_nodes"] > 0
    kernels = {line["engine"]: line["int8_kernels"] for line in record["accuracy"] if line["precision"] == "int8"}
    assert kernels == {"openvino": 12, "onnxruntime": 12, **({"native": 8} if lacks() is None else {})}
    manifest = load_manifest(exported)
    assert (find_graphs(exported, manifest, engine="auto", precision="auto").engine == "native") == (lacks() is None)
    assert record["size_bytes"]["model.s8s8.onnx"] < record["size_bytes"]["model.onnx"] / 3


def test_an_export_builds_tensorrt_engines(deploykit: Deploykit, checkpoint: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # an empty cache
    words = ("export", checkpoint, "--output-dir", tmp_path / "e", "--trt", "--precision", "bf16", "--precision", "int8", "--gpu", "sm_86",
             "--minShapes", "input_ids:1x8", "--optShapes", "input_ids:4x16", "--maxShapes", "input_ids:8x32", "--max-drop", 10, "--calibration-rows", 32, "--measure-rows",
             100, "--json")  # fmt: skip
    code, out, err = deploykit(*words)
    assert code == 0, err
    record = json.loads(out)
    half, whole = record["engines"]
    assert (half["precision"], half["int8_gemms"]) == ("bf16", 0)
    assert sum(count for kind, count in half["layers"].items() if kind.endswith("BFloat16")) > 6
    assert whole["precision"] == "int8"
    assert whole["int8_gemms"] >= 8, "queries, keys and values are one product"
    assert whole["profiles"] == ["batch=1:4:8,length=8:16:32"]
    manifest = load_manifest(tmp_path / "e")
    assert manifest.files[whole["graph"]].sha256 == whole["graph_digest"]
    assert {half["file"], whole["file"], whole["file"].replace(".engine", ".log")} <= set(manifest.files)
    assert record["size_bytes"][whole["file"]] == whole["size_bytes"]
    assert whole["command"].startswith(
        f"deploykit export {checkpoint} --output-dir {tmp_path / 'e'} --trt --precision bf16"
    )
    assert json.loads((tmp_path / "e" / whole["file"]).with_suffix(".json").read_text()) == whole
    graded = {line["precision"]: line for line in record["accuracy"]}
    assert graded["trt int8"]["agreement"] > 0.9, "the engine's graph, computed on the CPU"
    code, out, _ = deploykit(*words)
    assert (code, json.loads(out)["reused"]) == (0, True)


@pytest.fixture(scope="module")
def calibration(
    deploykit: Deploykit, exported: Path, small_csv: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A calibration of the short run, collected from its export."""
    out = tmp_path_factory.mktemp("calibrations") / "a"
    words = ("calibrate", exported, "--calibration-data", small_csv, "--calibration-rows", 48, "--output-dir", out)
    code, text, err = deploykit(*words)
    assert code == 0, err
    assert "48 rows, 8 tensors" in text
    assert any(line.split()[-4:] == ["minmax", "entropy", "percentile", "mse"] for line in text.splitlines())
    code, text, err = deploykit(*words, "--json")
    assert code == 0, err
    record = json.loads(text)
    assert record["reused"]
    assert (record["rows"], record["seconds"] > 0, record["peak_memory_mb"] > 50) == (48, True, True)
    assert {method for ranges in record["ranges"].values() for method in ranges} == {
        "minmax", "entropy", "percentile", "mse",
    }  # fmt: skip
    return out


def test_a_calibration_is_an_artifact_of_the_checkpoint(
    deploykit: Deploykit, checkpoint: Path, exported: Path, calibration: Path, small_csv: Path, tmp_path: Path
) -> None:
    code, out, _ = deploykit("inspect", calibration)
    assert code == 0
    assert "calibration for classification, verified" in out
    assert "48 rows, 8 tensors" in out
    assert load_manifest(calibration).parent == load_manifest(checkpoint).digest
    code, _, err = deploykit(
        "calibrate",
        checkpoint,
        "--calibration-data",
        small_csv,
        "--calibration-rows",
        48,
        "--output-dir",
        tmp_path / "c",
    )
    assert code == 0, err
    assert load_manifest(tmp_path / "c").digest == load_manifest(calibration).digest, "the export's graph is its own"

    code, _, err = deploykit("calibrate", exported, "--output-dir", tmp_path / "d")
    assert (code, "--calibration-data" in err) == (1, True), "an export has no rows"
    cut = shutil.copytree(calibration, tmp_path / "cut")
    with (cut / "calibration.npz").open("r+b") as file:
        file.truncate(100)
    code, _, err = deploykit("export", checkpoint, "--int8", "--calib", cut, "--output-dir", tmp_path / "e")
    assert (code, "calibration.npz" in err) == (1, True)
    code, _, err = deploykit(
        "export",
        checkpoint,
        "--int8",
        "--calib",
        calibration,
        "--calibration-rows",
        9,
        "--output-dir",
        tmp_path / "e",
    )
    assert (code, "--calibration-rows" in err) == (2, True)
    code, _, err = deploykit("export", checkpoint, "--int8", "--calib", exported, "--output-dir", tmp_path / "e")
    assert (code, "is an export, not a calibration" in err) == (1, True)


@pytest.mark.parametrize(
    ("precision", "engine"),
    [
        *itertools.product(("fp32", "int8"), ENGINES),
        pytest.param("int8", "native", marks=pytest.mark.skipif(lacks() is not None, reason=f"native: {lacks()}")),
    ],
)
def test_the_same_text_gets_the_same_answer_whatever_shares_its_batch(
    exported: Path, small_csv: Path, engine: str, precision: str
) -> None:
    predictor = open_predictor(str(exported), url="", engine=engine, precision=precision)
    texts = [row.text for row in read_texts(str(small_csv), ("text",)) if row.text][:160]
    alone = np.concatenate([predictor.scores([text]) for text in texts])
    together = predictor.scores(texts)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    mixed = np.empty_like(together)
    for part in np.array_split(shuffled, 11):
        mixed[part] = predictor.scores([texts[i] for i in part])
    assert (mixed == together).all(), "bit for bit, in any company"
    assert np.abs(alone - together).max() < 1e-6, "a batch of one may take another kernel"


def test_tokenizing_gives_the_ids_of_the_checkpoints_own_tokenizer(
    checkpoint: Path, exported: Path, tweets: Path
) -> None:
    from deploykit.runtime.tokenizer import TextTokenizer
    from deploykit.tasks.classification.checkpoint import TorchClassifier
    from deploykit.text import normalize

    reference = TorchClassifier.load(checkpoint)
    tokenizer = TextTokenizer(exported / "tokenizer.json", reference.task.max_length)
    real = [row.text for row in read_texts(str(tweets), ("text",), reading=Reading("latin-1")) if row.text][:8000]
    assert tokenizer.encode([(normalize(t),) for t in real]) == reference.encode(real)

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.characters(exclude_categories=()), max_size=80))
    def hostile(text: str) -> None:
        assert tokenizer.encode([(normalize(text),)]) == reference.encode([text])

    hostile()


def test_predictions_stream_in_order_and_resume(
    deploykit: Deploykit, exported: Path, small_csv: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(small_csv.read_text() + '"",neutral\n' + "x" * 100_000 + ",neutral\n", encoding="utf-8")
    words = ("predict", exported, "--input", rows, "--json")
    code, out, err = deploykit(*words, "--output", tmp_path / "a.jsonl")
    assert code == 0, err
    assert json.loads(out) == {"output": str(tmp_path / "a.jsonl"), "rows": 902, "errors": 0, "resumed": 0}
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines[:2]] == ["rows.csv:2", "rows.csv:3"]
    assert (json.loads(lines[900])["text"], json.loads(lines[900])["label"] != "") == ("", True)
    assert json.loads(lines[901])["label"]

    # A killed process leaves whole lines and possibly a partial one.
    code, _, err = deploykit(*words, "--output", tmp_path / "b.jsonl")
    partial = next(iter(_partial_name(tmp_path, deploykit, words)))
    partial.write_text("\n".join(lines[:600]) + "\n" + lines[600][:20], encoding="utf-8")
    code, out, err = deploykit(*words, "--output", tmp_path / "c.jsonl")
    assert code == 0, err
    assert json.loads(out)["resumed"] == 600
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines


def _partial_name(folder: Path, deploykit: Deploykit, words: tuple[object, ...]) -> list[Path]:
    """Return the temporary name that a killed run to c.jsonl leaves."""
    from deploykit.data import answer_file as answers

    seen: list[Path] = []
    original = answers._appending

    def spy(partial: Path) -> object:
        seen.append(partial)
        raise KeyboardInterrupt

    answers._appending = spy  # type: ignore[assignment]
    try:
        assert deploykit(*words, "--output", folder / "c.jsonl")[0] == 130
    finally:
        answers._appending = original
    return seen


def test_a_checkpoint_trained_elsewhere_exports_with_rows_named(
    deploykit: Deploykit, checkpoint: Path, tmp_path: Path
) -> None:
    foreign, rows = tmp_path / "foreign", checkpoint / "splits" / "test.jsonl"
    foreign.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, foreign / name)
    code, _, err = deploykit("export", foreign, "--output-dir", tmp_path / "e")
    assert code == 1
    assert "--data" in err
    code, _, err = deploykit("export", foreign, "--output-dir", tmp_path / "e", "--data", rows)
    assert code == 0, err
    code, out, err = deploykit("evaluate", foreign, "--data", rows, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == len(rows.read_text().splitlines())


def test_inspect_verifies(deploykit: Deploykit, exported: Path, tmp_path: Path) -> None:
    code, out, _ = deploykit("inspect", exported, "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "export"
    code, out, _ = deploykit("inspect", exported)
    assert code == 0
    assert "  max_drop = 10.0\n" in out
    assert " = None" not in out, "options that were not given"
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    damaged = bytearray((copy / "model.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / "model.onnx").write_bytes(damaged)
    for words in (("inspect", copy), ("predict", copy, "hello"), ("package", copy, "--name", "x")):
        code, _, err = deploykit(*words)
        assert code == 1
        assert "model.onnx" in err


def test_doctor_finds_every_command_ready(deploykit: Deploykit) -> None:
    code, out, err = deploykit("doctor", "--json")
    assert code == 0, err
    found = json.loads(out)
    commands = found["commands"]
    assert found["native"]["lacks"] == lacks()
    assert (found["native"]["instruction_set"] is None) == (lacks() is not None)
    ready = {name for name, need in commands.items() if need["ready"]}
    assert ready >= {"finetune", "export", "serve", "bench", "answer", "generate", "chat", "sign"}


def test_help_is_quick_and_light() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from deploykit.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print([m for m in ('numpy', 'torch', 'tritonclient', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_only_training_and_export_import_torch(
    checkpoint: Path, exported: Path, calibration: Path, small_csv: Path, tmp_path: Path
) -> None:
    made_before: list[tuple[object, ...]] = [
        ("finetune", "--config", checkpoint / "finetune.toml", "--output-dir", checkpoint),
        ("export", checkpoint, "--output-dir", exported, "--int8", "--max-drop", 10, "--calibration-rows", 64),
        ("calibrate", exported, "--calibration-data", small_csv, "--calibration-rows", 48, "--output-dir", calibration),
    ]
    light: list[tuple[object, ...]] = [
        ("inspect", exported),
        ("package", exported, "--name", "x", "--model-repository", tmp_path / "r"),
        ("predict", exported, "hello"),
        ("finetune", tmp_path / "nowhere", "--train", small_csv, "--output-dir", tmp_path / "o"),
    ]
    program = (
        "import json, sys; from click.testing import CliRunner; from deploykit.cli import main\n"
        "done = [CliRunner().invoke(main, words) for words in json.loads(sys.argv[1])]\n"
        "print(*(result.output for result in done))\n"
        "print([result.exit_code for result in done], [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    words = json.dumps([[str(word) for word in command] for command in made_before + light])
    done = subprocess.run([sys.executable, "-c", program, words], capture_output=True, text=True, check=True)
    assert done.stdout.count("reused, made before from the same inputs") == len(made_before)
    assert "no such model folder" in done.stdout
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 1] []"
