"""Contenders for translation: Hugging Face's generate, CTranslate2 and deploykit, with the same weights.

Each is a ``Translator``, so that all split, tokenize and join texts in the same way and only decoding differs. Hugging
Face uses its own tokenizer if there is one.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contender import Contender

from deploykit.runtime.decoding import Decoder, Seconds, Sentence, longest_first
from deploykit.runtime.engines import ENGINES, load_decode_model
from deploykit.runtime.engines.protocol import Precision
from deploykit.runtime.generation import Generation
from deploykit.runtime.search import Finished
from deploykit.tasks.opening import Predictor
from deploykit.tasks.registry import task_from_json, task_to_json
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import TextTranslator, Tokenizer, Translator
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer

HUGGING_FACE, CTRANSLATE2, DEPLOYKIT = "Hugging Face", "CTranslate2", "deploykit"
_VOCABULARY = "vocab.json"
_TOKENS_OF_A_BATCH = 1024


@dataclass(frozen=True)
class Subject:
    """A model in every form: a checkpoint, its export, and the folder of its CTranslate2 conversions.

    Without ``tokenizer`` its texts are token ids as decimal numbers.
    """

    checkpoint: Path
    export: Path
    converted: Path
    task: Translation
    tokenizer: bool


CONTENDERS = (
    Contender(HUGGING_FACE, "fp32"),
    Contender(CTRANSLATE2, "float32"),
    Contender(CTRANSLATE2, "int8"),
    Contender(DEPLOYKIT, "onnxruntime fp32"),
    Contender(DEPLOYKIT, "onnxruntime int8"),
    Contender(DEPLOYKIT, "native int8"),
)
OURS = CONTENDERS[3]
"""The contender that the others' answers are compared with; its answers are PyTorch's."""
_PACKAGES = {HUGGING_FACE: "transformers", CTRANSLATE2: "ctranslate2"}


def missing(contender: Contender) -> str | None:
    """Return why a contender cannot run here, or None."""
    if contender.engine == DEPLOYKIT:
        engine, _ = ours(contender)
        return None if ENGINES[engine].lacks is None else f"{engine}: {ENGINES[engine].lacks}"
    package = _PACKAGES[contender.engine]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install 'deploykit[finetune,cpu,peers]'"
    return None


def open_contender(contender: Contender, subject: Subject, threads: int) -> TextTranslator:
    """Load a contender on ``threads`` threads."""
    task = subject.task
    if contender.engine == HUGGING_FACE:
        return _hugging_face(subject, threads)
    if contender.engine == CTRANSLATE2:
        peer = CTranslate2(subject.converted / contender.precision, contender.precision, task, threads)
        return Translator(task, tokenizer_of(subject), peer)
    model = load_decode_model(ours(contender)[0], subject.export, _files(contender), threads)
    return Translator(task, tokenizer_of(subject), Decoder(model, task, workers=threads))


def size_mb(contender: Contender, subject: Subject) -> float:
    """Return the size of its weights and graphs on disk, in 1e6 bytes."""
    if contender.engine == HUGGING_FACE:
        files = list(subject.checkpoint.glob("*.safetensors"))
    elif contender.engine == CTRANSLATE2:
        files = [subject.converted / contender.precision / "model.bin"]
    else:
        files = [subject.export / file for file in _files(contender)]
    return sum(file.stat().st_size for file in files) / 1e6


def ours(contender: Contender) -> tuple[str, Precision]:
    """Return engine and precision of one of deploykit's contenders."""
    engine, precision = contender.precision.split()
    return engine, "int8" if precision == "int8" else "fp32"


def _files(contender: Contender) -> tuple[str, ...]:
    engine, precision = ours(contender)
    return ENGINES[engine].translators[precision]


class Numbers:
    """A tokenizer for a model without one: token ids as decimal numbers."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(number) for number in text.split()] for text in texts]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


@dataclass(frozen=True)
class Batching:
    """Options of CTranslate2: number of ``workers`` that share the threads, and two options of ``translate_batch``."""

    workers: int
    max_batch_size: int
    batch_type: str = "examples"

    def __str__(self) -> str:
        size = f"{self.max_batch_size} {self.batch_type}" if self.max_batch_size else "unlimited"
        return f"inter_threads={self.workers}, max_batch_size {size}"


class CTranslate2:
    """CTranslate2 as a ``Runner``. ``best`` has the fastest options by (beam size, sentences), found by ``tune``."""

    def __init__(self, folder: Path, precision: str, task: Translation, threads: int) -> None:
        self.seconds = Seconds()
        self.name = f"{CTRANSLATE2} {precision}"
        self.best: dict[tuple[int, int], Batching] = {}
        self._folder, self._precision, self._task, self._threads = folder, precision, task, threads
        self._tokens: list[str] = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._by_workers: dict[int, Any] = {}
        self._with(1)

    def run(self, sentences: Iterable[Sentence], finish: Callable[[Sentence], None]) -> None:
        with self.seconds.counting("tokenizing"):
            sentences = longest_first(sentences)
        if sentences:
            beams = sentences[0].generation.beam_size
            self._run(sentences, self.best.get((beams, len(sentences)), Batching(1, 32)))
        with self.seconds.counting("detokenizing"):
            for sentence in sentences:
                finish(sentence)

    def tune(self, batches: Sequence[Sequence[Sentence]]) -> Batching:
        """Time all options on ``batches`` of one size, and keep the fastest."""
        n, beams = len(batches[0]), batches[0][0].generation.beam_size
        seconds: dict[Batching, float] = {}
        for batching in self._ways(n):
            self._run(batches[0], batching)  # a worker's first call is slow
            started = time.perf_counter()
            for batch in batches:
                self._run(batch, batching)
            seconds[batching] = time.perf_counter() - started
        self.best[beams, n] = min(seconds, key=lambda batching: seconds[batching])
        return self.best[beams, n]

    def _ways(self, n: int) -> list[Batching]:
        ways = []
        for workers in sorted({1, self._threads}):
            sizes = {
                0,
                *(size for size in (16, 32) if size < n),
                *([math.ceil(n / workers)] if workers > 1 < n else []),
            }
            ways += [Batching(workers, size) for size in sorted(sizes)]
            ways += [Batching(workers, _TOKENS_OF_A_BATCH, "tokens")] if n > 16 else []
        return ways

    def _run(self, sentences: Sequence[Sentence], batching: Batching) -> None:
        generation = sentences[0].generation
        start = self._tokens[self._task.decoder_start_token_id]
        results = self._with(batching.workers).translate_batch(
            [[self._tokens[token] for token in sentence.token_ids] for sentence in sentences],
            max_batch_size=batching.max_batch_size,
            batch_type=batching.batch_type,
            beam_size=generation.beam_size,
            length_penalty=generation.length_penalty,
            min_decoding_length=max(0, generation.min_length - 1),
            max_decoding_length=generation.max_length - 1,
            no_repeat_ngram_size=generation.no_repeat_ngram_size,
            repetition_penalty=generation.repetition_penalty,
            suppress_sequences=[[start]] if (self._folder / "keeps_pad").exists() else None,
            max_input_length=0,
            return_end_token=True,
        )
        for sentence, result in zip(sentences, results):
            ids = [self._ids[token] for token in result.hypotheses[0]] or list(self._task.eos_token_ids[:1])
            sentence.result = Finished(np.array(ids, np.int64), 0.0)

    def _with(self, workers: int) -> Any:
        if workers not in self._by_workers:
            import ctranslate2

            self._by_workers[workers] = ctranslate2.Translator(
                str(self._folder),
                device="cpu",
                compute_type=self._precision,
                inter_threads=workers,
                intra_threads=max(1, self._threads // workers),
            )
        return self._by_workers[workers]


def convert(model: Any, subject: Subject) -> None:
    """Write ``model``, a MarianMT of transformers, in CTranslate2's format, in float32 and int8.

    It uses CTranslate2's loader of the architecture. The vocabulary is written by hand, because the converter's
    tokenizer loading lags behind transformers. Raises ValueError if the format cannot represent the model.
    """
    from ctranslate2.converters.transformers import BartLoader, MarianMTLoader

    class KeepingPad(MarianMTLoader):  # type: ignore[misc]
        """A loader that keeps a non-zero padding embedding, from which a decoder trained with tied embeddings
        starts."""

        def set_decoder(self, spec: Any, decoder: Any) -> None:
            BartLoader.set_decoder(self, spec, decoder)

        def _remove_pad_weights(self, spec: Any) -> None:
            pass

    task = subject.task
    pad = task.pad_token_id
    if task.family != "marian" or pad != task.vocabulary - 1 or task.decoder_start_token_id != pad:
        raise ValueError("is no MarianMT with padding last, which its loader takes for granted")
    keeps_pad = bool(model.get_input_embeddings().weight[pad].any())
    tokens = _vocabulary(subject)
    for precision in ("float32", "int8"):
        loader = KeepingPad() if keeps_pad else MarianMTLoader()
        spec = loader.get_model_spec(model)
        theirs = tokens if keeps_pad else tokens[:-1]
        spec.register_source_vocabulary(theirs)
        spec.register_target_vocabulary(theirs)
        eos = tokens[task.eos_token_ids[0]]
        spec.config.eos_token = spec.config.bos_token = eos
        spec.config.unk_token = "<unk>"
        spec.config.decoder_start_token = tokens[pad] if keeps_pad else eos
        spec.validate()
        spec.optimize(quantization=None if precision == "float32" else precision)
        folder = subject.converted / precision
        folder.mkdir(parents=True)
        spec.save(str(folder))
        (folder / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
        if keeps_pad:
            (folder / "keeps_pad").touch()


def _vocabulary(subject: Subject) -> list[str]:
    """Return a token for each id: the checkpoint's own where it has any."""
    task = subject.task
    tokens = [f"token{i}" for i in range(task.vocabulary)]
    if (subject.checkpoint / _VOCABULARY).exists():
        own = json.loads((subject.checkpoint / _VOCABULARY).read_text(encoding="utf-8"))
        for token, i in own.items():
            tokens[i] = token
    else:
        tokens[1], tokens[task.eos_token_ids[0]] = "<unk>", "</s>"
    return tokens


def _hugging_face(subject: Subject, threads: int) -> TextTranslator:
    import torch

    from deploykit.tasks.translation.checkpoint import TorchTranslator

    torch.set_num_threads(threads)
    if subject.tokenizer:
        translator = TorchTranslator.load(subject.checkpoint)
        reference: TextTranslator = translator
    else:
        from transformers import MarianMTModel

        model = MarianMTModel.from_pretrained(subject.checkpoint).eval()
        translator = TorchTranslator(model, None, subject.task)
        reference = Translator(subject.task, Numbers(), translator)
    translator.model.set_attn_implementation("sdpa")  # the default, and faster; exports need "eager"
    return reference


def tokenizer_of(subject: Subject) -> Tokenizer:
    if not subject.tokenizer:
        return Numbers()
    return load_translation_tokenizer(subject.export, subject.task.source, subject.task.target)


def job_of(contender: Contender, subject: Subject, threads: int) -> dict[str, Any]:
    """Return the argument of ``open_job``, as plain JSON."""
    return {
        "engine": contender.engine,
        "precision": contender.precision,
        "folders": [str(subject.checkpoint), str(subject.export), str(subject.converted)],
        "task": task_to_json(subject.task),
        "tokenizer": subject.tokenizer,
        "threads": threads,
    }


def open_job(job: Mapping[str, Any]) -> tuple[Predictor, Generation | None]:
    """Open a contender in another process, with its task's search parameters."""
    task = task_from_json(job["task"])
    assert isinstance(task, Translation)
    checkpoint, export, converted = map(Path, job["folders"])
    subject = Subject(checkpoint, export, converted, task, job["tokenizer"])
    return open_contender(Contender(job["engine"], job["precision"]), subject, job["threads"]), None
