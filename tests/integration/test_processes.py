"""``finetune --processes``: the same training as in one process, and all end together."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from language_models import write_checkpoint, write_rows
from safetensors.numpy import load_file
from tiny_answerer import write_checkpoint as write_answerer
from tiny_answerer import write_squad
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from deploykit.artifacts import load_manifest
from deploykit.cli import main
from deploykit.tasks.text_generation.chat_template import CHATML

MakeCheckpoint = Callable[..., Path]
TIMEOUT_S = 300


@pytest.fixture
def words(make_tiny_checkpoint: MakeCheckpoint, tmp_path: Path) -> list[str]:
    """A run on 320 rows, in a model without dropout: its random numbers would differ between processes."""
    drawn = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as lines:
        for _ in range(400):
            label = drawn.choice("ab")
            known = range(100) if label == "a" else range(60, 200)
            text = " ".join(f"w{i}" for i in drawn.choices(known, k=drawn.randint(3, 20)))
            lines.write(json.dumps({"text": text, "label": label}) + "\n")
    model = make_tiny_checkpoint(tmp_path / "model")
    return [sys.executable, "-m", "deploykit", "finetune", str(model), "--train", str(tmp_path / "rows.jsonl"),
            "--learning-rate", "1e-3", "--num-train-epochs", "2"]  # fmt: skip


def run(words: list[str], *more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words, *map(str, more)], capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run_alone(words: list[str], *more: object) -> subprocess.CompletedProcess[str]:
    """Run in this process, which has imported torch already, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(main, [*words[3:], *map(str, more)])
    finally:
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def losses(told: str) -> list[str]:
    return [
        line.split("loss ")[1].split(",")[0] for line in told.splitlines() if "learning rate" in line and "loss" in line
    ]


def test_two_processes_train_as_one_does(words: list[str], tmp_path: Path) -> None:
    alone = run_alone(words, "--per-device-train-batch-size", 16, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    together = run(words, "--output-dir", tmp_path / "two", "--processes", 2)
    assert together.returncode == 0, together.stderr
    by_torchrun = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words[1:]],
        "--per-device-train-batch-size", 8, "--output-dir", tmp_path / "three",
    )  # fmt: skip
    assert by_torchrun.returncode == 0, by_torchrun.stderr

    assert "16 of 2 processes" in together.stderr, "the batch that the recipe chooses is shared"
    assert together.stderr.count("splits: ") == 1, "one process prints"
    assert len(losses(alone.stderr)) >= 20
    # A key's bias changes no answer (softmax), so its gradient is rounding noise, which Adam scales up.
    one = {k: v for k, v in load_file(tmp_path / "one" / "model.safetensors").items() if not k.endswith("key.bias")}
    for done, name in ((together, "two"), (by_torchrun, "three")):
        assert losses(done.stderr) == losses(alone.stderr)
        weights = load_file(tmp_path / name / "model.safetensors")
        assert max(float(abs(weights[key] - one[key]).max()) for key in one) < 1e-4
        metrics = [
            load_manifest(tmp_path / folder, "checkpoint").metrics["test"]["macro_f1"] for folder in ("one", name)
        ]
        assert metrics[0] == metrics[1]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left behind"


def test_two_processes_learn_a_wider_teachers_hidden_states_as_one_does(words: list[str], tmp_path: Path) -> None:
    model, wide = Path(words[4]), tmp_path / "wide"
    config = AutoConfig.from_pretrained(model, hidden_size=48, num_hidden_layers=3, id2label={0: "a", 1: "b"})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(model).save_pretrained(wide)
    words = [*words, "--teacher", str(wide), "--distill-hidden", "2", "--max-steps", "6", "--augment", "swap=0.2"]
    alone = run_alone(words, "--per-device-train-batch-size", 16, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    together = run(words, "--per-device-train-batch-size", 8, "--output-dir", tmp_path / "two", "--processes", 2)
    assert together.returncode == 0, together.stderr
    assert "projected to their width" in together.stderr
    assert losses(together.stderr) == losses(alone.stderr)


def test_two_processes_train_a_language_model_as_one_that_accumulates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "lm", template=CHATML)
    write_rows(tmp_path / "rows.jsonl")
    words = [sys.executable, "-m", "deploykit", "finetune", str(tmp_path / "lm"), "--task", "text-generation", "--train",
             str(tmp_path / "rows.jsonl"), "--num-train-epochs", "2", "--batch-tokens", "200", "--learning-rate", "1e-3",
             "--eval-rows", "2", "--mixed-precision", "no"]  # fmt: skip
    alone = run_alone(words, "--gradient-accumulation-steps", 2, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    together = run(words, "--processes", 2, "--output-dir", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    assert len(losses(alone.stderr)) >= 8
    assert losses(together.stderr) == losses(alone.stderr)
    assert together.stderr.count("splits: ") == 1, "one process prints"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max(float(abs(two[key] - one[key]).max()) for key in one) < 1e-4
    samples = [load_manifest(tmp_path / name, "checkpoint").metrics["samples"] for name in ("one", "two")]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 2


def test_two_processes_train_on_questions_as_one_does(tmp_path: Path) -> None:
    write_answerer(tmp_path / "qa", sharp=True)
    write_squad(tmp_path / "rows.json", 40, 4)
    words = [sys.executable, "-m", "deploykit", "finetune", str(tmp_path / "qa"), "--task", "question-answering", "--train",
             str(tmp_path / "rows.json"), "--num-train-epochs", "1", "--max-length", "64", "--doc-stride", "16", "--dropout", "0",
             "--attention-dropout", "0", "--learning-rate", "1e-3", "--mixed-precision", "no"]  # fmt: skip
    alone = run_alone(words, "--per-device-train-batch-size", 16, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    together = run(words, "--per-device-train-batch-size", 8, "--processes", 2, "--output-dir", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    check_alike(tmp_path, alone, together)


def test_two_processes_train_a_translator_as_one_that_accumulates(
    make_tiny_translation: MakeCheckpoint, tmp_path: Path
) -> None:
    make_tiny_translation(tmp_path / "export", keep_checkpoint=tmp_path / "fr")
    drawn = random.Random(0)
    with (tmp_path / "rows.csv").open("w") as lines:
        lines.write("en,fr\n")
        for i in range(200):
            kind = drawn.choice(["file", "folder", "window"])
            lines.write(
                f"Open the {kind} {i} {'now ' * drawn.randint(0, 4)},Ouvrir le {kind} {i} {'ici ' * drawn.randint(0, 4)}\n"
            )
    words = [sys.executable, "-m", "deploykit", "finetune", str(tmp_path / "fr"), "--task", "translation", "--train",
             str(tmp_path / "rows.csv"), "--source-lang", "en", "--target-lang", "fr", "--num-train-epochs", "2", "--batch-tokens", "200",
             "--dropout", "0", "--attention-dropout", "0", "--learning-rate", "1e-3", "--mixed-precision", "no",
             "--eval-rows", "8", "--max-length", "100"]  # fmt: skip
    alone = run_alone(words, "--gradient-accumulation-steps", 2, "--output-dir", tmp_path / "one")
    assert alone.returncode == 0, alone.stderr
    together = run(words, "--processes", 2, "--output-dir", tmp_path / "two")
    assert together.returncode == 0, together.stderr
    check_alike(tmp_path, alone, together)
    samples = [load_manifest(tmp_path / name, "checkpoint").metrics["samples"] for name in ("one", "two")]
    assert samples[0] == samples[1]


def check_alike(
    folder: Path, alone: subprocess.CompletedProcess[str], together: subprocess.CompletedProcess[str]
) -> None:
    """Check that the runs "one" and "two" had the same losses and have the same weights and metrics."""
    assert len(losses(alone.stderr)) >= 8
    assert losses(together.stderr) == losses(alone.stderr)
    assert together.stderr.count("splits: ") == 1, "one process prints"
    one, two = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    # As above, what adds the same to all logits of a softmax moves by rounding noise: a key's bias, and of questions the last
    # biases.
    noise = re.compile(r"key\.bias|k_proj\.bias|layer\.1\.output\.LayerNorm\.bias|qa_outputs\.bias")
    assert max(float(abs(two[key] - one[key]).max()) for key in one if not noise.search(key)) < 1e-4
    metrics = [load_manifest(folder / name, "checkpoint").metrics["test"] for name in ("one", "two")]
    assert metrics[0] == metrics[1]


def begun(words: list[str], out: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a run of two processes that lasts. Returns it, and the process ids of the two once they train."""
    command = subprocess.Popen(
        [*words, "--max-steps", "100000", "--output-dir", str(out), "--processes", "2"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert command.stderr is not None
    for line in command.stderr:
        if line.startswith("step "):
            break
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    assert len(children) == 2
    return command, [int(child) for child in children]


def gone(process: int) -> bool:
    for _ in range(100):
        if not Path(f"/proc/{process}").exists():
            return True
        time.sleep(0.1)
    return False


def test_the_death_of_one_ends_all(words: list[str], tmp_path: Path) -> None:
    command, (first, second) = begun(words, tmp_path / "run")
    os.kill(second, signal.SIGKILL)
    _, err = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 1
    assert "process 2 of 2 was ended by SIGKILL; the others were ended too" in err
    assert "continues from the last checkpoint" in err
    assert gone(first)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_all(words: list[str], tmp_path: Path, number: signal.Signals, code: int) -> None:
    command, children = begun(words, tmp_path / "run")
    command.send_signal(number)
    _, err = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == code
    assert "interrupted: the same command continues from the last checkpoint" in err
    assert all(map(gone, children))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--processes", 0), 2, "--processes is 0"),
        (("--processes", 2, "--folds", 2), 2, "--folds and --learning-curve train each part in one process"),
        (("--processes", 2, "--search", 2), 2, "--search trains each run in one process"),
        (("--processes", 2, "--max-length", 5000), 2, "takes at most 32 tokens"),
    ],
)
def test_an_error_is_told_once(
    words: list[str], tmp_path: Path, more: tuple[object, ...], code: int, message: str
) -> None:
    done = run(words, "--output-dir", tmp_path / "run", *more)
    assert done.returncode == code
    assert done.stderr.count(message) == 1
    assert done.stderr.count("error: ") == 1
