"""Share code between the steps of the GPU check: sizes, data, fine-tuned checkpoints, and measuring."""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WINDOW = 64
"""Tokens of a text, or of a window of question and context."""
_CONTEXT_TWEETS = 3


@dataclass(frozen=True)
class Size:
    """Amount of training and measuring: rows, optimizer steps, seconds per rate, batch sizes, the layers of the language
    model, 0: all, and the shape of the new translator."""

    rows: int
    steps: int
    seconds: float
    batches: tuple[int, ...] = (1, 32, 256)
    layers: int = 0
    translator: str = "marian-small"


SIZES: Mapping[str, Size] = {
    "cuda": Size(1024, 20, 1.5),
    "cpu": Size(256, 6, 1.0, (1, 32), layers=2),
    "quick": Size(96, 1, 0.02, (1, 4), translator="marian-tiny"),
}
"""Sizes by device; tests use "quick"."""


@dataclass
class Step:
    """A running step: its inputs, and its result, which is written at each change."""

    device: str
    payload: Path
    work: Path
    path: Path
    size: Size
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the mixed precisions to train in on the GPU; without a GPU there are none."""
        return ("bf16", "fp16") if self.device == "cuda" else ()

    def tell(self, **found: Any) -> None:
        self.found.update(found)
        self.path.write_text(json.dumps(self.found, indent=1), encoding="utf-8")

    def texts(self, count: int) -> list[str]:
        return [row[0] for row in self.tweets(count)]

    def tweets(self, count: int) -> list[tuple[str, str]]:
        """Return (text, label) of real tweets, always the same ones."""
        with next((self.payload / "tweets").glob("*.csv")).open(encoding="latin-1", newline="") as file:
            rows = list(csv.DictReader(file))
        return [(row["text"], row["sentiment"]) for row in rows[:: max(1, len(rows) // count)][:count]]

    def questions(self, count: int) -> list[dict[str, Any]]:
        """Return questions on tweets: which words follow two others. No package registry has a question data set."""
        texts = [" ".join(text.split()) for text in self.texts(count + _CONTEXT_TWEETS)]
        rows = []
        for i in range(count):
            context = " ".join(texts[i : i + _CONTEXT_TWEETS])
            words = context.split()
            first = i % max(1, len(words) - 3)
            start = len(" ".join([*words[: first + 2], ""]))
            answer = " ".join(words[first + 2 : first + 4])
            question = f"What follows {words[first]} {words[first + 1]}?"
            rows.append({"question": question, "context": context, "answer": answer, "answer_start": start})
        return rows

    def prepare(self) -> None:
        """Write the rows to train on."""
        if self.work.exists():
            return
        self.work.mkdir(parents=True)
        with (self.work / "tweets.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *self.tweets(self.size.rows)])
        lines = (json.dumps(row) + "\n" for row in self.questions(self.size.rows // 4))
        (self.work / "questions.jsonl").write_text("".join(lines), encoding="utf-8")

    def train(self, name: str, words: Sequence[object], precision: str = "no", *, hide_gpu: bool = True) -> Training:
        """Fine-tune, unless an earlier step did."""
        out = self.work / f"{name}-{precision}{'-cpu' * hide_gpu}"
        done, memory = out.with_suffix(".json"), out.with_suffix(".memory")
        if not done.exists():
            words = ("finetune", *words, "--mixed-precision", precision, "--output-dir", out)
            started = time.monotonic()
            metrics = deploykit(*words, hide_gpu=hide_gpu, memory=memory)["metrics"] or {}
            found = {"metrics": metrics, "seconds": time.monotonic() - started, "memory": int(memory.read_text())}
            done.write_text(json.dumps(found), encoding="utf-8")
        return Training(out, **json.loads(done.read_text(encoding="utf-8")))

    def exported(self, checkpoint: Path) -> Path:
        """Export, unless an earlier step did."""
        out = checkpoint.with_name(f"{checkpoint.name}-export")
        if not out.exists():
            deploykit("export", checkpoint, "--output-dir", out)
        return out

    def classifier(self, precision: str = "no", *, hide_gpu: bool = True) -> Training:
        words = (self.payload / "minilm", "--train", self.work / "tweets.csv", "--max-steps", self.size.steps,
                 "--per-device-train-batch-size", 32, "--max-length", WINDOW, "--learning-rate", 1e-4)  # fmt: skip
        return self.train("classifier", words, precision, hide_gpu=hide_gpu)

    def translator(self, precision: str = "no", *, hide_gpu: bool = True) -> Training:
        words = ("--task", "translation", "--from-config", self.size.translator, "--train", self.payload / "pairs.tsv",
                 "--source-lang", "en", "--target-lang", "fr", "--max-train-samples", self.size.rows, "--max-steps", self.size.steps,
                 "--held-out-rows", self.size.rows // 16, "--eval-rows", self.size.rows // 32)  # fmt: skip
        return self.train("translator", words, precision, hide_gpu=hide_gpu)

    def answerer(self, precision: str = "no", *, hide_gpu: bool = True) -> Training:
        words = (self.payload / "minilm", "--task", "question-answering", "--train", self.work / "questions.jsonl",
                 "--max-steps", self.size.steps, "--per-device-train-batch-size", 32, "--max-length", WINDOW, "--doc-stride", 16,
                 "--learning-rate", 1e-4)  # fmt: skip
        return self.train("answerer", words, precision, hide_gpu=hide_gpu)

    def language_model(self, precision: str = "no", *, hide_gpu: bool = True) -> Training:
        words = (self.work / "base", "--task", "text-generation", "--train", self.payload / "commands.jsonl",
                 "--max-steps", self.size.steps, "--batch-tokens", self.size.rows, "--validation-fraction", 0,
                 "--test-fraction", 0)  # fmt: skip
        return self.train("language-model", words, precision, hide_gpu=hide_gpu)


@dataclass(frozen=True)
class Training:
    """A fine-tuned checkpoint: its folder, metrics on held-out rows, seconds of the command, and peak memory in bytes."""

    folder: Path
    metrics: Mapping[str, Any]
    seconds: float
    memory: int

    def record(self) -> dict[str, Any]:
        shown = ("accuracy", "macro_f1", "bleu", "chrf", "exact_match", "f1")
        found: dict[str, Any] = {"seconds": round(self.seconds, 1), "peak memory MB": self.memory >> 20, **self._log()}
        found["metrics"] = {name: round(self.metrics[name], 4) for name in shown if name in self.metrics}
        history = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8")).get("history")
        if history is not None:
            found["tokens_per_second"] = round(median([step["tokens_per_second"] for step in history["steps"]]), 1)
        return found

    def _log(self) -> dict[str, float]:
        """Return the trainer's last log: training loss, samples per second."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logged: dict[str, float] = {}
        for folder in {path.parent for path in (self.folder / "tensorboard").rglob("events.out.*")}:
            events = EventAccumulator(str(folder))
            events.Reload()
            for tag in events.Tags()["scalars"]:
                if tag in ("train/train_loss", "train/train_samples_per_second", "train/loss"):
                    logged[tag.removeprefix("train/")] = round(events.Scalars(tag)[-1].value, 4)
        return logged


def deploykit(*words: object, hide_gpu: bool = False, memory: Path | None = None) -> dict[str, Any]:
    """Run a command and return its --json. Its peak memory in bytes goes to the file ``memory``."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    program = ["-m", "deploykit"] if memory is None else [str(Path(__file__).with_name("peak.py")), str(memory)]
    command = [sys.executable, *program, *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def timed(run: Callable[[], Any], seconds: float) -> list[float]:
    """Call ``run`` for ``seconds`` after two uncounted calls. Returns the duration of each call in seconds."""
    for _ in range(2):
        run()
    return list(_calls(run, seconds))


def _calls(run: Callable[[], Any], seconds: float) -> Iterator[float]:
    end = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        run()
        yield time.perf_counter() - begun


def percentile(percent: int, seconds: Sequence[float]) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


median = functools.partial(percentile, 50)
