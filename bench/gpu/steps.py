"""The steps of the GPU check: ``python bench/gpu/steps.py STEP …``, called by run.py. Each writes a JSON result."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEW_TOKENS = 32
"""Largest number of tokens of a translation: a model trained for a few steps generates no end token."""


@dataclass(frozen=True)
class Size:
    """Amount of training and measuring: rows, optimizer steps, seconds per rate, and batch sizes."""

    rows: int
    steps: int
    seconds: float
    batches: tuple[int, ...] = (1, 32, 256)


SIZES: Mapping[str, Size] = {"cuda": Size(1024, 20, 1.5), "cpu": Size(256, 6, 1.0), "quick": Size(96, 2, 0.05, (1, 8))}
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

    def checkpoint(self, name: str, *words: object, hide_gpu: bool) -> tuple[Path, dict[str, Any], float]:
        """Fine-tune unless an earlier step did. Returns the folder, the --json output and the duration in seconds."""
        out = self.work / name
        started = time.monotonic()
        record = deploykit("finetune", *words, "--output-dir", out, hide_gpu=hide_gpu)
        return out, record, time.monotonic() - started

    def classifier(self, precision: str, *, hide_gpu: bool = False) -> tuple[Path, dict[str, Any], float]:
        rows = self.work / "tweets.csv"
        if not rows.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            with rows.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *self.tweets(self.size.rows)])
        return self.checkpoint(
            f"classifier-{precision}{'-cpu' * hide_gpu}", self.payload / "minilm", "--train", rows, "--max-steps", self.size.steps,
            "--per-device-train-batch-size", 32, "--max-length", 64, "--learning-rate", 1e-4, "--mixed-precision", precision,
            hide_gpu=hide_gpu,
        )  # fmt: skip

    def translator(self, precision: str, *, hide_gpu: bool = False) -> tuple[Path, dict[str, Any], float]:
        return self.checkpoint(
            f"translator-{precision}{'-cpu' * hide_gpu}", "--task", "translation", "--from-config", "marian-small", "--train",
            self.payload / "pairs.tsv", "--source-lang", "en", "--target-lang", "fr", "--max-train-samples", self.size.rows, "--max-steps", self.size.steps,
            "--held-out-rows", self.size.rows // 16, "--eval-rows", self.size.rows // 32, "--mixed-precision", precision,
            hide_gpu=hide_gpu,
        )  # fmt: skip


def doctor(step: Step) -> None:
    step.tell(**deploykit("doctor"))


def tests(step: Step) -> None:
    """Run the tests that need a GPU; on a CPU they are skipped, and counted."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/unit"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    step.tell(summary=done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise SystemExit(1)


def finetune(step: Step) -> None:
    """Train both tasks in each precision of the device, and in fp32 on the CPU, whose loss is the reference."""
    runs = [("no", True), *(((p, False) for p in ("no", "bf16", "fp16")) if step.device == "cuda" else ())]
    for task, train in (("classifier", step.classifier), ("translator", step.translator)):
        for precision, hide_gpu in runs:
            out, record, seconds = train(precision, hide_gpu=hide_gpu)
            name = f"{task} {'fp32' if precision == 'no' else precision} on {'cpu' if hide_gpu else 'cuda'}"
            step.tell(**{name: {
                "seconds": round(seconds, 1), "metrics": headline(record["metrics"]), **training_log(out),
            }})  # fmt: skip


def classify(step: Step) -> None:
    """Compare ONNX Runtime with PyTorch on real texts: parity, texts/s by batch size, latency with one caller."""
    import numpy as np
    import torch

    from deploykit.runtime.engines import load_engine
    from deploykit.tasks.classification.checkpoint import TorchClassifier

    checkpoint, _, _ = step.classifier("no", hide_gpu=True)
    export_to = step.work / "classifier-export"
    deploykit("export", checkpoint, "--output-dir", export_to)
    reference = TorchClassifier.load(checkpoint)
    texts = step.texts(256)
    ids = [row[:64] for row in reference.encode(texts).ids]
    engine = load_engine("cuda" if step.device == "cuda" else "onnxruntime", export_to / "model.onnx")

    def padded(rows: Sequence[list[int]]) -> dict[str, Any]:
        width = max(map(len, rows))
        pad = reference.task.pad_token_id
        return {
            "input_ids": np.array([[*row, *[pad] * (width - len(row))] for row in rows]),
            "attention_mask": np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    def torch_runner(dtype: torch.dtype, *, compiled: bool = False) -> Callable[[Mapping[str, Any]], Any]:
        model: Any = TorchClassifier.load(checkpoint).model.to(step.device, dtype)
        if compiled:
            model = torch.compile(model, dynamic=True)

        def run(inputs: Mapping[str, Any]) -> Any:
            with torch.inference_mode():
                logits = model(**{name: torch.from_numpy(value).to(step.device) for name, value in inputs.items()})
            return logits.logits.float().cpu().numpy()

        return run

    runners: dict[str, Callable[[], Callable[[Mapping[str, Any]], Any]]] = {
        "onnxruntime": lambda: lambda inputs: engine.run(inputs)[0],
        "torch eager fp32": lambda: torch_runner(torch.float32),
        "torch eager bf16": lambda: torch_runner(torch.bfloat16),
        "torch.compile fp32": lambda: torch_runner(torch.float32, compiled=True),
    }
    batches = {rows: padded((ids * rows)[:rows]) for rows in step.size.batches}
    expected = torch_runner(torch.float32)(batches[step.size.batches[-1]])
    for name, make in runners.items():
        if step.device == "cpu" and ("compile" in name or "bf16" in name):
            continue  # a CPU here has no compiler set up, and may emulate bf16, which takes minutes
        run = make()
        got = run(batches[step.size.batches[-1]])
        found: dict[str, Any] = {
            "largest difference of a logit": float(np.abs(got - expected).max()),
            "same answer": float((got.argmax(1) == expected.argmax(1)).mean()),
            "texts per second": {},
        }
        for rows, inputs in batches.items():
            seconds = timed(lambda run=run, inputs=inputs: run(inputs), step.size.seconds)
            found["texts per second"][str(rows)] = round(rows / median(seconds), 1)
            if rows == 1:
                found["one caller, ms"] = {f"p{p}": round(1e3 * percentile(seconds, p), 3) for p in (50, 99)}
        step.tell(**{name: found})


def translate(step: Step) -> None:
    """Measure translation with PyTorch on the device; deploykit's translators run only on CPUs and TensorRT."""
    from deploykit.tasks.translation.checkpoint import TorchTranslator

    checkpoint, _, _ = step.translator("no", hide_gpu=True)
    translator = TorchTranslator.load(checkpoint)
    translator.model.to(step.device)
    lines = (step.payload / "pairs.tsv").read_text(encoding="utf-8").splitlines()[1:257]
    ids = translator.encode([line.split("\t")[0] for line in lines])
    generation = dataclasses.replace(translator.task.generation, max_length=NEW_TOKENS + 1)
    for rows in step.size.batches:
        part = (ids * rows)[:rows]
        begun = time.perf_counter()
        answers = translator.generate_ids(part, generation)
        seconds = time.perf_counter() - begun
        step.tell(**{f"torch generate, {rows} rows": {"tokens per second": round(sum(map(len, answers)) / seconds, 1)}})
    step.tell(onnxruntime="not built: the engine cuda runs classifiers alone")


def export(step: Step) -> None:
    """Export on this machine, and again with the GPU hidden: the graphs must be equal."""
    checkpoint, _, _ = step.classifier("no", hide_gpu=True)
    digests = []
    for name, hidden in (("here", False), ("cpu", True)):
        with tempfile.TemporaryDirectory() as folder:
            deploykit("export", checkpoint, "--output-dir", Path(folder) / "export", hide_gpu=hidden)
            files = json.loads((Path(folder) / "export" / "manifest.json").read_text())["files"]
        digests.append(files["model.onnx"]["sha256"])
        step.tell(**{name: digests[-1]})
    step.tell(equal=digests[0] == digests[1])
    if digests[0] != digests[1]:
        raise SystemExit("the GPU machine's graph is not the CPU's")


def tensorrt(step: Step) -> None:
    """Write and check the graphs of ``export --trt``, without building: PyPI has no builder for this GPU."""
    import onnx
    import torch

    from deploykit.graphs.onnx_export import export_half_classifier
    from deploykit.tasks.classification.checkpoint import TorchClassifier
    from deploykit.tensorrt.build import EngineOptions, plan

    checkpoint, _, _ = step.classifier("no", hide_gpu=True)
    reference = TorchClassifier.load(checkpoint)
    graph = step.work / "half.onnx"
    export_half_classifier(reference.model, graph, torch.float16)
    onnx.checker.check_model(str(graph))
    builder, profiles = plan(EngineOptions(), reference.task.shape_limits)
    step.tell(builder=builder, graph_bytes=graph.stat().st_size, profiles=[str(profile) for profile in profiles], engine="not built: "
              "TensorRT's wheels on PyPI are placeholders, and TensorRT-RTX 1.7 does not target SM90")  # fmt: skip


def deploykit(*words: object, hide_gpu: bool = False) -> dict[str, Any]:
    """Run a command and return its --json."""
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    command = [sys.executable, "-m", "deploykit", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout)
    return record


def training_log(checkpoint: Path) -> dict[str, float]:
    """Return the trainer's last log: training loss, samples per second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: dict[str, float] = {}
    for folder in {path.parent for path in (checkpoint / "tensorboard").rglob("events.out.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag in ("train/train_loss", "train/train_samples_per_second", "train/loss"):
                logged[tag.removeprefix("train/")] = round(events.Scalars(tag)[-1].value, 4)
    return logged


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(metrics[name], 4) for name in ("accuracy", "macro_f1", "bleu", "chrf") if name in metrics}


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


def median(seconds: Sequence[float]) -> float:
    return percentile(seconds, 50)


def percentile(seconds: Sequence[float], percent: int) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


ALL: Mapping[str, Callable[[Step], None]] = {
    function.__name__: function for function in (doctor, tests, finetune, classify, translate, export, tensorrt)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=list(ALL))
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--payload", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    size = SIZES["quick" if options.quick else options.device]
    ALL[options.step](Step(options.device, options.payload, options.work, options.result, size))


if __name__ == "__main__":
    main()
