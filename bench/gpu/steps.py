"""The steps of the GPU check: ``python bench/gpu/steps.py STEP …``, called by run.py. Each writes a JSON result."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from step import SIZES, WINDOW, Step, Training, deploykit, median, percentile, timed

NEW_TOKENS = 32
"""Largest number of tokens of a translation or answer: a model trained for a few steps generates no end token."""
PROMPT_TOKENS = 128


def doctor(step: Step) -> None:
    step.tell(**deploykit("doctor"))


def tests(step: Step) -> None:
    """Run the tests that need a GPU; on a CPU they are skipped, and counted."""
    # Other test files import packages that the GPU machine lacks.
    files = [str(path) for path in Path("tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    printed = f"{done.stderr}\n{done.stdout}".strip().splitlines()
    step.tell(summary=printed[-1] if printed else f"pytest printed nothing and ended with {done.returncode}")
    if done.returncode:
        raise SystemExit(1)


def finetune(step: Step) -> None:
    """Train classifier and translator in each precision of the device, and in fp32 on the CPU."""
    train(step, "classifier", step.classifier, ("no", *step.precisions))
    train(step, "translator", step.translator, ("no", *step.precisions))


def train(step: Step, name: str, fit: Callable[..., Training], precisions: Sequence[str]) -> Path:
    """Train on the GPU, and at the same time in fp32 on the CPU, whose loss is the reference. Returns the CPU's
    checkpoint."""
    with ThreadPoolExecutor(1) as beside:
        reference = beside.submit(fit)
        if step.device == "cuda":
            for precision in precisions:
                label = f"{name} {'fp32' if precision == 'no' else precision} on cuda"
                step.tell(**{label: fit(precision, hide_gpu=False).record()})
        trained = reference.result()
    step.tell(**{f"{name} fp32 on cpu": trained.record()})
    return trained.folder


def classify(step: Step) -> None:
    """Compare ONNX Runtime with PyTorch on real texts: parity, texts/s by batch size, latency with one caller."""
    import numpy as np
    import torch

    from deploykit.runtime.engines import load_engine
    from deploykit.tasks.classification.checkpoint import TorchClassifier

    checkpoint = step.classifier().folder
    exported = step.exported(checkpoint)
    reference = TorchClassifier.load(checkpoint)
    texts = step.texts(256)
    ids = [row[:WINDOW] for row in reference.encode(texts).ids]
    engine = load_engine("cuda" if step.device == "cuda" else "onnxruntime", exported / "model.onnx")

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
                found["one caller, ms"] = {f"p{p}": round(1e3 * percentile(p, seconds), 3) for p in (50, 99)}
        step.tell(**{name: found})


def translate(step: Step) -> None:
    """Measure translation with PyTorch on the device; deploykit's translators run only on CPUs and TensorRT."""
    from deploykit.tasks.translation.checkpoint import TorchTranslator

    checkpoint = step.translator().folder
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
    step.tell(onnxruntime="not built: the engine cuda runs classifiers and question answering")


def answer(step: Step) -> None:
    """Fine-tune for question answering, and compare ONNX Runtime with PyTorch: spans, questions/s by batch size."""
    import torch

    from deploykit.tasks.opening import open_predictor
    from deploykit.tasks.question_answering.checkpoint import TorchAnswerer

    checkpoint = train(step, "answerer", step.answerer, step.precisions)
    exported = step.exported(checkpoint)
    pairs = [(row["question"], row["context"]) for row in step.questions(256)]

    def on_torch(dtype: torch.dtype) -> Any:
        answerer = TorchAnswerer.load(checkpoint)
        answerer.model.to(step.device, dtype)
        return answerer

    engine = "cuda" if step.device == "cuda" else "onnxruntime"
    makers: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: open_predictor(str(exported), url="", engine=engine, precision="fp32"),
        "torch eager fp32": lambda: on_torch(torch.float32),
    }
    if step.device == "cuda":
        makers["torch eager bf16"] = lambda: on_torch(torch.bfloat16)
    asked = pairs[: step.size.batches[-1]]
    expected = spans(TorchAnswerer.load(checkpoint), asked)
    for name, make in makers.items():
        answerer = make()
        found = spans(answerer, asked)
        rates = {}
        for rows in step.size.batches:
            seconds = timed(lambda rows=rows, ask=answerer.try_all: ask((pairs * rows)[:rows]), step.size.seconds)
            rates[str(rows)] = round(rows / median(seconds), 1)
        same = sum(ours == theirs for ours, theirs in zip(found, expected)) / len(expected)
        step.tell(**{name: {"same span as the CPU's": same, "questions per second": rates}})


def spans(answerer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[int, int]]:
    """Return the place of the best answer to each question."""
    return [(best.start, best.end) for best, *_ in (found.answers(None, 1) for found in answerer.find(pairs))]


def generate(step: Step) -> None:
    """Fine-tune a language model, and measure prefill and decode with PyTorch on the device."""
    import torch

    from deploykit.tasks.text_generation.checkpoint import load_base, load_base_tokenizer

    source = step.payload / "smollm2"
    source = next(source.glob("*.gguf"), source)
    base, tokenizer = load_base(str(source)), load_base_tokenizer(str(source))
    if step.size.layers:  # all of them take minutes on a CPU
        base.model.layers = base.model.layers[: step.size.layers]
        base.config.num_hidden_layers = step.size.layers
    base.save_pretrained(step.work / "base")
    tokenizer.save_pretrained(step.work / "base")
    checkpoint = train(step, "language model", step.language_model, step.precisions)
    text = (step.payload / "commands.jsonl").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text)["input_ids"], device=step.device)
    prompt = min(PROMPT_TOKENS, base.config.max_position_embeddings - NEW_TOKENS)
    expected: dict[int, Any] = {}
    for dtype in (torch.float32, torch.bfloat16)[: 2 if step.device == "cuda" else 1]:
        model = load_base(str(checkpoint)).to(step.device, dtype)
        for rows in step.size.batches:
            prompts = ids[: rows * prompt].reshape(rows, prompt)
            prefill, _ = generated(model, prompts, 1)
            whole, answers = generated(model, prompts, NEW_TOKENS)
            expected.setdefault(rows, answers)
            step.tell(**{f"torch eager {str(dtype).removeprefix('torch.')}, {rows} rows": {
                "prefill tokens per second": round(rows * prompt / prefill, 1),
                "decode tokens per second": round(rows * (NEW_TOKENS - 1) / max(whole - prefill, 1e-9), 1),
                "same tokens as fp32": float((answers == expected[rows]).float().mean()),
            }})  # fmt: skip
    step.tell(onnxruntime="not built: the engine cuda runs classifiers and question answering")


def generated(model: Any, prompts: Any, tokens: int) -> tuple[float, Any]:
    """Generate greedily, once to warm up and once measured. Returns seconds and the new tokens, [rows, tokens]."""
    import torch

    for _ in range(2):
        begun = time.perf_counter()
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )[:, prompts.shape[1] :].cpu()
        seconds = time.perf_counter() - begun
    return seconds, found


def export(step: Step) -> None:
    """Export on this machine, and again with the GPU hidden: the graphs must be equal."""
    checkpoint = step.classifier().folder
    again = step.work / "classifier-export-cpu"
    deploykit("export", checkpoint, "--output-dir", again, hide_gpu=True)
    here, cpu = (
        hashlib.sha256((f / "model.onnx").read_bytes()).hexdigest() for f in (step.exported(checkpoint), again)
    )
    step.tell(here=here, cpu=cpu, equal=here == cpu)
    if here != cpu:
        raise SystemExit("the GPU machine's graph is not the CPU's")


def tensorrt(step: Step) -> None:
    """Write and check the graphs of ``export --trt``, without building: PyPI has no builder for this GPU."""
    import onnx
    import torch

    from deploykit.graphs.onnx_export import export_half_classifier
    from deploykit.tasks.classification.checkpoint import TorchClassifier
    from deploykit.tensorrt.options import EngineOptions, profiles_of

    checkpoint = step.classifier().folder
    reference = TorchClassifier.load(checkpoint)
    graph = step.work / "half.onnx"
    export_half_classifier(reference.model, graph, torch.float16)
    onnx.checker.check_model(str(graph))
    profiles = profiles_of(EngineOptions(), reference.task.shape_limits)
    step.tell(graph_bytes=graph.stat().st_size, profiles=[str(profile) for profile in profiles], engine="not built: "
              "TensorRT's wheels on PyPI are placeholders, and TensorRT-RTX 1.7 does not target SM90")  # fmt: skip


ALL: Mapping[str, Callable[[Step], None]] = {
    function.__name__: function
    for function in (doctor, tests, finetune, classify, translate, answer, generate, export, tensorrt)
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
    step = Step(options.device, options.payload, options.work, options.result, size)
    step.prepare()
    ALL[options.step](step)


if __name__ == "__main__":
    main()
