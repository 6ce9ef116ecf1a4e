"""Export a token classifier: its graphs, compared with PyTorch, quantized and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from deploykit.artifacts import digest_of
from deploykit.data.sample import evenly
from deploykit.errors import ExportError, UsageError
from deploykit.graphs.encoder_export import EncoderGrader, calibrated, engines_for, quantize_graphs
from deploykit.graphs.export_options import (
    CalibrationOptions,
    ExportOptions,
    Say,
    Written,
    graded,
    keep_samples,
    pick_rows,
)
from deploykit.graphs.onnx_export import export_classifier, save_hub_files
from deploykit.measurement_log import MeasurementLog
from deploykit.quantization.calibration import Calibration
from deploykit.quantization.encoder import GRAPH, TokenRows, calibrate_encoder
from deploykit.quantization.search import SAMPLE
from deploykit.runtime.engines import load_engine
from deploykit.runtime.engines.protocol import Engine
from token_classification.checkpoint import TorchTagger
from token_classification.entities import entity_metrics
from token_classification.evaluate import labelled_rows
from token_classification.facts import TokenClassification
from token_classification.rows import Example
from token_classification.tagger import Array, WordTokenizer, decide, load_tagger

_REMEDY = "another --method, more --calibration-rows"
_TOLERANCE = 1e-3
_PARITY_ROWS = 64


def write(
    checkpoint: Path,
    directory: Path,
    options: ExportOptions,
    saved: Calibration | None,
    trace: MeasurementLog,
    say: Say,
) -> Written:
    """Write the graphs and the files for serving to ``directory``; calibrate if ``saved`` is None."""
    if options.trt is not None or options.smooth_quant is not None:
        raise UsageError("--trt and --smooth-quant are not for token classification", "leave them out")
    reference = TorchTagger.load(checkpoint)
    task = reference.task
    rows = _rows(checkpoint, task, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or len(rows))
    say(f"measuring on {len(rows):,} rows")
    _write_fp32(reference, directory)
    keep_samples(directory, rows)
    parity = _check_parity(reference, directory, rows)
    say(f"parity with PyTorch: logits differ by at most {parity['max_difference']:.1e} over {parity['rows']} texts")
    grader = _Grader(directory, task, rows)
    grader.enter("fp32", "pytorch", reference.word_logits(grader.texts))
    for engine in engines_for("fp32"):
        grader.grade("fp32", engine)
    metrics: dict[str, Any] = {"parity": parity, "rows": len(rows)}
    if options.int8:
        found = calibrated(
            directory,
            saved,
            lambda: token_rows(directory, task, calibration_texts(checkpoint, task, options)),
            options,
            say,
        )
        ranges = found.calibration.ranges(options.range_method)
        metrics["quantization"], _ = quantize_graphs(
            found, options.range_method, ranges, directory, options, grader, _REMEDY, trace, say
        )
    return graded(task, metrics, grader)


def write_fp32(checkpoint: Path, directory: Path, options: CalibrationOptions) -> TokenClassification:
    """Write the fp32 graph that ``calibrate`` runs."""
    reference = TorchTagger.load(checkpoint)
    _write_fp32(reference, directory)
    return reference.task


def calibration_texts(source: Path, task: TokenClassification, options: CalibrationOptions) -> list[str]:
    """Return rows of a file, or of the splits of the checkpoint ``source``."""
    rows = _rows(source, task, options.calibration, options.calibration, options)
    return [row.words for row in evenly(rows, options.rows_to_calibrate)]


def calibrate(folder: Path, task: TokenClassification, texts: Sequence[str]) -> Calibration:
    """Run ``texts`` through the fp32 graph in ``folder`` and collect the inputs of its linear layers."""
    return calibrate_encoder(folder / GRAPH, token_rows(folder, task, texts))


def token_rows(folder: Path, task: TokenClassification, texts: Sequence[str]) -> TokenRows:
    """Return the token ids of ``texts``, tokenized as in serving."""
    tokenizer = WordTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), task.max_length)
    token_ids, _ = tokenizer.encode(texts)
    return TokenRows(token_ids, digest_of(list(texts)))


class _Grader(EncoderGrader[list[Array]]):
    """Measures the logits of each row's words, float32 [words, labels]."""

    figures = ("accuracy", "entity_f1")
    limited = ("entity_f1",)

    def __init__(self, directory: Path, task: TokenClassification, rows: Sequence[Example]) -> None:
        super().__init__(directory)
        self._task = task
        self.texts = [row.words for row in rows]
        self._truth = [row.labels.split() for row in rows]

    def measure(self, raw: list[Array]) -> dict[str, Any]:
        return entity_metrics(self._truth, decide(self._task, raw))

    def answers(self, raw: list[Array]) -> list[str]:
        return [" ".join(labels) for labels in decide(self._task, raw)]

    def outputs(self, engine: Engine) -> list[Array]:
        return load_tagger(self._directory, self._task, engine).word_logits(self.texts)

    def sample_outputs(self, engine: Engine) -> Array:
        """Return the logits of some rows' words, float32 [words, labels]."""
        tagger = load_tagger(self._directory, self._task, engine)
        return np.concatenate(tagger.word_logits(evenly(self.texts, SAMPLE)))


def _write_fp32(reference: TorchTagger, directory: Path) -> None:
    export_classifier(reference.model, directory / GRAPH)
    save_hub_files(reference.model, reference.hub_tokenizer, directory)


def _check_parity(reference: TorchTagger, directory: Path, rows: Sequence[Example]) -> dict[str, Any]:
    """Compare fp32 logits. Raises ExportError with the difference if they are not the same."""
    texts = [row.words for row in evenly(rows, _PARITY_ROWS)]
    tagger = load_tagger(directory, reference.task, load_engine("onnxruntime", directory / GRAPH))
    pairs = zip(reference.word_logits(texts), tagger.word_logits(texts))
    difference = max(float(np.abs(expected - actual).max()) for expected, actual in pairs)
    if not difference <= _TOLERANCE:  # "not <=" catches NaN too
        raise ExportError(
            f"the ONNX graph differs from the PyTorch model: logits by up to {difference:.2g}",
            "this architecture does not export faithfully; nothing was written",
        )
    return {"rows": len(texts), "max_difference": difference}


def _rows(
    folder: Path, task: TokenClassification, source: str | None, split: str, options: CalibrationOptions
) -> list[Example]:
    """Return labelled rows from a file, or from the splits of the run in ``folder``."""

    def read_file(path: str, part: str) -> list[Example]:
        return labelled_rows(path, task, None, None, options, part).examples

    return pick_rows(folder, source, split, Example, read_file)
