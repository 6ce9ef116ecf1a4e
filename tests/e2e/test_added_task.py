"""A task of another package (tests/packages/token_classification) works with all commands."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
from paths import ROOT

PACKAGE = ROOT / "tests" / "packages" / "token_classification"
TEXT = "w1 w11 w50 w22"
ROWS = 200
LABELS = "B-PER I-PER O B-LOC"

# Runs several commands in one process, which imports torch only once, and reports its imports.
_TYPE = """
import json, sys
from click.testing import CliRunner
from deploykit.cli import main
for words in json.load(sys.stdin):
    done = CliRunner().invoke(main, words)
    light = not {"torch", "transformers"} & set(sys.modules)
    print(json.dumps([done.exit_code, done.stdout, done.stderr, light]), flush=True)
"""


class Typed(NamedTuple):
    """The result of a command. ``light``: torch and transformers had not been imported when it ended."""

    code: int
    out: str
    err: str
    light: bool


Type = Callable[..., list[Typed]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package, installed by pip into a separate folder."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder / "source")
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(folder / "site"), str(folder / "source"))  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def type_all(environment: dict[str, str]) -> Type:
    """Run commands one after the other in one process."""

    def run(*commands: tuple[object, ...]) -> list[Typed]:
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            (sys.executable, "-c", _TYPE), input=words, env=environment, capture_output=True, text=True, check=True
        )
        return [Typed(*json.loads(line)) for line in done.stdout.splitlines()]

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CoNLL file of sentences in which each word decides its own label."""
    draw = random.Random(0)
    blocks = []
    for _ in range(ROWS):
        lines: list[str] = []
        for _ in range(draw.randint(2, 5)):
            kind = draw.random()
            if kind < 0.35:
                lines += [f"w{draw.randint(0, 9)} B-PER", f"w{draw.randint(10, 19)} I-PER"]
            elif kind < 0.6:
                lines.append(f"w{draw.randint(20, 29)} B-LOC")
            else:
                lines.append(f"w{draw.randint(30, 60)} O")
        blocks.append("\n".join(lines))
    path = tmp_path_factory.mktemp("rows") / "rows.conll"
    path.write_text("\n\n".join(blocks) + "\n")
    return path


class Made(NamedTuple):
    """The artifacts of one run, and the output of the commands that made them."""

    checkpoint: Path
    export: Path
    repository: Path
    typed: dict[str, Typed]


@pytest.fixture(scope="module")
def made(type_all: Type, rows: Path, make_tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny BERT, fine-tuned, exported in fp32 and INT8, queried, measured and packaged."""
    folder = tmp_path_factory.mktemp("made")
    bert = make_tiny_checkpoint(folder / "bert", initializer_range=0.05)
    checkpoint, export, repository = folder / "ner", folder / "export", folder / "models"
    commands: dict[str, tuple[object, ...]] = {
        "finetune": ("finetune", "--task", "token-classification", bert, "--train", rows, "--output-dir", checkpoint,
                     "--num-train-epochs", 6, "--learning-rate", 3e-3, "--max-length", 32, "--json"),
        "export": ("export", checkpoint, "--output-dir", export, "--int8", "--calibration-rows", 64, "--max-drop", 5, "--json"),
        "predict": ("predict", checkpoint, TEXT),
        "evaluate": ("evaluate", export, "--data", rows, "--engine", "onnxruntime", "--precision", "fp32", "--json"),
        "package": ("package", export, "--name", "ner", "--model-repository", repository, "--json"),
        "inspect": ("inspect", export),
    }  # fmt: skip
    typed = dict(zip(commands, type_all(*commands.values())))
    assert {name: done.err for name, done in typed.items() if done.code} == {}
    return Made(checkpoint, export, repository, typed)


@pytest.fixture(scope="module")
def served(made: Made, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an embedded Triton that serves the model."""
    folder = tmp_path_factory.mktemp("server")
    ready, log = folder / "ready.json", folder / "log"
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = (sys.executable, "-m", "deploykit", "serve", "--model-repository", str(made.repository), *ports,
               "--ready-file", str(ready))  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield json.loads(ready.read_text())["http"]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows.jsonl, whose words are in a column with an unusual name."""
    folder = tmp_path_factory.mktemp("tables")
    records: list[dict[str, object]] = [{"mine": TEXT.split()}, {"mine": None}, {"mine": "w2 w12"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def asked(made: Made, served: str, rows: Path, tables: Path, type_all: Type) -> dict[str, Typed]:
    """Results of commands on the export and the served model, in a fresh process."""
    at, texts = ("--model", "ner", "--url", served), (TEXT, "", "w2 w12")
    file = ("predict", made.export, "--input", tables / "rows.jsonl", "--output", tables / "a.jsonl")
    commands: dict[str, tuple[object, ...]] = {
        "local": ("predict", made.export, *texts),
        "served": ("predict", *at, *texts),
        "detailed": ("predict", *at, TEXT, "--json"),
        "evaluate": ("evaluate", "ner", "--url", served, "--data", rows, "--json"),
        "undetected": file,
        "file": (*file, "--words-column", "mine"),
        "column": ("predict", *at, TEXT, "--text-column", "x"),
        "translate": ("translate", *at, TEXT),
        "setting": (
            "package",
            made.export,
            "--name",
            "other",
            "--model-repository",
            made.repository,
            "--max-num-seqs",
            5,
        ),
        "bundle": ("bundle", made.export, "--device", "orin-nano", "--jetpack", "6.2", "--output", tables / "b.tar.gz"),
    }
    return dict(zip(commands, type_all(*commands.values())))


def test_finetune_reports_the_tasks_own_metrics(made: Made) -> None:
    record = json.loads(made.typed["finetune"].out)
    assert record["labels"] == ["O", "B-LOC", "B-PER", "I-PER"]
    assert record["metrics"]["entity_f1"] > 0.9
    card = (made.checkpoint / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert f"| all | {record['metrics']['entity_precision']:.3f} |" in card


def test_export_checks_parity_and_writes_int8(made: Made) -> None:
    record = json.loads(made.typed["export"].out)
    assert record["parity"]["max_difference"] < 1e-3
    assert {(line["engine"], line["precision"]) for line in record["accuracy"]} == {
        ("pytorch", "fp32"), ("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "int8"), ("onnxruntime", "int8"),
    }  # fmt: skip
    assert all(line["entity_f1"] > 0.85 for line in record["accuracy"])
    assert all(line["int8_kernels"] > 0 for line in record["accuracy"] if line["precision"] == "int8")
    assert "label" in made.typed["inspect"].out
    session = onnxruntime.InferenceSession(made.export / "model.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 3), (4, 17)):
        ids = np.ones(shape, np.int64)
        assert session.run(None, {"input_ids": ids, "attention_mask": ids})[0].shape == (*shape, 4)


def test_checkpoint_export_and_served_model_label_every_word(made: Made, asked: dict[str, Typed]) -> None:
    assert made.typed["predict"].out == f"{LABELS}\n"
    assert asked["local"].out == asked["served"].out == f"{LABELS}\n\nB-PER I-PER\n"
    assert json.loads(asked["detailed"].out)["results"][0] == {
        "origin": "text 1",
        "text": TEXT,
        "words": TEXT.split(),
        "labels": LABELS.split(),
        "entities": [
            {"type": "PER", "text": "w1 w11", "start": 0, "end": 2},
            {"type": "LOC", "text": "w22", "start": 3, "end": 4},
        ],
    }
    assert all(done.light for done in asked.values()), "a serving half imports torch"


def test_the_served_model_is_as_good_as_the_export(made: Made, asked: dict[str, Typed]) -> None:
    record, expected = json.loads(asked["evaluate"].out), json.loads(made.typed["evaluate"].out)
    assert (record["rows"], expected["rows"]) == (ROWS, ROWS)
    assert record["metrics"]["entity_f1"] == pytest.approx(expected["metrics"]["entity_f1"], abs=0.02)


def test_predict_reads_the_tasks_own_columns(asked: dict[str, Typed], tables: Path) -> None:
    assert asked["undetected"].code == 1
    assert "give --words-column" in asked["undetected"].err
    assert asked["file"].code == 1, "a row has no text"
    answers = [json.loads(line) for line in (tables / "a.jsonl").read_text().splitlines()]
    assert [answer.get("labels") for answer in answers] == [LABELS.split(), None, ["B-PER", "I-PER"]]
    assert answers[1]["error"] == "the text is missing"


def test_options_of_other_tasks_are_refused(asked: dict[str, Typed]) -> None:
    assert [asked[name].code for name in ("column", "translate", "setting", "bundle")] == [2, 2, 2, 2]
    assert "--text-column does not apply to a model that labels words" in asked["column"].err
    assert "labels words, it does not translate" in asked["translate"].err
    assert "max_rows is a setting of translation" in asked["setting"].err
    assert "no bundle for a Jetson" in asked["bundle"].err


def test_no_file_of_deploykit_names_the_added_task() -> None:
    naming = [
        str(path)
        for path in (ROOT / "deploykit").rglob("*.py")
        if path.name != "registry.py" and any(word in path.read_text() for word in ("token_class", "token-class"))
    ]
    assert naming == []


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[deploykit.tasks]\nbroken = nowhere.task:TASK\n")
    done = subprocess.run(
        (sys.executable, "-m", "deploykit", "evaluate", "x", "--data", "y"),
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "the task broken cannot be loaded from nowhere.task:TASK" in done.stderr
    assert "Traceback" not in done.stderr
