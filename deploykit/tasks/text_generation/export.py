"""What the export of a language model is made of: its graph, its quantization, its quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.data.sample import evenly
from deploykit.errors import DataError, ExportError, UsageError
from deploykit.graphs.causal_architecture import CausalArchitecture, read_causal_architecture
from deploykit.graphs.causal_decoder import build_causal_decoder
from deploykit.graphs.causal_lm import Bits, build_causal_lm, parts_of
from deploykit.graphs.export_options import (
    CalibrationOptions,
    ExportOptions,
    Say,
    Written,
    graded,
    keep_samples,
    pick_rows,
)
from deploykit.graphs.gguf_file import GgufType, check_gguf, gguf_name, write_gguf
from deploykit.graphs.writer import save_with_weights_of
from deploykit.hardware import available_cpus
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.onnx_files import save_with_weights
from deploykit.quantization.search import Search, hold_limit
from deploykit.runtime.engines import LANGUAGE_MODEL_FILES
from deploykit.runtime.engines.onnxruntime import open_session, session_options
from deploykit.runtime.engines.protocol import Precision
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.checkpoint import TorchGenerator
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.evaluate import Asked, ask, columns_of
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.genai_config import write_genai_config
from deploykit.tasks.text_generation.generator import LocalGenerator, RowScore
from deploykit.tasks.text_generation.metrics import scored_metrics
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.rows import Row, load_rows, role_problem

_MEASURED_ROWS = 100  # each is scored by PyTorch, and by every form of the model
_PARITY_ROWS = 16
_PARITY_TOKENS = 32
_SEARCH_ROWS = 16
_LOGIT_DIFFERENCE = 1e-3
"""Of logits, relative to the largest."""
_TIE = 1e-4
"""Where the two likeliest tokens are closer than that, relative to the largest logit, rounding may choose either."""
_ENGINE = "onnxruntime"


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs of a language model and what serving them needs to ``directory``. INT8 needs no calibration."""
    if options.smooth_quant is not None or options.trt is not None or saved is not None:
        option = "--smooth-quant" if options.smooth_quant is not None else "--trt" if options.trt else "--calib"
        raise UsageError(f"{option} is not for language models, and {checkpoint} is one", "leave it out")
    reference = TorchGenerator.load(checkpoint)
    if options.gguf:
        check_gguf(reference.torch_model.config, str(checkpoint))
    task = _facts_of_run(checkpoint, reference)
    rows = evenly(_rows(checkpoint, task, options), options.measure_rows or _MEASURED_ROWS)
    asked, _ = ask(reference.tokenizer, rows, task.max_length)
    if not asked.rows:
        raise DataError("no row to measure on fits the model's context", "give other rows with --data")
    keep_samples(directory, asked.rows)
    say("writing the graph")
    architecture = read_causal_architecture(reference.torch_model)
    _save(architecture, None, (), directory, "fp32")
    _save_tokenizer(reference, directory)
    write_genai_config(
        directory, architecture, reference.torch_model.config, task, _standard_graph(directory, "fp32").name
    )
    parity = _check_parity(directory, reference, task, asked, say)
    metrics: dict[str, Any] = {"rows": len(asked.rows), "parity": dataclasses.asdict(parity)}
    say(f"measuring on {len(asked.rows):,} rows")
    grader = _Grader(directory, task, reference.tokenizer, asked.encoded)
    grader.enter("fp32", "pytorch", list(_scored(reference, asked.encoded)))
    grader.grade("fp32")
    wanted: list[tuple[Precision, Bits, bool]] = [("int8", 8, options.int8), ("int4", 4, options.int4)]
    for precision, bits, asked_for in wanted:
        if asked_for:
            record, search = _quantize(architecture, precision, bits, directory, options, grader, trace, say)
            found = metrics.setdefault("quantization", {"search": {}})
            found[precision] = record
            if search is not None:
                found["search"][f"{_ENGINE} {precision}"] = dataclasses.asdict(search)
    for kind in options.gguf:
        _write_gguf(reference, directory, kind, options, grader, say)  # type: ignore[arg-type]
    return graded(task, metrics, grader, say)


def _write_gguf(
    reference: TorchGenerator, directory: Path, kind: GgufType, options: ExportOptions, grader: _Grader, say: Say
) -> None:
    """Write a GGUF file, and measure it as transformers reads it, which is not by the code that wrote it."""
    path = directory / gguf_name(kind)
    say(f"writing {path.name}, and reading it back")
    write_gguf(reference.torch_model, reference.hf_tokenizer, reference.task.eos_token_ids, kind, path)
    again = reopened_gguf(path, reference.torch_model)
    for row in grader.rows[:_PARITY_ROWS]:
        text = reference.hf_tokenizer.decode(row.ids, skip_special_tokens=False)
        ids = [
            tokenizer.encode(text, add_special_tokens=False)
            for tokenizer in (again.hf_tokenizer, reference.hf_tokenizer)
        ]
        if ids[0] != ids[1]:
            raise ExportError(
                f"{path.name}: its tokenizer cuts {text!r} differently from the checkpoint's", "report it"
            )
    line = grader.enter(kind, "gguf", list(_scored(again, grader.rows, reference)))
    grader.refuse_loss(line, f"GGUF {kind}", options.max_drop, "leave this --gguf out")


def reopened_gguf(path: Path, model: Any) -> TorchGenerator:
    """Open the GGUF file that was written of ``model``, with the numbers that it holds."""
    return TorchGenerator.load(path, model.model.rotary_emb)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> TextGeneration:
    """Refuse: INT8 of a language model rounds activations by ranges that are found as they come."""
    raise UsageError("a language model needs no calibration", "use deploykit export --int8")


def calibration_texts(source: Path, task: TextGeneration, options: CalibrationOptions) -> list[str]:
    """Return none; see ``write_fp32``."""
    return []


def _facts_of_run(checkpoint: Path, reference: TorchGenerator) -> TextGeneration:
    """The facts of the checkpoint; those of a run of deploykit's know the columns of its rows as well."""
    from deploykit.artifacts import MANIFEST, load_manifest

    if not (checkpoint / MANIFEST).is_file():
        return reference.task
    facts = load_manifest(checkpoint, "checkpoint", verify=False).task
    assert isinstance(facts, TextGeneration)
    return dataclasses.replace(reference.task, columns=facts.columns)


def _rows(checkpoint: Path, task: TextGeneration, options: ExportOptions) -> list[Row]:
    def read_file(path: str, split: str) -> list[Row]:
        raw, _ = load_rows(path, prefer=columns_of(task), reading=options, split=split)
        return [r.row for r in raw if r.problem is None and (r.row.text or role_problem(r.row.messages) is None)]

    rows = pick_rows(checkpoint, options.data, "test", Row, read_file)
    if not rows:
        raise DataError(f"{options.data}: has no usable rows", "give rows with a prompt and an answer")
    return rows


def _save(
    architecture: CausalArchitecture, bits: Bits | None, kept: Collection[str], directory: Path, precision: Precision
) -> None:
    """Write the graph in optimum's layout, and the one that deploykit decodes with, which shares its weights."""
    standard = _standard_graph(directory, precision)
    save_with_weights(build_causal_lm(architecture, bits, kept=kept), standard)
    decoder = build_causal_decoder(architecture, bits, kept=kept)
    save_with_weights_of(decoder, directory / LANGUAGE_MODEL_FILES[precision][0], standard)


def _standard_graph(directory: Path, precision: Precision) -> Path:
    """The graph that optimum and onnxruntime-genai open."""
    return directory / LANGUAGE_MODEL_FILES[precision][1].removesuffix("_data")


def _save_tokenizer(reference: TorchGenerator, directory: Path) -> None:
    """What transformers and optimum open the export with, and what deploykit does."""
    reference.hf_tokenizer.save_pretrained(directory)
    reference.torch_model.config.save_pretrained(directory)
    reference.torch_model.generation_config.save_pretrained(directory)


@dataclass(frozen=True)
class Parity:
    """How the fp32 graph compares with PyTorch: the largest difference of logits, relative to the largest logit, over
    ``rows`` rows; and of ``tokens`` greedily generated ones, how many are ``equal``, those after a tie left out."""

    rows: int
    difference: float
    tokens: int
    equal: int
    ties: int


def _check_parity(directory: Path, reference: TorchGenerator, task: TextGeneration, asked: Asked, say: Say) -> Parity:
    """Raises ExportError when graph or tokenizer differ from the checkpoint's."""
    some = asked.some(_PARITY_ROWS)
    tokenizer = ChatTokenizer.load(directory, task.special_tokens, task.eos_token_ids)
    for row, encoded in zip(some.rows, some.encoded):
        if tokenizer.encode_row(row).ids.tolist() != encoded.ids.tolist() or not _as_transformers(
            reference, row, encoded
        ):
            raise ExportError(
                f"{row.origin}: the tokenizer cuts this row differently from the checkpoint's", "report it"
            )
    graph = load_generator(directory, task, LANGUAGE_MODEL_FILES["fp32"][0], available_cpus())
    standard = _StandardGraph(_standard_graph(directory, "fp32"))
    difference = 0.0
    logits = zip(some.encoded, reference.supervised_logits(some.encoded), graph.supervised_logits(some.encoded))
    for ids, theirs, ours in logits:
        for found in (ours, standard.supervised_logits(ids)):
            difference = max(difference, float(np.abs(theirs - found).max() / np.abs(theirs).max()))
    prompts = some.prompts or [row.ids[: max(1, len(row.ids) // 2)].tolist() for row in some.encoded]
    tokens, equal, ties = _greedy_parity(reference, graph, prompts)
    parity = Parity(len(some.rows), difference, tokens, equal, ties)
    say(
        f"parity with PyTorch: logits differ by at most {difference:.1e} of the largest; {equal:,} of {tokens:,} greedy "
        f"tokens equal ({ties} answers part at a tie)"
    )
    if not difference <= _LOGIT_DIFFERENCE or equal < tokens:
        raise ExportError(
            f"the graph differs from PyTorch: logits by {difference:.1e} of the largest, {tokens - equal} of {tokens} tokens",
            "this architecture is not exported right: report the checkpoint",
        )
    return parity


class _StandardGraph:
    """The graph in optimum's layout, to be compared."""

    def __init__(self, path: Path) -> None:
        self._session = open_session(path, session_options(available_cpus()))
        self._caches = {i.name: i.shape for i in self._session.get_inputs() if i.name.startswith("past_key_values.")}

    def supervised_logits(self, row: EncodedRow) -> NDArray[np.float32]:
        """Return the logits that predict a row's supervised tokens. The row is read in two parts: the second needs the
        caches of the first."""
        cache = {n: np.zeros((1, heads, 0, size), np.float32) for n, (_, heads, _, size) in self._caches.items()}
        found = []
        for part in np.array_split(np.arange(len(row.ids)), 2):
            if len(part):
                inputs = {
                    "input_ids": row.ids[None, part],
                    "attention_mask": np.ones((1, part[-1] + 1), np.int64),
                    "position_ids": part[None].astype(np.int64),
                }
                logits, *presents = self._session.run(None, {**inputs, **cache})
                cache = dict(zip(self._caches, presents))
                found.append(logits[0])
        supervised: NDArray[np.float32] = np.concatenate(found)[:-1][row.supervised[1:]]
        return supervised


def _as_transformers(reference: TorchGenerator, row: Row, encoded: EncodedRow) -> bool:
    """Whether transformers renders and encodes a dialog to the same ids."""
    if row.text is not None:
        return True
    ids = reference.hf_tokenizer.apply_chat_template(
        [dict(m) for m in row.messages], tools=None if row.tools is None else [dict(t) for t in row.tools],
        tokenize=True, return_dict=False,
    )  # fmt: skip
    return bool(list(ids) == encoded.ids.tolist())


def _greedy_parity(
    reference: LocalGenerator, graph: LocalGenerator, prompts: Sequence[list[int]]
) -> tuple[int, int, int]:
    """Tokens that both generate up to the first tie, how many of them are equal, and answers that part at a tie."""
    sampling = Sampling(max_new_tokens=_PARITY_TOKENS)
    short = [prompt[: reference.task.max_length - 1] for prompt in prompts]
    answers = zip(short, reference.generate(short, sampling), graph.generate(short, sampling))
    tokens = equal = ties = 0
    for prompt, [theirs], [ours] in answers:
        same = next((i for i, (a, b) in enumerate(zip(theirs.ids, ours.ids)) if a != b), None)
        tokens += len(theirs.ids) if same is None else same
        equal += len(theirs.ids) if same is None else same
        if same is not None:
            row = np.array([*prompt, *theirs.ids[: same + 1]], np.int64)
            last = np.zeros(len(row), bool)
            last[-1] = True
            [logits] = reference.supervised_logits([EncodedRow(row, last)])
            best = np.sort(logits[0])[-2:]
            tie = best[1] - best[0] <= _TIE * np.abs(logits).max()
            ties += int(tie)
            tokens += int(not tie)
    return tokens, equal, ties


@dataclass(frozen=True)
class _Scored(RowScore):
    """``tokens`` int64 [supervised]: the likeliest token at each place; ``divergence`` float64 [supervised]: the
    Kullback-Leibler divergence of the next token's distribution from that of fp32, in nats."""

    tokens: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    divergence: NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.empty(0))


def _scored(
    generator: LocalGenerator, rows: Sequence[EncodedRow], reference: LocalGenerator | None = None
) -> Iterator[_Scored]:
    expected = iter(()) if reference is None else reference.supervised_logits(rows)
    for row, logits in zip(rows, generator.supervised_logits(rows)):
        targets = row.ids[1:][row.supervised[1:]]
        log = _log_softmax(logits)
        best = logits.argmax(1)
        divergence = np.zeros(0)
        if reference is not None:
            right = _log_softmax(next(expected))
            divergence = (np.exp(right) * (right - log)).sum(1)
        yield _Scored(log[np.arange(len(targets)), targets].astype(np.float32), best == targets, best, divergence)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = (logits - logits.max(-1, keepdims=True)).astype(np.float64)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


class _Grader(Grader[list[_Scored]]):
    """Scores of right answers, token by token; ``agreement`` is of the likeliest tokens."""

    figures = ("loss", "perplexity", "token_accuracy")
    limited = ("loss",)

    def __init__(
        self, directory: Path, task: TextGeneration, tokenizer: ChatTokenizer, rows: Sequence[EncodedRow]
    ) -> None:
        super().__init__()
        self._directory, self._task, self.rows = directory, task, rows
        self._texts = [tokenizer.decode(row.ids[row.supervised].tolist()) for row in rows]

    def measure(self, raw: list[_Scored]) -> dict[str, Any]:
        metrics = scored_metrics(raw, self._texts)
        divergence = np.concatenate([row.divergence for row in raw])
        if len(divergence):
            metrics["kl_mean"], metrics["kl_p99"] = float(divergence.mean()), float(np.percentile(divergence, 99))
        return metrics

    def answers(self, raw: list[_Scored]) -> list[str]:
        return [str(token) for row in raw for token in row.tokens]

    def grade(self, precision: Precision) -> Line:
        reference = None if precision == "fp32" else self._load("fp32")
        raw = list(_scored(self._load(precision), self.rows, reference))
        return self.enter(precision, _ENGINE, raw, _kernels(self._directory / LANGUAGE_MODEL_FILES[precision][0]))

    def sample(self, precision: Precision) -> NDArray[np.float32]:
        """Log-probabilities of the right tokens of some rows, float32 [tokens]."""
        rows = evenly(self.rows, _SEARCH_ROWS)
        return np.concatenate([score.logprobs for score in self._load(precision).score(rows)])

    def _load(self, precision: Precision) -> LocalGenerator:
        return load_generator(self._directory, self._task, LANGUAGE_MODEL_FILES[precision][0], available_cpus())


def _kernels(graph: Path) -> int:
    """The linear layers of a graph that are quantized: ONNX Runtime has one kernel for them, and runs each in it."""
    return sum(node.op_type == "MatMulNBits" for node in onnx.load(graph, load_external_data=False).graph.node)


def _quantize(
    architecture: CausalArchitecture, precision: Precision, bits: Bits, directory: Path, options: ExportOptions,
    grader: _Grader, trace: MeasurementLog, say: Say,
) -> tuple[dict[str, Any], Search | None]:  # fmt: skip
    """Write a quantized graph; where it loses too much, with the most sensitive parts of the model left in fp32.

    Returns what the manifest says of it.
    """
    name = precision.upper()
    parts = parts_of(architecture)

    def save(kept: Collection[str]) -> None:
        _save(architecture, bits, kept, directory, precision)

    def write(kept: Collection[str]) -> Line:
        save(kept)
        return grader.grade(precision)

    def sample(part: str | None) -> NDArray[np.float32]:
        if part is None:
            return grader.sample("fp32")
        save({*parts} - {part})
        return grader.sample(precision)

    search = hold_limit(name, parts, write, sample, grader, options.max_drop, trace, say, "a larger --max-drop")
    line = grader.metrics[f"{_ENGINE}-{precision}"]
    ratio = line["perplexity"] / grader.metrics[f"{_ENGINE}-fp32"]["perplexity"]
    say(
        f"{name}: perplexity x {ratio:.4f}, KL divergence of the next token {line['kl_mean']:.4f} on average and "
        f"{line['kl_p99']:.4f} at the 99th percentile"
    )
    layers = _kernels(directory / LANGUAGE_MODEL_FILES[precision][0])
    return {
        "linear_layers": layers, "perplexity_ratio": ratio, "kl_mean": line["kl_mean"], "kl_p99": line["kl_p99"]
    }, search  # fmt: skip
