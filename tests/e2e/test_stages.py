"""The stages as a user types them, on real weights and text."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.artifacts import load_manifest
from deploykit.data.classification import read_texts
from deploykit.predictor import open_predictor

Deploykit = Callable[..., tuple[int, str, str]]
ENGINES = ["openvino", "onnxruntime"]


def test_a_run_holds_all_that_is_promised(checkpoint: Path) -> None:
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
    code, out, err = deploykit("finetune", "--config", checkpoint / "finetune.toml", "--out", checkpoint, "--json")
    assert code == 0, err
    assert json.loads(out)["reused"], "the same options are the same inputs"
    (tmp_path / "bad.toml").write_text("learning_rat = 1e-5")
    code, _, err = deploykit("finetune", "--config", tmp_path / "bad.toml", "--out", tmp_path / "x")
    assert code == 2
    assert "learning_rat" in err


def test_finetune_takes_the_options_of_trainer(
    deploykit: Deploykit, minilm: Path, small_csv: Path, tmp_path: Path
) -> None:
    code, out, err = deploykit(
        "finetune", "--model", minilm, "--train", small_csv, "--out", tmp_path / "r", "--max-rows", 120, "--max-steps", 4,
        "--batch-size", 8, "--accumulation", 2, "--max-length", 32, "--optimizer", "sgd", "--schedule", "cosine",
        "--warmup", 0.2, "--weight-decay", 0.1, "--dropout", 0.2, "--label-smoothing", 0.1, "--class-weights", "balanced",
        "--early-stopping", 2, "--eval-steps", 2, "--seed", 7, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["labels"] == ["negative", "neutral", "positive"]
    options = load_manifest(tmp_path / "r").options
    assert (options["optimizer"], options["seed"], options["dropout"]) == ("sgd", 7, 0.2)


def test_lora_is_merged_at_export(deploykit: Deploykit, minilm: Path, small_csv: Path, tmp_path: Path) -> None:
    words = ("--max-rows", 120, "--max-steps", 4, "--batch-size", 8, "--max-length", 32, "--lora-rank", 4)
    code, _, err = deploykit("finetune", "--model", minilm, "--train", small_csv, "--out", tmp_path / "r", *words)
    assert code == 0, err
    assert (tmp_path / "r" / "adapter_model.safetensors").stat().st_size < 5_000_000
    code, out, err = deploykit("export", tmp_path / "r", "--out", tmp_path / "e", "--json")
    assert code == 0, err
    assert json.loads(out)["parity"]["max_difference"] < 1e-3


def test_multi_label_goes_all_the_way(deploykit: Deploykit, minilm: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{a} {b} number {i}", "labels": [n for n, on in (("cat", a != ""), ("dog", b != "")) if on]}
        for i in range(30)
        for a, b in (("meow", ""), ("", "woof"), ("meow", "woof"), ("", ""))
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, err = deploykit(
        "finetune", "--model", minilm, "--train", tmp_path / "t.jsonl", "--out", tmp_path / "r", "--multi-label",
        "--max-steps", 6, "--batch-size", 8, "--max-length", 16, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["labels"] == ["cat", "dog"]
    code, out, err = deploykit("export", tmp_path / "r", "--out", tmp_path / "e", "--json")
    assert code == 0, err
    code, out, err = deploykit("evaluate", tmp_path / "e", "--data", tmp_path / "t.jsonl", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 120
    assert set(json.loads(out)["metrics"]["confusion_matrix"]) == {"cat", "dog"}


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_end(minilm: Path, small_csv: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "deploykit", "finetune", "--model", str(minilm), "--train", str(small_csv),
             "--max-rows", "300", "--max-steps", "12", "--eval-steps", "3", "--batch-size", "8", "--max-length", "32", "--json"]  # fmt: skip
    whole = subprocess.run([*words, "--out", str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "killed")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".killed.*.training/trainer/checkpoint-6/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed").exists(), "nothing that looks finished"
    again = subprocess.run([*words, "--out", str(tmp_path / "killed")], capture_output=True, text=True, check=True)
    assert "continuing the unfinished run" in again.stderr
    assert json.loads(again.stdout)["metrics"] == json.loads(whole.stdout)["metrics"]
    assert not list(tmp_path.glob(".killed*")), "the work directory is gone"


def test_an_export_says_what_was_checked(deploykit: Deploykit, checkpoint: Path, exported: Path) -> None:
    code, out, _ = deploykit("export", checkpoint, "--out", exported, "--int8", "--max-drop", 10, "--calibration-rows", 64,
                             "--json")  # fmt: skip
    assert code == 0
    record = json.loads(out)
    assert record["reused"]
    assert record["parity"]["batch_sizes"] == [1, 4, 32]
    assert record["parity"]["argmax_agreement"] == 1
    assert record["quantization"]["quantize_nodes"] > 0
    kernels = {line["engine"]: line["int8_kernels"] for line in record["accuracy"] if line["precision"] == "int8"}
    assert kernels == {"openvino": 36, "onnxruntime": 36}
    assert record["size_bytes"]["model.s8s8.onnx"] < record["size_bytes"]["model.onnx"] / 3


def test_an_export_builds_tensorrt_engines(deploykit: Deploykit, checkpoint: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where no engine was built before
    words = ("export", checkpoint, "--out", tmp_path / "e", "--trt", "--precision", "bf16", "--precision", "int8", "--target",
             "sm_86", "--profile", "batch=1:4:8,length=8:16:32", "--max-drop", 10, "--calibration-rows", 32, "--measure-rows",
             100, "--json")  # fmt: skip
    code, out, err = deploykit(*words)
    assert code == 0, err
    record = json.loads(out)
    half, whole = record["engines"]
    assert (half["precision"], half["int8_gemms"]) == ("bf16", 0)
    assert sum(count for kind, count in half["layers"].items() if kind.endswith("BFloat16")) > 20
    assert whole["precision"] == "int8"
    assert whole["int8_gemms"] >= 24, "queries, keys and values are one product"
    assert whole["profiles"] == ["batch=1:4:8,length=8:16:32"]
    manifest = load_manifest(tmp_path / "e")
    assert manifest.files[whole["graph"]].sha256 == whole["graph_digest"]
    assert {half["file"], whole["file"], whole["file"].replace(".engine", ".log")} <= set(manifest.files)
    assert record["size_bytes"][whole["file"]] == whole["size_bytes"]
    assert whole["command"].startswith(f"deploykit export {checkpoint} --out {tmp_path / 'e'} --trt --precision bf16")
    assert json.loads((tmp_path / "e" / whole["file"]).with_suffix(".json").read_text()) == whole
    graded = {line["precision"]: line for line in record["accuracy"]}
    assert graded["trt int8"]["agreement"] > 0.9, "the engine's graph, computed on the CPU"
    code, out, _ = deploykit(*words)
    assert (code, json.loads(out)["reused"]) == (0, True)


def test_int8_that_loses_too_much_leaves_no_export(deploykit: Deploykit, checkpoint: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from deploykit.export import classification as stage

    monkeypatch.setattr(stage, "calibrate", lambda *a, **k: _with_ranges_cut(_calibrate(*a, **k)))
    code, _, err = deploykit("export", checkpoint, "--out", tmp_path / "e", "--int8", "--calibration-rows", 16)
    assert code == 1
    assert "points of macro-F1, more than --max-drop 0.5" in err
    assert "pytorch" in err, "the measured table"
    assert f"deploykit finetune --model {checkpoint} --qat" in err
    assert list(tmp_path.iterdir()) == []


def test_layers_that_int8_ruins_stay_in_fp32(deploykit: Deploykit, checkpoint: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from deploykit.export import classification as stage

    ruined: list[str] = []

    def calibrate(*args: object, **kwargs: object) -> object:
        calibration = _calibrate(*args, **kwargs)
        ruined.extend(name for name in calibration.histograms if "layer.4" in name or "layer.5" in name)  # type: ignore[attr-defined]
        return _with_ranges_cut(calibration, ruined, by=5000)

    monkeypatch.setattr(stage, "calibrate", calibrate)
    code, out, err = deploykit("export", checkpoint, "--out", tmp_path / "e", "--int8", "--calibration-rows", 32,
                               "--max-drop", 5, "--json")  # fmt: skip
    assert code == 0, err
    searches = json.loads(out)["quantization"]["search"]
    assert set(searches) == {"openvino", "onnxruntime"}
    for search in searches.values():
        assert set(search["order"][:3]) <= set(ruined)
        assert 0 < len(search["kept"]) <= len(ruined)
        assert {trial["kept"]: trial["drop"] for trial in search["trials"]}[len(search["kept"])] <= 5
    for line in json.loads(out)["accuracy"]:
        if line["precision"] == "int8":
            assert 18 < line["int8_kernels"] < 36
    calibration = json.loads((tmp_path / "e" / "calibration.json").read_text())
    assert set(ruined) <= set(calibration["ranges"])


def _calibrate(*args: object, **kwargs: object) -> object:
    from deploykit.export.calibration import calibrate

    return calibrate(*args, **kwargs)  # type: ignore[arg-type]


def _with_ranges_cut(calibration: object, names: list[str] | None = None, by: float = 60) -> object:
    import dataclasses

    from deploykit.export.calibration import Calibration

    assert isinstance(calibration, Calibration)
    cut = {
        n: dataclasses.replace(h, low=h.low / by, high=h.high / by) if names is None or n in names else h
        for n, h in calibration.histograms.items()
    }
    return dataclasses.replace(calibration, histograms=cut)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
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
    from deploykit.finetune.checkpoint import TorchClassifier
    from deploykit.runtime.text import normalize
    from deploykit.runtime.tokenizer import TextTokenizer

    reference = TorchClassifier.load(checkpoint)
    tokenizer = TextTokenizer(exported / "tokenizer.json", reference.task.max_length)
    real = [row.text for row in read_texts(str(tweets), ("text",), encoding="latin-1") if row.text][:8000]
    assert tokenizer.encode([normalize(t) for t in real]) == reference.encode(real)

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(st.characters(exclude_categories=()), max_size=80))
    def hostile(text: str) -> None:
        assert tokenizer.encode([normalize(text)]) == reference.encode([text])

    hostile()


def test_predictions_stream_in_order_and_resume(
    deploykit: Deploykit, exported: Path, small_csv: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(small_csv.read_text() + '"",neutral\n' + "x" * 100_000 + ",neutral\n", encoding="utf-8")
    words = ("predict", "--model", exported, "--input", rows, "--json")
    code, out, err = deploykit(*words, "--output", tmp_path / "a.jsonl")
    assert code == 0, err
    assert json.loads(out) == {"output": str(tmp_path / "a.jsonl"), "rows": 902, "errors": 1, "resumed": 0}
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["origin"] for line in lines[:2]] == ["rows.csv:2", "rows.csv:3"]
    assert json.loads(lines[900])["error"]
    assert json.loads(lines[901])["label"]

    # A kill leaves whole lines and perhaps half of one.
    code, _, err = deploykit(*words, "--output", tmp_path / "b.jsonl")
    partial = next(iter(_partial_name(tmp_path, deploykit, words)))
    partial.write_text("\n".join(lines[:600]) + "\n" + lines[600][:20], encoding="utf-8")
    code, out, err = deploykit(*words, "--output", tmp_path / "c.jsonl")
    assert code == 0, err
    assert json.loads(out)["resumed"] == 600
    assert (tmp_path / "c.jsonl").read_text().splitlines() == lines


def _partial_name(folder: Path, deploykit: Deploykit, words: tuple[object, ...]) -> list[Path]:
    """The temporary name that a killed run to c.jsonl would leave."""
    from deploykit import answers

    seen: list[Path] = []
    original = answers._appending

    def spy(partial: Path, failed: object) -> object:
        seen.append(partial)
        raise KeyboardInterrupt

    answers._appending = spy  # type: ignore[assignment]
    try:
        assert deploykit(*words, "--output", folder / "c.jsonl")[0] == 130
    finally:
        answers._appending = original
    return seen


def test_a_checkpoint_trained_elsewhere_exports_with_rows_named(
    deploykit: Deploykit, checkpoint: Path, small_csv: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, foreign / name)
    code, _, err = deploykit("export", foreign, "--out", tmp_path / "e")
    assert code == 1
    assert "--data" in err
    code, _, err = deploykit("export", foreign, "--out", tmp_path / "e", "--data", small_csv)
    assert code == 0, err
    code, out, err = deploykit("evaluate", foreign, "--data", small_csv, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"] == 900


def test_inspect_verifies(deploykit: Deploykit, exported: Path, tmp_path: Path) -> None:
    code, out, _ = deploykit("inspect", exported, "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "export"
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    damaged = bytearray((copy / "model.onnx").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (copy / "model.onnx").write_bytes(damaged)
    for words in (("inspect", copy), ("predict", "--model", copy, "hello"), ("package", copy, "--name", "x")):
        code, _, err = deploykit(*words)
        assert code == 1
        assert "model.onnx" in err


def test_doctor_finds_every_command_ready(deploykit: Deploykit) -> None:
    code, out, err = deploykit("doctor", "--json")
    assert code == 0, err
    commands = json.loads(out)["commands"]
    assert {name for name, need in commands.items() if need["ready"]} >= {"finetune", "export", "serve", "bench"}


def test_help_is_quick_and_light() -> None:
    program = (
        "import sys; from click.testing import CliRunner; from deploykit.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print([m for m in ('numpy', 'torch', 'tritonclient', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
