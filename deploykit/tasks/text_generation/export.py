"""Export a language model: its graph, its quantization, its quality."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.data.sample import evenly
from deploykit.errors import DataError, ExportError, UsageError
from deploykit.graphs.causal_architecture import CausalArchitecture, read_causal_architecture
from deploykit.graphs.causal_lm import parts_of
from deploykit.graphs.export_options import (
    SPLITS,
    CalibrationOptions,
    ExportOptions,
    Say,
    Written,
    graded,
    keep_samples,
    pick_rows,
)
from deploykit.graphs.gguf_file import GgufType, check_gguf, gguf_name, write_gguf
from deploykit.hardware import available_cpus
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.compensated import Rounding
from deploykit.runtime.engines import LANGUAGE_MODEL_FILES
from deploykit.runtime.engines.onnxruntime import open_session, session_options
from deploykit.runtime.sampling import Sampling
from deploykit.tasks.text_generation.calibration import (
    StaticInt8,
    activations_of,
    calibrate_graph,
    input_factors,
    smoothed,
    static_int8,
)
from deploykit.tasks.text_generation.checkpoint import TorchGenerator
from deploykit.tasks.text_generation.encode import ChatTokenizer, EncodedRow
from deploykit.tasks.text_generation.evaluate import EvaluationRows, ask, columns_of
from deploykit.tasks.text_generation.facts import TextGeneration
from deploykit.tasks.text_generation.genai_config import write_genai_config
from deploykit.tasks.text_generation.generator import LocalGenerator
from deploykit.tasks.text_generation.grading import ENGINE, LanguageModelGrader, lost_by_divergence, scored
from deploykit.tasks.text_generation.predictor import load_generator
from deploykit.tasks.text_generation.quantized import quantize, quantized_forms, save_graphs, standard_graph
from deploykit.tasks.text_generation.rows import Row, load_rows, role_problem

_MEASURED_ROWS = 100  # each is scored by PyTorch, and by every form of the model
_COMPENSATED_ROWS = 128
_PARITY_ROWS = 16
_PARITY_TOKENS = 32
_LOGIT_DIFFERENCE = 1e-3
"""Largest difference of logits, relative to the largest logit."""
_TIE = 1e-4
"""If the two likeliest tokens are closer than this, relative to the largest logit, rounding may choose either."""


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs of a language model and what serving them needs to ``directory``.

    INT8 quantizes activations dynamically; with a calibration option, by ranges of ``saved`` or of calibration rows.
    """
    if options.trt is not None:
        raise UsageError(f"--trt is not for language models, and {checkpoint} is one", "leave it out")
    if options.calibrates and not options.int8:
        raise UsageError("calibration options are for INT8, and --int8 is missing", "add --int8")
    reference = TorchGenerator.load(checkpoint)
    if options.gguf:
        check_gguf(reference.torch_model.config, str(checkpoint))
    task = _facts_of_run(checkpoint, reference)
    rows = evenly(_rows(checkpoint, task, options.data, "test", options), options.measure_rows or _MEASURED_ROWS)
    asked, _ = ask(reference.tokenizer, rows, task.max_length)
    if not asked.rows:
        raise DataError("no row to measure on fits the model's context", "give other rows with --data")
    keep_samples(directory, asked.rows)
    say(f"measuring on {len(asked.rows):,} rows")
    grader = LanguageModelGrader(directory, task, reference.tokenizer, asked.encoded)
    grader.grade_checkpoint(reference, [row.origin for row in asked.rows])
    say("writing the graph")
    architecture = read_causal_architecture(reference.torch_model)
    save_graphs(architecture, None, directory=directory, precision="fp32")
    _save_tokenizer(reference, directory)
    write_genai_config(
        directory, architecture, reference.torch_model.config, task, standard_graph(directory, "fp32").name
    )
    parity = _check_parity(directory, reference, task, asked, say)
    metrics: dict[str, Any] = {"rows": len(asked.rows), "parity": dataclasses.asdict(parity)}
    grader.grade("fp32", ENGINE)
    static: StaticInt8 | None = None
    of_calibration: dict[str, Any] = {}
    if options.calibrates:
        calibration_rows = [] if saved else calibration_texts(checkpoint, task, options)
        static, of_calibration = _calibrated(architecture, directory, task, calibration_rows, saved, options, say)
    rounding = Rounding()
    forms = quantized_forms(architecture, directory, options, static, rounding)
    if forms:

        def compensate(loss: str) -> bool:
            return not rounding.compensates and _learn_inputs(rounding, checkpoint, directory, task, options, loss, say)

        found = quantize(forms, parts_of(architecture), options, grader, trace, say, compensate)
        metrics["quantization"] = {**found, **of_calibration, "compensated": rounding.compensates}
    for kind in options.gguf:
        _write_gguf(reference, directory, kind, options, grader, say)  # type: ignore[arg-type]
    return graded(task, metrics, grader)


def _write_gguf(
    reference: TorchGenerator,
    directory: Path,
    kind: GgufType,
    options: ExportOptions,
    grader: LanguageModelGrader,
    say: Say,
) -> None:
    """Write a GGUF file, and measure it as transformers reads it, independently of the code that wrote it."""
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
    raw = list(scored(again, grader.rows, reference.supervised_logits(grader.rows)))
    line = grader.enter(kind, "gguf", raw, without_labels=partial(lost_by_divergence, raw))
    grader.refuse_loss(line, f"GGUF {kind}", options.max_drop, "leave this --gguf out", say)


def reopened_gguf(path: Path, model: Any) -> TorchGenerator:
    """Open the GGUF file that was written of ``model``, with the numbers that it holds."""
    return TorchGenerator.load(path, model.model.rotary_emb)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> TextGeneration:
    """Write the fp32 graph that ``calibrate`` runs, and its tokenizer."""
    reference = TorchGenerator.load(checkpoint)
    save_graphs(read_causal_architecture(reference.torch_model), None, directory=directory, precision="fp32")
    _save_tokenizer(reference, directory)
    return _facts_of_run(checkpoint, reference)


def calibration_texts(source: Path, task: TextGeneration, options: CalibrationOptions) -> list[Row]:
    """Return calibration rows from a file, or from the splits of the checkpoint ``source``."""
    return evenly(_rows(source, task, options.calibration, options.calibration, options), options.rows_to_calibrate)


def calibrate(folder: Path, task: TextGeneration, texts: Sequence[Row]) -> Calibration:
    """Read ``texts`` with the fp32 graph in ``folder``, and record the inputs of its linear layers."""
    return calibrate_graph(standard_graph(folder, "fp32"), _token_ids(folder, task, texts))


def _token_ids(folder: Path, task: TextGeneration, rows: Sequence[Row]) -> list[list[int]]:
    """Return the token ids of rows, each cut at the model's context."""
    tokenizer = ChatTokenizer.load(folder, task.special_tokens, task.eos_token_ids)
    return [tokenizer.encode_row(row).ids[: task.max_length].tolist() for row in rows]


def _learn_inputs(
    rounding: Rounding,
    checkpoint: Path,
    directory: Path,
    task: TextGeneration,
    options: ExportOptions,
    loss: str,
    say: Say,
) -> bool:
    """Let ``rounding`` compensate errors on calibration rows. Returns False without such rows; rows to measure on are not used."""
    if options.calibration in SPLITS and not (checkpoint / "splits" / f"{options.calibration}.jsonl").is_file():
        return False
    rows = evenly(calibration_texts(checkpoint, task, options), _COMPENSATED_ROWS)
    say(f"{loss}: rounding weights so that errors compensate each other on {len(rows):,} rows of {options.calibration}")
    rounding.learn(input_factors(standard_graph(directory, "fp32"), _token_ids(directory, task, rows)))
    return True


def _calibrated(
    architecture: CausalArchitecture,
    directory: Path,
    task: TextGeneration,
    rows: Sequence[Row],
    saved: Calibration | None,
    options: ExportOptions,
    say: Say,
) -> tuple[StaticInt8, dict[str, Any]]:
    """Calibrate the fp32 graph, after SmoothQuant if requested. Also returns the record for the manifest."""
    graph = standard_graph(directory, "fp32")
    activations = set(activations_of(graph).values())
    if saved is None:
        say(f"calibrating on {len(rows):,} rows of {options.calibration}")
        ids = _token_ids(directory, task, rows)
        if options.smooth_quant is None:
            saved = calibrate_graph(graph, ids)
        else:
            architecture = smoothed(architecture, graph, ids, options.smooth_quant)
            say(f"SmoothQuant: {2 * len(architecture.layers)} activations by the norm before them")
            with tempfile.TemporaryDirectory(dir=directory) as temporary:
                other = standard_graph(Path(temporary), "fp32")
                save_graphs(architecture, None, directory=Path(temporary), precision="fp32")
                saved = calibrate_graph(other, ids)
    saved.check(activations)
    say(saved.told(options.range_method))
    ranges = saved.ranges(options.range_method)
    saved.save(directory)
    saved.save_ranges(directory, options.range_method, ranges)
    record = {"method": options.range_method, "calibration": saved.to_json(), "smooth_quant": options.smooth_quant}
    return static_int8(architecture, graph, ranges), record


def _facts_of_run(checkpoint: Path, reference: TorchGenerator) -> TextGeneration:
    """Return the facts of the checkpoint; those of a run of deploykit's know the columns of its rows as well."""
    from deploykit.artifacts import MANIFEST, load_manifest

    if not (checkpoint / MANIFEST).is_file():
        return reference.task
    facts = load_manifest(checkpoint, "checkpoint", verify=False).task
    assert isinstance(facts, TextGeneration)
    return dataclasses.replace(reference.task, columns=facts.columns)


def _rows(
    checkpoint: Path, task: TextGeneration, source: str | None, of: str, options: CalibrationOptions
) -> list[Row]:
    """Return the rows of ``source``, a file or a split, or of the split ``of``."""

    def read_file(path: str, split: str) -> list[Row]:
        raw, _ = load_rows(path, prefer=columns_of(task), reading=options, split=split)
        return [r.row for r in raw if r.problem is None and (r.row.text or role_problem(r.row.messages) is None)]

    rows = pick_rows(checkpoint, source, of, Row, read_file)
    if not rows:
        raise DataError(f"{source}: has no usable rows", "give rows with a prompt and an answer")
    return rows


def _save_tokenizer(reference: TorchGenerator, directory: Path) -> None:
    """Write the files that transformers, optimum and deploykit open the export with."""
    reference.hf_tokenizer.save_pretrained(directory)
    reference.torch_model.config.save_pretrained(directory)
    reference.torch_model.generation_config.save_pretrained(directory)


@dataclass(frozen=True)
class Parity:
    """Differences of the fp32 graph from PyTorch: the largest difference of logits, relative to the largest logit, over
    ``rows`` rows; and of ``tokens`` greedily generated tokens the number of ``equal`` ones, without those after a tie."""

    rows: int
    difference: float
    tokens: int
    equal: int
    ties: int


def _check_parity(
    directory: Path, reference: TorchGenerator, task: TextGeneration, asked: EvaluationRows, say: Say
) -> Parity:
    """Compare the export with the checkpoint. Raises ExportError when graph or tokenizer differ from the checkpoint's."""
    some = asked.some(_PARITY_ROWS)
    tokenizer = ChatTokenizer.load(directory, task.special_tokens, task.eos_token_ids)
    for row, encoded in zip(some.rows, some.encoded):
        if tokenizer.encode_row(row).ids.tolist() != encoded.ids.tolist() or not _as_transformers(
            reference, row, encoded
        ):
            raise ExportError(
                f"{row.origin}: the tokenizer cuts this row differently from the checkpoint's", "report it"
            )
    graph = load_generator(directory, task, ENGINE, LANGUAGE_MODEL_FILES["fp32"][0], available_cpus())
    standard = _StandardGraph(standard_graph(directory, "fp32"))
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
        f"tokens equal ({ties} answers differ from a tie on)"
    )
    if not difference <= _LOGIT_DIFFERENCE or equal < tokens:
        raise ExportError(
            f"the graph differs from PyTorch: logits by {difference:.1e} of the largest, {tokens - equal} of {tokens} tokens",
            "this architecture does not export faithfully: report the checkpoint",
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
    """Return whether transformers renders and encodes a dialog to the same ids."""
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
    """Return the number of tokens that both generate up to the first tie, the number of equal ones, and of answers that differ from a tie on."""
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
