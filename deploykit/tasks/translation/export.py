"""Export a translation checkpoint: write its graphs, quantize them, and measure their quality."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.bootstrap import Measure
from deploykit.data.sample import evenly
from deploykit.errors import ExportError, UsageError
from deploykit.graphs.architecture import Architecture
from deploykit.graphs.export_options import (
    CalibrationOptions,
    ExportOptions,
    Say,
    Written,
    graded,
    keep_samples,
    pick_rows,
)
from deploykit.graphs.families import read_architecture
from deploykit.graphs.native_writer import save_native
from deploykit.graphs.seq2seq import Standard, build_decoder, build_encoder, save_graphs
from deploykit.hardware import available_cpus
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration, calibrate_named
from deploykit.quantization.grading import Grader, Line
from deploykit.quantization.next_token import MEASURE
from deploykit.quantization.qdq import Ranges
from deploykit.quantization.search import SAMPLE, Search, hold_limit
from deploykit.runtime.engines import ENGINES, NATIVE_FILE, TRANSLATION_ENGINE, TRANSLATION_FILES, load_decode_model
from deploykit.runtime.engines.native.weights import int8_layers
from deploykit.runtime.engines.onnxruntime import int8_kernels
from deploykit.runtime.engines.protocol import DecodeLimits, Precision
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.engines.tensorrt import EngineRecord, runs_here
from deploykit.tasks.answer_each import Refusal, answer_each, stop_at_no_number
from deploykit.tasks.translation.calibration import activations_of, calibrate
from deploykit.tasks.translation.checkpoint import TorchTranslator
from deploykit.tasks.translation.clean_pairs import clean_pairs
from deploykit.tasks.translation.export_tokenizer import save_translation_tokenizer
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.forced_decoding import (
    ForcedTranslation,
    divergences,
    greedy_translations,
    log_probabilities,
)
from deploykit.tasks.translation.metrics import measure_of, translation_metrics
from deploykit.tasks.translation.optimum import write_optimum
from deploykit.tasks.translation.pairs import Pair
from deploykit.tasks.translation.parity import Parity, check_parity
from deploykit.tasks.translation.predictor import TextTranslator, Translator, load_translator
from deploykit.tasks.translation.read_pairs import load_pairs
from deploykit.tasks.translation.source_prefix import source_prefix
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer
from deploykit.tasks.translation.translated import Translated
from deploykit.tensorrt.build import build_engine, plan, read_inputs
from deploykit.tensorrt.options import TRANSLATOR_GRAPHS, EngineOptions
from deploykit.text import normalize

_PARITY_ROWS = 128
_MEASURED_ROWS = 500  # PyTorch is measured too, and takes minutes for more
_FORCED, _FORCED_AT_ONCE = 200, 64
"""Texts whose fp32 translations are compared token by token, and how many of them at once."""
_CACHES = "caches"
_TENSORRT_TYPES: dict[str, Standard] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16"}
"""Precision of an engine -> type of its layers that are not INT8."""


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs of a translator and the files for serving to ``directory``; calibrate if ``saved`` is None."""
    reference = TorchTranslator.load(checkpoint, source=options.source_lang, target=options.target_lang)
    task = reference.task
    if options.smooth_quant is not None:
        raise UsageError(f"--smooth-quant is for classifiers, and {checkpoint} translates", "leave it out")
    if options.trt is not None:
        plan(options.trt, task.shape_limits)
    rows = _rows(checkpoint, task, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or _MEASURED_ROWS)
    keep_samples(directory, rows)
    say(f"measuring on {len(rows):,} rows")
    grader = _Grader(directory, task, rows)
    grader.grade_checkpoint(reference)
    say("writing the graphs")
    architecture = _write_fp32(checkpoint, reference, directory)
    parity_rows = [pair.source for pair in evenly(rows, _PARITY_ROWS)]
    parity = _check(directory, reference, parity_rows, say)
    metrics: dict[str, Any] = {"rows": len(rows), "parity": parity.to_json()}
    grader.grade("fp32")
    ranges: Ranges = {}
    if options.int8:
        calibration = saved
        if calibration is None:
            say(f"calibrating on {options.calibration}")
            texts = calibration_texts(checkpoint, task, options)
            calibration = calibrate_named(partial(calibrate, directory, task), texts)
        else:
            calibration.check(activations_of(directory))
        metrics["quantization"], ranges = _quantize(calibration, directory, architecture, options, grader, trace, say)
    if options.optimum:
        layers = _without(ranges, {_CACHES})
        metrics["parity"]["optimum"] = write_optimum(directory, reference, architecture, layers, parity_rows, say)
    if options.trt is not None:
        _build_engines(
            directory, reference, architecture, parity_rows, ranges, options, options.trt, grader, metrics, trace, say
        )
    return graded(task, metrics, grader)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> Translation:
    """Write the fp32 graphs that ``calibrate`` runs."""
    reference = TorchTranslator.load(checkpoint, source=options.source_lang, target=options.target_lang)
    _write_fp32(checkpoint, reference, directory)
    return reference.task


def _write_fp32(checkpoint: Path, reference: TorchTranslator, directory: Path) -> Architecture:
    architecture = read_architecture(reference.model)
    save_graphs(directory, build_encoder(architecture), build_decoder(architecture), TRANSLATION_FILES["fp32"])
    prefix = source_prefix(reference.task, reference.model.config) or None
    save_translation_tokenizer(checkpoint, reference.tokenizer, directory, prefix=prefix)
    return architecture


def calibration_texts(source: Path, task: Translation, options: CalibrationOptions) -> list[str]:
    """Return calibration texts from a file, or from the splits of the checkpoint ``source``."""
    pairs = _rows(source, task, options.calibration, options.calibration, options)
    return [pair.source for pair in evenly(pairs, options.rows_to_calibrate)]


def _check(directory: Path, reference: TorchTranslator, texts: Sequence[str], say: Say) -> Parity:
    token_ids = reference.encode(texts)
    task = reference.task
    tokenizer = load_translation_tokenizer(directory, task.source, task.target)
    for text, theirs, ours in zip(texts, token_ids, tokenizer.encode([normalize(text) for text in texts])):
        if (
            theirs != ours and len(ours) <= task.max_source_length
        ):  # PyTorch truncates longer texts, serving splits them
            raise ExportError(f"the tokenizer cuts {text!r} differently from the checkpoint's", "report this text")
    model = Seq2SeqModel(directory, TRANSLATION_FILES["fp32"], available_cpus())
    parity = check_parity(reference, model, token_ids)
    say(f"parity with PyTorch: {_parity_text(parity)}")
    return parity


def _parity_text(parity: Parity) -> str:
    searches = (
        f"{'greedy' if g.beams == 1 else f'{g.beams} beams'} {g.equal} of {parity.rows} equal ({g.ties} ties)"
        for g in parity.generations
    )
    return (
        f"encoder differs by at most {parity.encoder_difference:.1e} (relative), log-probabilities by "
        f"{parity.decoder_difference:.1e}; {', '.join(searches)}"
    )


def _quantize(
    calibration: Calibration,
    directory: Path,
    architecture: Architecture,
    options: ExportOptions,
    grader: _Grader,
    trace: MeasurementLog,
    say: Say,
) -> tuple[dict[str, Any], Ranges]:
    """Write the INT8 graphs. If they lose too much, leave the most sensitive layers in fp32.

    Return the manifest's record, and the ranges of the layers in INT8.
    """
    say(calibration.told(options.range_method))
    calibration.save(directory)
    ranges = calibration.ranges(options.range_method)
    calibration.save_ranges(directory, options.range_method, ranges)
    quantize_nodes = 0

    def save(some: Ranges) -> None:
        nonlocal quantize_nodes
        encoder, decoder = build_encoder(architecture, some), build_decoder(architecture, some)
        save_graphs(directory, encoder, decoder, TRANSLATION_FILES["int8"])
        save_native(directory / NATIVE_FILE, architecture, some)
        quantize_nodes = sum(
            node.op_type == "QuantizeLinear" for g in (encoder, decoder) for node in g.model.graph.node
        )

    search = _quantize_within_limit(
        "INT8", save, lambda: grader.grade("int8"), TRANSLATION_FILES["int8"], ranges, options, grader, trace, say
    )
    written = _without(ranges, search.kept if search else ())
    layers = _without(written, {_CACHES})
    more = "the embedding and the caches" if len(layers) < len(written) else "the embedding"
    say(f"quantized {len(layers)} linear layers ({quantize_nodes} QuantizeLinear nodes), {more}")
    record = {
        "linear_layers": len(layers),
        "caches": len(written) - len(layers),
        "quantize_nodes": quantize_nodes,
        "method": options.range_method,
        "calibration": calibration.to_json(),
        "search": {TRANSLATION_ENGINE: dataclasses.asdict(search)} if search else {},
    }
    return record, written


def _quantize_within_limit(
    name: str, save: Callable[[Ranges], None], grade: Callable[[], Line], files: Sequence[str], ranges: Ranges,
    options: ExportOptions, grader: _Grader, trace: MeasurementLog, say: Say,
) -> Search | None:  # fmt: skip
    """Quantize all layers that have ``ranges``, or, if that loses too much, all but a few parts of the model.

    ``save`` writes ``files`` with the given layers in INT8; ``grade`` measures them.
    """
    parts = list(dict.fromkeys(map(part_of, ranges)))

    def write(kept: Collection[str]) -> Line:
        save(_without(ranges, kept))
        return grade()

    def sample(some: Collection[str]) -> NDArray[np.float32]:
        if not some:
            return grader.sample(TRANSLATION_FILES["fp32"])
        save(_without(ranges, set(parts) - set(some)))
        return grader.sample(files)

    return hold_limit(name, parts, write, sample, grader, options.max_drop, trace, say)


def _without(ranges: Ranges, kept: Collection[str]) -> Ranges:
    return {name: range_ for name, range_ in ranges.items() if part_of(name) not in kept}


def part_of(layer: str) -> str:
    """Return the unit that is quantized or left in fp32 as a whole: a block such as ``decoder.2.cross``, or all
    caches."""
    if layer.startswith(f"{_CACHES}."):
        return _CACHES
    return layer if layer.count(".") < 3 else layer.rsplit(".", 1)[0]


class _Grader(Grader[list[str]]):
    """Measures translations row by row."""

    figures = ("bleu", "chrf")
    label_free = MEASURE

    def __init__(self, directory: Path, task: Translation, rows: Sequence[Pair]) -> None:
        super().__init__()
        self._directory, self._task = directory, task
        self._origins = [pair.origin for pair in rows]
        self._sources, self._targets = [pair.source for pair in rows], [pair.target for pair in rows]

    def measure(self, raw: list[str]) -> dict[str, Any]:
        return translation_metrics(raw, self._targets, self._sources, self._task.target)

    def measure_of(self, raw: list[str]) -> Measure:
        return measure_of(raw, self._targets, self._task.target)

    def answers(self, raw: list[str]) -> list[str]:
        return raw

    def grade_checkpoint(self, reference: TextTranslator) -> None:
        found = answer_each(reference.translate, self._sources)
        stop_at_no_number(self._origins, found)
        self.enter("fp32", "pytorch", _texts(found))

    def grade(self, precision: Precision) -> Line:
        """Grade every engine that runs here, and return the line of the one that loses most.

        Raises ExportError if ONNX Runtime runs no layer of the INT8 graphs in INT8.
        """
        files = TRANSLATION_FILES[precision]
        kernels = sum(int8_kernels(self._directory / file) for file in files[:2]) if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError("ONNX Runtime runs none of the layers in INT8", "upgrade onnxruntime")
        forms: dict[str, tuple[Sequence[str], int]] = {TRANSLATION_ENGINE: (files, kernels)}
        if precision == "int8" and ENGINES["native"].installed and (self._directory / NATIVE_FILE).exists():
            forms["native"] = ([NATIVE_FILE], int8_layers(self._directory / NATIVE_FILE))

        def lost() -> float:
            return max(self.lost_without_labels(names, engine) for engine, (names, _) in forms.items())

        lines = [
            self.enter(precision, engine, self._texts(self._load(names, engine)), layers, lost)
            for engine, (names, layers) in forms.items()
        ]
        return max(lines, key=self.drop)

    def grade_for_tensorrt(self, precision: str) -> Line:
        """Grade the graphs that TensorRT engines are built from, run by ONNX Runtime on the CPU."""
        files = TRANSLATOR_GRAPHS[precision]
        lost = partial(self.lost_without_labels, files)
        return self.enter(f"trt {precision}", TRANSLATION_ENGINE, self._texts(self._load(files)), without_labels=lost)

    def grade_engines(self, precision: str, records: Sequence[EngineRecord]) -> Line:
        """Grade the TensorRT engines of encoder and decoder on this machine's GPU."""
        files = [record.file for record in records]
        gemms = sum(record.int8_gemms for record in records)
        lost = partial(self.lost_without_labels, files, "tensorrt")
        return self.enter(precision, "tensorrt", self._texts(self._load(files, "tensorrt")), gemms, lost)

    def sample(self, files: Sequence[str]) -> NDArray[np.float32]:
        """Return the log-probabilities that the graphs in ``files`` assign to the fp32 translations of some rows, by
        token."""
        model = Seq2SeqModel(self._directory, files, available_cpus())
        return log_probabilities(model, self._task, evenly(self._fp32_translations, SAMPLE))

    def lost_without_labels(self, files: Sequence[str], engine: str = TRANSLATION_ENGINE) -> float:
        """Return the points of loss that a form is expected to lose on translations that fp32 itself writes: its mean divergence."""
        reference = Seq2SeqModel(self._directory, TRANSLATION_FILES["fp32"], available_cpus())
        model = load_decode_model(engine, self._directory, files, available_cpus())
        pairs, rows = self._fp32_translations, _FORCED_AT_ONCE
        if (limits := model.limits) is not None:
            pairs, rows = _within(pairs, limits), min(rows, limits.rows)
        parts = (pairs[i : i + rows] for i in range(0, len(pairs), rows))
        found = [divergences(model, reference, self._task, part) for part in parts]
        return 100 * float(np.concatenate(found).mean())

    @functools.cached_property
    def _fp32_translations(self) -> list[ForcedTranslation]:
        return greedy_translations(self._load(TRANSLATION_FILES["fp32"]), evenly(self._sources, _FORCED))

    def _load(self, files: Sequence[str], engine: str = TRANSLATION_ENGINE) -> Translator:
        return load_translator(self._directory, self._task, files, available_cpus(), engine=engine)

    def _texts(self, translator: TextTranslator) -> list[str]:
        return _texts(answer_each(translator.translate, self._sources))


def _within(pairs: Sequence[ForcedTranslation], limits: DecodeLimits) -> list[ForcedTranslation]:
    """Return the pairs whose source is not too long, with the beginning of their translation."""
    kept = (pair for pair in pairs if len(pair.source) <= limits.source)
    return [ForcedTranslation(pair.source, pair.target[: limits.target]) for pair in kept]


def _texts(found: Sequence[Translated | Refusal]) -> list[str]:
    # A text for which a form computes no number counts as untranslated.
    return [one.text if isinstance(one, Translated) else "" for one in found]


def _build_engines(
    directory: Path, reference: TorchTranslator, architecture: Architecture, texts: Sequence[str], ranges: Ranges,
    options: ExportOptions, trt: EngineOptions, grader: _Grader, metrics: dict[str, Any], trace: MeasurementLog, say: Say,
) -> None:  # fmt: skip
    """Write both graphs in standard ONNX in each precision, and build their engines. Adds to ``metrics``.

    The fp32 graphs must match PyTorch. Other types have the same nodes, and are graded if a CPU can run them. INT8 is
    Q/DQ in the fp16 graphs, around the layers that have ``ranges``.
    """

    def write(precision: str, some: Ranges | None = None) -> None:
        kind = _TENSORRT_TYPES[precision]
        encoder, decoder = (build(architecture, some, standard=kind) for build in (build_encoder, build_decoder))
        save_graphs(directory, encoder, decoder, TRANSLATOR_GRAPHS[precision])

    write("fp32")
    model = Seq2SeqModel(directory, TRANSLATOR_GRAPHS["fp32"], available_cpus())
    parity = check_parity(reference, model, reference.encode(texts), beams=False)
    say(f"parity of the graphs for TensorRT: {_parity_text(parity)}")
    metrics["parity"]["tensorrt"] = parity.to_json()
    if "fp32" not in trt.precisions:
        for file in TRANSLATOR_GRAPHS["fp32"]:
            (directory / file).unlink()
    metrics["engines"] = []
    ranges = _without(ranges, {_CACHES})  # TensorRT's caches have the type of its layers
    for precision in trt.precisions:
        calibration = None
        if precision == "int8":
            search = _quantize_within_limit(
                "INT8 for TensorRT", partial(write, "int8"), lambda: grader.grade_for_tensorrt("int8"),
                TRANSLATOR_GRAPHS["int8"], ranges, options, grader, trace, say,
            )  # fmt: skip
            if search:
                metrics["quantization"]["search"]["tensorrt"] = dataclasses.asdict(search)
            calibration = digest_of(_without(ranges, search.kept if search else ()))
        elif precision != "fp32":
            write(precision)
        if precision == "fp16":
            remedy = "give --precision bf16, whose range is wider"
            grader.refuse_loss(grader.grade_for_tensorrt("fp16"), "the fp16 form", options.max_drop, remedy, say)
        *graphs, weights = (directory / file for file in TRANSLATOR_GRAPHS[precision])
        engines = [
            build_engine(
                graph, precision, trt, reference.task.shape_limits, say, calibration, inputs=read_inputs(graph),
                weights=weights,
            )
            for graph in graphs
        ]  # fmt: skip
        if all(runs_here(directory / engine.file) for engine in engines):
            line, remedy = grader.grade_engines(precision, engines), "leave this --precision out"
            grader.refuse_loss(line, f"the {precision} engines", options.max_drop, remedy, say)
        metrics["engines"] += map(dataclasses.asdict, engines)


def _rows(folder: Path, task: Translation, source: str | None, split: str, options: CalibrationOptions) -> list[Pair]:
    """Return cleaned pairs of a file, or pairs of the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Pair]:
        raw, _ = load_pairs(path, source=task.source, target=task.target, reading=options, split=part)
        return clean_pairs(raw, source=task.source, target=task.target)[0]

    return pick_rows(folder, source, split, Pair, read_file)
