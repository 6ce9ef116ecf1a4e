"""The contenders of bench/answering.py, each in a separate process (``answering_worker.py``)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contender import Contender
from worker_process import WorkerProcess

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines import ENGINES
from deploykit.tasks.question_answering.calibration import sample_windows
from deploykit.tasks.question_answering.facts import QuestionAnswering
from deploykit.tasks.question_answering.rows import Example
from deploykit.tasks.question_answering.windows import PairTokenizer
from deploykit.training.rows import read_split

PYTHON = Path(os.environ.get("OPTIMUM_VENV", "/tmp/deploykit-optimum")) / "bin" / "python"
"""Python with transformers 4 (5 has no QuestionAnsweringPipeline), optimum-onnx and OpenVINO."""
TRANSFORMERS, OPTIMUM, OPENVINO = "transformers", "optimum ONNX Runtime", "OpenVINO"
CONTENDERS = (
    Contender(TRANSFORMERS, "fp32"),
    Contender(OPTIMUM, "fp32"),
    Contender(OPTIMUM, "dynamic int8"),
    Contender(OPENVINO, "int8 (NNCF)"),
    Contender("deploykit onnxruntime", "int8"),
    Contender("deploykit openvino", "int8"),
    Contender("deploykit native", "int8"),
)
_CALIBRATION_WINDOWS = 300

Answers = list[tuple[str, int, int]]


@dataclass(frozen=True)
class Subject:
    """A run, its export, and the folder of the peers' files."""

    run: Path
    export: Path
    made: Path

    @property
    def task(self) -> QuestionAnswering:
        task = load_manifest(self.export, "export").task
        assert isinstance(task, QuestionAnswering)
        return task


def missing(contender: Contender) -> str | None:
    """Return why a contender cannot run here, or None."""
    if contender.engine.startswith("deploykit"):
        return ENGINES[contender.engine.split()[1]].lacks
    if not PYTHON.is_file():
        return f"there is no {PYTHON}: `make optimum-peers` makes it"
    if contender.engine == OPENVINO:
        if importlib.util.find_spec("nncf") is None:
            return "nncf is not installed: pip install 'deploykit[peers]'"
        probe = [str(PYTHON), "-c", "from importlib.metadata import version; version('openvino')"]
        if subprocess.run(probe, capture_output=True, check=False).returncode:
            return f"openvino is not installed in {PYTHON.parents[1]}: {PYTHON.with_name('pip')} install openvino"
    return None


def job_of(contender: Contender, subject: Subject) -> dict[str, Any]:
    """Return the worker's job for a contender; create its files if they do not exist."""
    if contender.engine.startswith("deploykit"):
        _, runs = contender.engine.split()
        return {"engine": "deploykit", "runs": runs, "precision": contender.precision, "folder": str(subject.export)}
    if contender.engine == TRANSFORMERS:
        return {"engine": "transformers", "folder": str(subject.run), "tokenizer": str(subject.export)}
    if contender.engine == OPTIMUM:
        folder = subject.export if contender.precision == "fp32" else _dynamic_int8(subject)
        return {"engine": "optimum", "folder": str(folder), "file": "model.onnx", "tokenizer": str(subject.export)}
    return {"engine": "OpenVINO", "folder": str(subject.export), "file": str(_by_nncf(subject))}


class Peer(WorkerProcess):
    """A contender in a separate process."""

    def __init__(self, name: str, job: Mapping[str, Any], task: QuestionAnswering, threads: int) -> None:
        ours = str(job["engine"]).startswith("deploykit")
        sizes = {name: getattr(task, name) for name in ("max_length", "doc_stride", "max_answer_length")}
        super().__init__(
            name, sys.executable if ours else str(PYTHON), "answering_worker.py", threads,
            {"threads": threads, "tokenizer": job["folder"], **sizes, **job},
        )  # fmt: skip
        self.open_s: float = self.opened["open_s"]

    def answer(self, calls: Sequence[Sequence[tuple[str, str]]]) -> tuple[list[float], Answers]:
        """Answer the pairs of each call; returns the seconds of the calls, and all answers in order."""
        told = self.ask({"calls": calls})
        return told["seconds"], [(text, start, end) for text, start, end in told["answers"]]


def _dynamic_int8(subject: Subject) -> Path:
    """Quantize as optimum's documentation shows for a CPU with AVX2: dynamically, per channel, in 7 bits."""
    folder = subject.made / "dynamic"
    if not (folder / "model.onnx").exists():
        from onnxruntime.quantization import quantize_dynamic

        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(subject.export / "config.json", folder)
        quantize_dynamic(subject.export / "model.onnx", folder / "model.onnx", per_channel=True, reduce_range=True)
    return folder


def _by_nncf(subject: Subject) -> Path:
    """Quantize as NNCF's documentation shows for a transformer: post-training, on windows of the training rows."""
    folder = subject.made / "nncf"
    if not folder.exists():
        import nncf
        import openvino as ov

        task = subject.task
        rows = read_split(subject.run, "train", Example)
        windows = sample_windows(
            PairTokenizer.load(subject.export / "tokenizer.json", task), [(row.question, row.context) for row in rows],
            _CALIBRATION_WINDOWS,
        )  # fmt: skip
        inputs = [
            {"input_ids": np.array([w.ids]), "attention_mask": np.ones((1, len(w.ids)), np.int64),
             **({"token_type_ids": np.array([w.types])} if task.token_types else {})} for w in windows
        ]  # fmt: skip
        model = ov.Core().read_model(subject.export / "model.onnx")
        quantized = nncf.quantize(model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER)
        folder.mkdir(parents=True)
        ov.save_model(quantized, folder / "model.xml")
    return folder / "model.xml"
