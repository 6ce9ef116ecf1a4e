"""All levers against overfitting at once, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_run import kill_at_step
from safetensors.torch import load_file
from tiny_answerer import write_checkpoint as write_answerer
from tiny_answerer import write_squad
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from deploykit.bench import beside_teacher

Deploykit = Callable[..., tuple[int, str, str]]


def test_a_run_takes_all_levers(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], small_csv: Path, tmp_path: Path
) -> None:
    # A teacher with the labels of the tweets.
    model, teacher = make_tiny_checkpoint(tmp_path / "m"), tmp_path / "teacher"
    code, _, err = deploykit(
        "finetune", model, "--train", small_csv, "--output-dir", teacher, "--max-train-samples", 160, "--max-steps", 2
    )
    assert code == 0, err
    code, out, err = deploykit(
        "finetune", model, "--teacher", teacher, "--train", small_csv, "--output-dir", tmp_path / "r",
        "--max-train-samples", 160, "--max-steps", 4, "--l1", 1e-3, "--l2", 1e-3, "--layerwise-lr-decay", 0.8,
        "--freeze-layers", 1, "--gradual-unfreezing", 0.5, "--attention-dropout", 0.2, "--classifier-dropout", 0.3, "--focal-gamma", 2,
        "--augment", "typos=0.3", "--augment", "case=1", "--r-drop", 1, "--gradient-accumulation-steps", 2, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["metrics"]["accuracy"] > 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert set(metrics["teacher"]) == {"validation", "test"}
    assert "with typos: " in err
    splits = [(tmp_path / "r" / "splits" / f"{name}.jsonl").read_text() for name in ("train", "validation", "test")]
    assert "with typos" not in "".join(splits), "only the training sees the copies"
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["attention_probs_dropout_prob"], config["classifier_dropout"]) == (0.2, 0.3)


def test_a_smaller_student_learns_hidden_states_and_goes_on_after_a_kill(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, rows, out = make_tiny_checkpoint(tmp_path / "m"), tmp_path / "rows.csv", tmp_path / "r"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(60)))
    wide = tmp_path / "wide"
    config = AutoConfig.from_pretrained(model, hidden_size=48, intermediate_size=96, num_hidden_layers=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(model).save_pretrained(wide)
    command = (
        "finetune", model, "--teacher", wide, "--distill-hidden", 2, "--student", "layers=1", "--train", rows,
        "--output-dir", out, "--max-steps", 4, "--eval-steps", 2,
    )  # fmt: skip
    kill_at_step(3, *command)
    code, _, err = deploykit(*command)
    assert code == 0, err
    assert "continuing the unfinished run" in err
    assert "hidden states: 0 from 2, projected to their width" in err
    assert "`wide` and its hidden states" in (out / "README.md").read_text()
    assert "distill_hidden = 2.0" in (out / "finetune.toml").read_text()
    code, again, err = deploykit("finetune", "--config", out / "finetune.toml", "--output-dir", out)
    assert (code, "reused" in again) == (0, True), err
    assert not [key for key in load_file(out / "model.safetensors") if "distill" in key]


def test_an_export_is_measured_beside_teacher_and_student(
    deploykit: Deploykit, make_tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside_teacher, "_SECONDS", 0.1)
    teacher, rows = make_tiny_checkpoint(tmp_path / "m"), tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"w{i} w{i % 7},{('bad', 'good')[i % 2]}\n" for i in range(80)))
    run, out = tmp_path / "student", tmp_path / "int8"
    code, text, err = deploykit(
        "finetune", "--teacher", teacher, "--student", "layers=1", "--train", rows, "--output-dir", run, "--max-steps", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "\nteacher\n" in text
    assert "against teacher (paired bootstrap, 95 %): " in text
    command = ("export", run, "--int8", "--max-drop", 100, "--output-dir", out)
    code, text, err = deploykit(*command)
    assert code == 0, err
    assert "from the checkpoint" in text, "the accuracy table compares"
    assert "from the checkpoint" not in err, "and is printed once"
    table = text[text.index("from the teacher") :].splitlines()[1:4]
    assert [line.split(":")[0] for line in table] == ["teacher", "student", "export"]
    assert all("[" in line for line in table)
    assert (tmp_path / "int8.teacher.html").is_file()
    monkeypatch.setattr(beside_teacher, "bench_targets", None)  # what was measured is kept
    code, printed, err = deploykit(*command, "--json")
    assert code == 0, err
    models = json.loads(printed)["teacher"]
    assert all({"macro_f1", "size_mb", "p50_ms"} <= set(model) and "macro_f1" in model["intervals"] for model in models)
    assert [bool(model["differences"]) for model in models] == [False, True, True]
    code, printed, err = deploykit(*command, "--json", "--no-beside-teacher")
    assert (code, "teacher" in json.loads(printed)) == (0, False), err
    shutil.rmtree(teacher)
    code, printed, err = deploykit(
        "export", run, "--int8", "--max-drop", 100, "--output-dir", tmp_path / "other", "--json"
    )
    assert (code, "teacher" in json.loads(printed)) == (0, False), err
    assert "not compared with its teacher" in err


def test_an_answerers_export_is_measured_beside_its_teacher(
    deploykit: Deploykit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside_teacher, "_SECONDS", 0.1)
    teacher, rows = write_answerer(tmp_path / "teacher", sharp=True), write_squad(tmp_path / "rows.json", 20)
    run, out = tmp_path / "student", tmp_path / "int8"
    code, text, err = deploykit(
        "finetune", "--task", "question-answering", "--teacher", teacher, "--student", "layers=1", "--train", rows,
        "--max-length", 48, "--doc-stride", 12, "--max-steps", 4, "--distill-hidden", 1, "--output-dir", run,
    )  # fmt: skip
    assert code == 0, err
    assert "layers of the student learn the teacher's hidden states: 0 from 0" in err
    assert "\nteacher\n" in text
    assert "against teacher (paired bootstrap, 95 %): " in text
    assert "`teacher` and its hidden states" in (run / "README.md").read_text()
    code, text, err = deploykit("export", run, "--int8", "--max-drop", 100, "--output-dir", out)
    assert code == 0, err
    table = text[text.index("from the teacher") :].splitlines()[1:4]
    assert [line.split(":")[0] for line in table] == ["teacher", "student", "export"]
    assert (tmp_path / "int8.teacher.html").is_file()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--layerwise-lr-decay", 0), "--layerwise-lr-decay is 0"),
        (("--student", "layers=2", "--lora-r", 4), "--student changes the layers"),
        (("--qat", "--teacher", "m"), "--qat continues the training of a checkpoint"),
        (("--augment", "typos"), "--augment 'typos' is not a noise with a rate"),
        (("--distill-hidden", 1), "--distill-hidden is for --teacher"),
        (("--r-drop", -1), "--r-drop is -1"),
        (("--regression", "--focal-gamma", 2), "--focal-gamma is for labels"),
    ],
)
def test_levers_without_sense_are_refused(
    words: tuple[object, ...], says: str, deploykit: Deploykit, tmp_path: Path
) -> None:
    code, _, err = deploykit("finetune", "m", "--train", "x.csv", "--output-dir", tmp_path / "r", *words)
    assert code == 2
    assert says in err
