"""Train a MiniLM with ``deploykit finetune`` and with a plain Trainer, and compare their F1 on the same test rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from answering_peers import Answers, Peer, Subject
from suite import say

from deploykit.artifacts import load_manifest
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.metrics import scores
from deploykit.tasks.question_answering.rows import Example
from deploykit.training.rows import read_split

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "max_length": 384, "doc_stride": 128, "num_train_epochs": 2, "learning_rate": 2e-4, "validation_fraction": 0,
    "test_fraction": 0.5, "eval_steps": 20,
}  # fmt: skip


def train(model: Path, data: Path, folder: Path) -> Path:
    """Fine-tune and export, unless that is done; an interrupted run continues. Returns the export's folder."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
    _deploykit(
        "finetune", model, "--task", "question-answering", "--train", data, "--output-dir", folder / "run",
        *words,
    )  # fmt: skip
    _deploykit(
        "export", folder / "run", "--output-dir", folder / "export", "--int8", "--max-drop", 100,
        "--calibration-rows", 64, "--measure-rows", 100,  # the parts measure themselves
    )  # fmt: skip
    return folder / "export"


def train_plainly(model: Path, folder: Path) -> Path:
    """Train with a plain Trainer on the same rows by the same options, unless that is done."""
    run = folder / "run"
    options = load_manifest(run, "checkpoint").options
    job = {**options, "model": str(model), "train": str(run / "splits" / "train.jsonl"), "out": str(folder / "plain")}
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("answering_trainer.py"))], input=json.dumps(job), text=True,
        check=True,
    )  # fmt: skip
    return folder / "plain"


def compare(subject: Subject, plain: Path, threads: int) -> dict[str, Any]:
    """Return exact match and F1, in percent, of our run as it measured itself, and of the plain one by transformers'
    pipeline; and how many answers of the pipeline are equal."""
    rows = read_split(subject.run, "test", Example)
    ours = json.loads((subject.run / "metrics.json").read_text(encoding="utf-8"))["test"]
    pairs = [(row.question, row.context) for row in rows]
    answers = []
    for folder in (subject.run, plain):
        job = {"engine": "transformers", "folder": str(folder), "tokenizer": str(subject.export)}
        with Peer("transformers", job, subject.task, threads) as peer:
            answers.append(peer.answer([pairs])[1])
    exact, f1 = graded(subject.task, answers[1], rows)
    return {
        "rows": len(rows),
        "train_rows": len(read_split(subject.run, "train", Example)),
        "deploykit": {"exact_match": 100 * ours["exact_match"], "f1": 100 * ours["f1"],
                      "f1_interval": [100 * value for value in ours["intervals"]["f1"]]},
        "trainer": {"exact_match": exact, "f1": f1},
        "same_answers": float(np.mean([a == b for a, b in zip(*answers)])),
    }  # fmt: skip


def graded(task: QuestionAnswering, answers: Answers, rows: Sequence[Example]) -> tuple[float, float]:
    """Return exact match and F1 of answers to ``rows``, in percent."""
    exact, f1 = scores(task, [text for text, *_ in answers], [row.answers.text for row in rows])
    return 100 * float(exact.mean()), 100 * float(f1.mean())


def _deploykit(*words: object) -> None:
    command = [sys.executable, "-m", "deploykit", *map(str, words)]
    say(f"$ {' '.join(command[2:])}")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
