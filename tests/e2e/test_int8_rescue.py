"""Remedies if INT8 loses too much: layers left in fp32 and SmoothQuant at export, and quantization-aware training."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines.native.loader import lacks

Deploykit = Callable[..., tuple[int, str, str]]
TRAINING = ("--per-device-train-batch-size", 32, "--max-length", 24, "--seed", 3)


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Write texts of known words, labelled "good" if most of them are among the first hundred."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [chance.randrange(200) for _ in range(chance.choice((5, 7, 9, 11, 13)))]
        label = "good" if 2 * sum(word < 100 for word in words) > len(words) else "bad"
        rows.append({"text": " ".join(f"w{word}" for word in words), "label": label})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    sizes = {"train": 2000, "validation": 200, "test": 400}
    return {name: write_rows(folder / f"{name}.jsonl", size, i) for i, (name, size) in enumerate(sizes.items())}


@pytest.fixture(scope="module")
def run(
    deploykit: Deploykit,
    rows: dict[str, Path],
    make_tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small classifier trained on the task."""
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_checkpoint(folder / "random", initializer_range=0.05)
    code, out, err = deploykit("finetune", model, *given(rows), "--output-dir", folder / "a", "--max-steps", 250,
                               "--learning-rate", 4e-3, *TRAINING, "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["metrics"]["macro_f1"] > 0.9, "it learned the task"
    return folder / "a"


@pytest.fixture(scope="module")
def kept(deploykit: Deploykit, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of the classifier."""
    out = tmp_path_factory.mktemp("kept") / "c"
    code, _, err = deploykit("calibrate", run, "--output-dir", out, "--calibration-rows", 16)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def with_outliers(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without manifest that computes the same with two values of each attention 3,000 times as large."""
    folder = tmp_path_factory.mktemp("outliers") / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(run / name, folder / name)
    weights = load_file(run / "model.safetensors")
    for layer in range(2):
        block = f"bert.encoder.layer.{layer}.attention"
        for name in ("weight", "bias"):
            weights[f"{block}.self.value.{name}"][[1, 20]] *= 3000
        weights[f"{block}.output.dense.weight"][:, [1, 20]] /= 3000
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def given(rows: dict[str, Path]) -> list[object]:
    return [word for name, path in rows.items() for word in (f"--{name}", path)]


def macro_f1(exported: dict[str, Any], precision: str, engine: str) -> float:
    (line,) = (x for x in exported["accuracy"] if (x["precision"], x["engine"]) == (precision, engine))
    return float(line["macro_f1"])


def test_training_for_int8_loses_less_than_calibration_alone(
    deploykit: Deploykit, with_outliers: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--int8", "--max-drop", 100, "--data", rows["test"], "--calibration-data", rows["train"], "--json")
    code, out, err = deploykit("export", with_outliers, "--output-dir", tmp_path / "ptq", *words)
    assert code == 0, err
    calibrated = json.loads(out)
    code, out, err = deploykit("finetune", with_outliers, *given(rows), "--qat", "--qat-method", "mse", "--output-dir",
                               tmp_path / "run", "--max-steps", 100, "--learning-rate", 5e-4, *TRAINING, "--json")  # fmt: skip
    assert code == 0, err
    record = json.loads(out)
    code, out, err = deploykit("export", tmp_path / "run", "--output-dir", tmp_path / "qat", *words[:3], "--json")
    assert code == 0, err
    trained = json.loads(out)

    for engine in ("openvino", "onnxruntime"):
        fp32 = macro_f1(calibrated, "fp32", engine)
        loss, trained_loss = (fp32 - macro_f1(exported, "int8", engine) for exported in (calibrated, trained))
        assert loss > 0.05, "calibration alone loses a lot"
        assert trained_loss < loss / 2
        # The engines reproduce the metrics of training.
        assert macro_f1(trained, "int8", engine) == pytest.approx(record["qat"]["after"]["int8"]["macro_f1"], abs=0.02)
    assert trained["quantization"]["method"] == "trained"
    assert trained["quantization"]["linear_layers"] == 12

    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model.safetensors", "qat.json", "metrics.json", "README.md", "finetune.toml"} <= names
    assert not [name for name in load_file(tmp_path / "run" / "model.safetensors") if "input_scales" in name]
    assert "| after this training, int8 |" in (tmp_path / "run" / "README.md").read_text()
    assert "qat = true" in (tmp_path / "run" / "finetune.toml").read_text()
    ranges = json.loads((tmp_path / "qat" / "calibration.json").read_text())
    assert ranges["method"] == "trained"
    scales = json.loads((tmp_path / "run" / "qat.json").read_text())["scales"]
    assert sorted(high / 127 for _, high in ranges["ranges"].values()) == pytest.approx(sorted(set(scales.values())))


def test_a_killed_training_for_int8_continues_to_the_same_end(
    deploykit: Deploykit, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback

    from deploykit.training import trainer

    class Kill(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    words = (
        "finetune",
        run,
        "--qat",
        "--max-steps",
        9,
        "--eval-steps",
        3,
        "--per-device-train-batch-size",
        16,
        "--json",
    )
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "whole")
    assert code == 0, err
    whole = json.loads(out)
    splits = json.loads((run / "manifest.json").read_text())["metrics"]["rows"]
    assert whole["rows"] == splits, "the rows of the run, split as they were"
    with monkeypatch.context() as patch:
        callbacks = trainer.callbacks
        patch.setattr(trainer, "callbacks", lambda *a: [*callbacks(*a), Kill()])
        code, _, err = deploykit(*words, "--output-dir", tmp_path / "killed")
    assert code == 130, err
    assert not (tmp_path / "killed").exists()
    code, out, err = deploykit(*words, "--output-dir", tmp_path / "killed")
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert json.loads(out)["qat"] == whole["qat"]
    assert (tmp_path / "killed" / "qat.json").read_text() == (tmp_path / "whole" / "qat.json").read_text()
    assert load_manifest(tmp_path / "killed").task == load_manifest(run).task
    code, out, err = deploykit(
        "finetune", "--config", tmp_path / "whole" / "finetune.toml", "--output-dir", tmp_path / "whole"
    )
    assert code == 0, err
    assert "training for INT8" in out
    assert "reused" in out


def test_smooth_quant_is_an_option_of_the_export(deploykit: Deploykit, run: Path, tmp_path: Path) -> None:
    words = ("--int8", "--max-drop", 5, "--calibration-rows", 64, "--json")
    code, out, err = deploykit("export", run, "--output-dir", tmp_path / "e", "--smooth-quant", *words)
    assert code == 0, err
    quantization = json.loads(out)["quantization"]
    assert quantization["smooth_quant"] == {"alpha": 0.5, "folded": 0, "multiplied": 4}
    assert quantization["linear_layers"] == 12
    assert not (tmp_path / "e" / "smoothed.onnx").exists()
    kernels = {x["engine"]: x["int8_kernels"] for x in json.loads(out)["accuracy"] if x["precision"] == "int8"}
    assert kernels == {"openvino": 12, "onnxruntime": 12, **({"native": 8} if lacks() is None else {})}
    code, _, err = deploykit("export", run, "--output-dir", tmp_path / "e", "--smooth-quant", 0.8, *words)
    assert code == 1, "another alpha is another export"
    assert "made from other inputs or options" in err
    code, out, err = deploykit("export", run, "--output-dir", tmp_path / "f", "--smooth-quant", 0.8, *words)
    assert code == 0, err
    assert json.loads(out)["quantization"]["smooth_quant"]["alpha"] == 0.8


def test_int8_that_loses_too_much_leaves_no_export(
    deploykit: Deploykit, run: Path, kept: Path, with_ranges: Callable[..., None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ruined = shutil.copytree(kept, tmp_path / "c")
    with_ranges(ruined, "", 1 / 400)
    # So small a model can do without half of its parts.
    monkeypatch.setattr("deploykit.quantization.search._MOST_KEPT", 0.15)
    code, _, err = deploykit("export", run, "--output-dir", tmp_path / "e", "--int8", "--calib", ruined)
    assert code == 1, err
    assert "points of macro-F1, more than --max-drop 0.5" in err
    assert "pytorch" in err, "the measured table"
    assert f"deploykit finetune {run} --qat" in err
    assert list(tmp_path.iterdir()) == [ruined]


def test_layers_that_int8_ruins_stay_in_fp32(
    deploykit: Deploykit, run: Path, kept: Path, with_ranges: Callable[..., None], tmp_path: Path
) -> None:
    ruined = shutil.copytree(kept, tmp_path / "c")
    with_ranges(ruined, "layer.0", 1 / 5000)
    code, out, err = deploykit("export", run, "--output-dir", tmp_path / "e", "--int8", "--calib", ruined,
                               "--max-drop", 5, "--json")  # fmt: skip
    assert code == 0, err
    quantization = json.loads(out)["quantization"]
    assert quantization["calibration"]["rows"] == 16
    assert set(quantization["search"]) == {"openvino", "onnxruntime"}
    for search in quantization["search"].values():
        assert all("layer.0" in name for name in search["order"][:3])
        assert search["sensitivity"] == sorted(search["sensitivity"], reverse=True)
        assert 0 < len(search["kept"]) <= 4
        assert search["kept"] == search["order"][: len(search["kept"])]
        trials = {trial["kept"]: trial for trial in search["trials"]}
        assert trials[0]["drop"] > 5 >= trials[len(search["kept"])]["drop"]
    for line in json.loads(out)["accuracy"]:
        if line["precision"] == "int8":
            assert 6 <= line["int8_kernels"] < 12
    assert (tmp_path / "e" / "search.html").read_text().count("<svg") == 1
    code, out, _ = deploykit("inspect", tmp_path / "e")
    assert code == 0
    assert "parts stay in fp32" in out
    assert "search.html" in out
    assert {p.name for p in tmp_path.iterdir()} == {"c", "e"}, "the measurement log is removed"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("export", "RUN", "--smooth-quant"), 2, "--int8"),
        (("export", "RUN", "--int8", "--smooth-quant", "1.5"), 2, "from 0 to 1"),
        (("export", "RUN", "--int8", "--smooth-quant", "--calib", "KEPT"), 2, "was collected without it"),
        (("finetune", "RUN", "--qat-method", "mse", "--train", "ROWS"), 2, "--qat-method is for --qat"),
        (("finetune", "RUN", "--qat", "--lora-r", "4"), 2, "--lora-r"),
        (("finetune", "RUN", "--qat", "--multi-label"), 2, "leave out --multi-label"),
        (("finetune", "RUN"), 2, "--train is missing"),
        (("finetune", "RUN", "--qat", "--train", "OTHER", "--max-length", "24"), 1, "'superb'"),
        (("finetune", "--task", "translation", "--from-config", "marian-tiny", "--source-lang", "en", "--target-lang", "fr",
          "--train", "ROWS", "--qat"), 2, "--qat is for --task classification"),
    ],
)  # fmt: skip
def test_senseless_options_are_refused(
    deploykit: Deploykit,
    run: Path,
    kept: Path,
    rows: dict[str, Path],
    tmp_path: Path,
    words: tuple[str, ...],
    code: int,
    named: str,
) -> None:
    (tmp_path / "other.jsonl").write_text(rows["test"].read_text() + '\n{"text": "w1", "label": "superb"}\n')
    places = {"RUN": run, "ROWS": rows["train"], "OTHER": tmp_path / "other.jsonl", "KEPT": kept}
    got, _, err = deploykit(*(places.get(word, word) for word in words), "--output-dir", tmp_path / "o")
    assert got == code, err
    assert named in err
    assert "remedy" in err
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_trained_for_int8_refuses_other_ranges(
    deploykit: Deploykit, run: Path, kept: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "qat.json").write_text('{"scales": {"bert.pooler.dense": 0.1}, "method": "minmax", "rows": 1}')
    for words in (("--method", "mse"), ("--smooth-quant",), ("--calib", kept)):
        code, _, err = deploykit("export", tmp_path / "run", "--output-dir", tmp_path / "e", "--int8", *words)
        assert code == 2
        assert "its own ranges" in err
    code, _, err = deploykit("export", tmp_path / "run", "--output-dir", tmp_path / "e", "--int8")
    assert code == 1
    assert "qat.json: has no scale for the input of" in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
