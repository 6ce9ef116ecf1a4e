"""Contenders for classification: PyTorch, ONNX Runtime, OpenVINO and CTranslate2, each used as documented, and
deploykit.

All have the same weights and tokenizer. The peers get batches of up to 32 texts as they arrive, padded to the longest;
deploykit forms its own batches.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from deploykit.artifacts import load_manifest
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.generation import Generation
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks.classification.facts import Classification
from deploykit.tasks.classification.predictor import TextClassifier
from deploykit.tasks.opening import Predictor, open_classifier
from deploykit.text import normalize

BATCH = 32
CALIBRATION_ROWS = 300  # NNCF's default subset

Forward = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""Maps token ids and attention mask, int64 [rows, tokens], to logits, float32 [rows, labels]."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its export with --int8, and a folder for the peers' converted models."""

    checkpoint: Path
    export: Path
    made: Path

    @property
    def task(self) -> Classification:
        task = load_manifest(self.export, "export").task
        assert isinstance(task, Classification), f"{self.export} does not classify"
        return task


@dataclass(frozen=True)
class Contender:
    """``engine`` running the weights in ``precision``; ``package`` is the one it needs."""

    engine: str
    precision: str
    package: str
    gpu: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"

    @property
    def own(self) -> bool:
        return self.engine.startswith("deploykit")


CONTENDERS = (
    Contender("PyTorch", "fp32", "torch"),
    Contender("torch.compile", "fp32", "torch"),
    Contender("ONNX Runtime", "fp32", "onnxruntime"),
    Contender("ONNX Runtime", "dynamic int8", "onnxruntime"),
    Contender("OpenVINO", "fp32", "openvino"),
    Contender("OpenVINO", "bf16", "openvino"),
    Contender("OpenVINO", "int8 (NNCF)", "nncf"),
    Contender("CTranslate2", "int8", "ctranslate2"),
    Contender("deploykit onnxruntime", "fp32", "onnxruntime"),
    Contender("deploykit onnxruntime", "int8", "onnxruntime"),
    Contender("deploykit openvino", "int8", "openvino"),
    Contender("deploykit native", "int8", "numpy"),
    Contender("PyTorch CUDA", "fp16", "torch", gpu=True),
    Contender("ONNX Runtime CUDA", "fp32", "onnxruntime", gpu=True),
)


def missing(contender: Contender) -> str | None:
    """Return why a contender cannot run here, or None."""
    if importlib.util.find_spec(contender.package) is None:
        return f"{contender.package} is not installed: pip install 'deploykit[finetune,cpu,openvino,peers]'"
    if contender.own and (lacks := ENGINES[contender.engine.split()[1]].lacks):
        return f"{contender.engine}: {lacks}"
    if contender.engine == "torch.compile" and not shutil.which("g++"):
        return "torch.compile needs a C++ compiler: apt-get install g++"
    if contender.gpu and not shutil.which("nvidia-smi"):
        return "this machine has no NVIDIA GPU"
    return None


def prepare(contender: Contender, subject: Subject, calibration: Sequence[str]) -> None:
    """Convert or quantize the model for a peer, once. Raises ValueError if the peer cannot convert it."""
    if contender.own:
        if not _graph(contender, subject).is_file():
            raise ValueError(f"the export has no {_graph(contender, subject).name}")
    elif contender.precision == "dynamic int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(subject.export / "model.onnx", _made(contender, subject), weight_type=QuantType.QInt8)
    elif contender.package == "nncf":
        _quantize_by_nncf(subject, calibration, _made(contender, subject))
    elif contender.engine == "CTranslate2":
        _convert_to_ctranslate2(subject, _made(contender, subject))


def open_contender(contender: Contender, subject: Subject, threads: int) -> TextClassifier:
    """Load a prepared contender on ``threads`` threads."""
    if contender.own:
        engine = contender.engine.split()[1]
        return open_classifier(
            str(subject.export), url="", engine=engine, precision=contender.precision, threads=threads
        )
    forward = _FORWARDS[contender.engine](contender, subject, threads)
    return Plain(subject.task, Tokenizer.from_file(str(subject.export / "tokenizer.json")), forward)


def size_mb(contender: Contender, subject: Subject) -> float:
    """Return the size of its weights on disk, in 1e6 bytes."""
    made = _made(contender, subject)
    if contender.own:
        files = [_graph(contender, subject)]
    elif made.exists():
        files = [p for p in ([made] if made.is_file() else made.rglob("*")) if p.suffix in (".onnx", ".bin")]
    elif contender.package == "torch":
        files = list(subject.checkpoint.glob("*.safetensors"))
    else:
        files = [subject.export / "model.onnx"]
    return sum(file.stat().st_size for file in files) / 1e6


class Plain:
    """A classifier in plain use: batches of up to 32 texts as they arrive, padded to the longest of each."""

    def __init__(self, task: Classification, tokenizer: Tokenizer, forward: Forward) -> None:
        self.task = task
        self._forward = forward
        self._tokenizer = tokenizer
        tokenizer.enable_truncation(task.max_length)
        tokenizer.enable_padding(pad_id=task.pad_token_id)

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        logits = []
        for start in range(0, len(texts), BATCH):
            encodings = self._tokenizer.encode_batch([normalize(text) for text in texts[start : start + BATCH]])
            ids = np.array([encoding.ids for encoding in encodings], np.int64)
            mask = np.array([encoding.attention_mask for encoding in encodings], np.int64)
            logits.append(self._forward(ids, mask))
        return self.task.scores(np.concatenate(logits))

    def close(self) -> None:
        pass


def _torch(contender: Contender, subject: Subject, threads: int) -> Forward:
    import torch
    from transformers import AutoModelForSequenceClassification

    from deploykit.training.checkpoint import quiet

    quiet()
    torch.set_num_threads(threads)
    loaded = AutoModelForSequenceClassification.from_pretrained(subject.checkpoint).eval()
    device = "cuda" if contender.gpu else "cpu"
    loaded = loaded.half().to(device) if contender.gpu else loaded
    model = torch.compile(loaded, dynamic=True) if contender.engine == "torch.compile" else loaded

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            answer = model(input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device))
        logits: NDArray[np.float32] = answer.logits.float().cpu().numpy()
        return logits

    return forward


def _onnxruntime(contender: Contender, subject: Subject, threads: int) -> Forward:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = subject.export / "model.onnx" if contender.precision == "fp32" else _made(contender, subject)
    provider = "CUDAExecutionProvider" if contender.gpu else "CPUExecutionProvider"
    session = ort.InferenceSession(str(graph), options, providers=[provider])
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def _openvino(contender: Contender, subject: Subject, threads: int) -> Forward:
    import openvino as ov

    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    graph = subject.export / "model.onnx"
    if contender.package == "nncf":
        graph = _made(contender, subject) / "model.xml"
    else:
        properties["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16"}[contender.precision]
    compiled = ov.Core().compile_model(str(graph), "CPU", properties)
    return lambda ids, mask: np.array(compiled({"input_ids": ids, "attention_mask": mask})[0])


def _ctranslate2(contender: Contender, subject: Subject, threads: int) -> Forward:
    import ctranslate2

    folder = _made(contender, subject)
    encoder = ctranslate2.Encoder(str(folder), device="cpu", compute_type="int8", intra_threads=threads)
    head = np.load(folder / "head.npz")

    def forward(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        lengths = mask.sum(1)
        rows = [row[:length].tolist() for row, length in zip(ids, lengths)]  # it pads by itself
        pooled = np.array(encoder.forward_batch(rows).pooler_output)
        logits: NDArray[np.float32] = pooled @ head["weight"].T + head["bias"]
        return logits

    return forward


_FORWARDS: Mapping[str, Callable[[Contender, Subject, int], Forward]] = {
    "PyTorch": _torch,
    "torch.compile": _torch,
    "PyTorch CUDA": _torch,
    "ONNX Runtime": _onnxruntime,
    "ONNX Runtime CUDA": _onnxruntime,
    "OpenVINO": _openvino,
    "CTranslate2": _ctranslate2,
}


def _made(contender: Contender, subject: Subject) -> Path:
    """Return the path of the peer's converted model."""
    if contender.precision == "dynamic int8":
        return subject.made / "dynamic.onnx"
    return subject.made / ("nncf" if contender.package == "nncf" else contender.engine)


def _graph(contender: Contender, subject: Subject) -> Path:
    """Return the export's graph that our own engine runs."""
    return subject.export / ENGINES[contender.engine.split()[1]].graphs[contender.precision]


def _quantize_by_nncf(subject: Subject, texts: Sequence[str], out: Path) -> None:
    """Quantize as NNCF's documentation shows for a transformer: post-training, on batches as they arrive."""
    import nncf
    import openvino as ov

    tokenizer = TextTokenizer(subject.export / "tokenizer.json", subject.task.max_length)
    rows = [np.array([ids], np.int64) for ids in tokenizer.encode([(normalize(text),) for text in texts]).ids]
    inputs = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in rows]
    model = ov.Core().read_model(subject.export / "model.onnx")
    quantized = nncf.quantize(model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER)
    out.mkdir()
    ov.save_model(quantized, out / "model.xml")


def _convert_to_ctranslate2(subject: Subject, out: Path) -> None:
    """Convert with CTranslate2's BERT loader; the classifier's last layer, which it does not support, is stored beside
    it.
    """
    from ctranslate2.converters.transformers import BertLoader
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(subject.checkpoint).eval()
    if model.config.model_type != "bert":
        raise ValueError(f"it is of type {model.config.model_type}; only BERT's pooled output has the head's input")
    spec = BertLoader().get_model_spec(model.bert)
    tokens = [f"token{i}" for i in range(model.config.vocab_size)]
    spec.register_vocabulary(tokens)
    spec.config.unk_token = tokens[0]
    spec.validate()
    spec.optimize(quantization="int8")
    out.mkdir()
    spec.save(str(out))
    head = model.classifier
    np.savez(out / "head.npz", weight=head.weight.detach().numpy(), bias=head.bias.detach().numpy())


def job_of(contender: Contender, subject: Subject, threads: int) -> dict[str, Any]:
    """Return the argument of ``open_job``, as plain JSON."""
    return {
        "contender": CONTENDERS.index(contender),
        "folders": [str(subject.checkpoint), str(subject.export), str(subject.made)],
        "threads": threads,
    }


def open_job(job: Mapping[str, Any]) -> tuple[Predictor, Generation | None]:
    """Open the contender of a job, in another process."""
    subject = Subject(*map(Path, job["folders"]))
    return open_contender(CONTENDERS[job["contender"]], subject, job["threads"]), None
