"""What the export of a translation checkpoint is made of: its graphs, their quantization, their quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.data.clean_pairs import clean_pairs
from deploykit.data.pairs import Pair
from deploykit.data.read_pairs import load_pairs
from deploykit.errors import ExportError
from deploykit.export.architecture import Architecture
from deploykit.export.calibration import Calibration, Observe, collect, equal_length_batches
from deploykit.export.families import read_architecture
from deploykit.export.run import ExportOptions, Say, Written, evenly, pick_rows
from deploykit.export.search import fewest_in_fp32, too_lossy
from deploykit.export.seq2seq_graph import Graph, build_decoder, build_encoder, save_graphs, with_activations
from deploykit.export.seq2seq_parity import check_parity
from deploykit.export.tables import render
from deploykit.export.translation_tokenizer import save_translation_tokenizer
from deploykit.finetune.translator import TorchTranslator
from deploykit.metrics import translation_metrics
from deploykit.predictor import TextTranslator
from deploykit.runtime.decoding import Decoder, Sentence
from deploykit.runtime.engines import TRANSLATION_ENGINE, TRANSLATION_FILES, Precision, available_cpus
from deploykit.runtime.engines.onnxruntime import int8_kernels
from deploykit.runtime.engines.seq2seq import Seq2SeqModel
from deploykit.runtime.languages import source_prefix
from deploykit.runtime.text import normalize
from deploykit.runtime.translation_tokenizer import load_translation_tokenizer
from deploykit.runtime.translator import load_translator

_PARITY_ROWS = 128
_MEASURED_ROWS = 500  # PyTorch, which is measured too, takes minutes for more


@dataclass(frozen=True)
class Quality:
    """One line of the quality table: the same rows through one form of the model.

    ``agreement`` is the share of rows translated as the checkpoint translates them.
    """

    precision: str
    engine: str
    bleu: float
    chrf: float
    agreement: float
    int8_kernels: int


def write(checkpoint: Path, directory: Path, options: ExportOptions, say: Say) -> Written:
    """Write the graphs of a translator and what serving them needs to ``directory``."""
    reference = TorchTranslator.load(checkpoint, source=options.source, target=options.target)
    rows = _rows(checkpoint, reference, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or _MEASURED_ROWS)
    say("writing the graphs")
    architecture = read_architecture(reference.model)
    encoder, decoder = build_encoder(architecture), build_decoder(architecture)
    save_graphs(directory, encoder, decoder, "fp32")
    prefix = source_prefix(reference.task) or None
    save_translation_tokenizer(checkpoint, reference.tokenizer, directory, prefix=prefix)
    metrics: dict[str, Any] = {"rows": len(rows), "parity": _check(directory, reference, rows, say)}
    say(f"measuring on {len(rows):,} rows")
    grader = _Grader(directory, reference, rows)
    grader.grade_checkpoint()
    grader.grade("fp32")
    if options.int8:
        metrics["quantization"] = _quantize(
            checkpoint, directory, reference, architecture, (encoder, decoder), options, grader, say
        )
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [dataclasses.asdict(line) for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(reference.task, metrics)


def _check(directory: Path, reference: TorchTranslator, rows: Sequence[Pair], say: Say) -> dict[str, Any]:
    texts = [pair.source for pair in evenly(rows, _PARITY_ROWS)]
    token_ids = reference.encode(texts)
    task = reference.task
    tokenizer = load_translation_tokenizer(directory, task.source, task.target)
    for text, theirs, ours in zip(texts, token_ids, tokenizer.encode([normalize(text) for text in texts])):
        if theirs != ours and len(ours) <= task.max_source_length:  # longer ones are cut by one and split by the other
            raise ExportError(f"the tokenizer cuts {text!r} differently from the checkpoint's", "report this text")
    parity = check_parity(reference, Seq2SeqModel(directory, "fp32", available_cpus()), token_ids)
    say(
        f"parity with PyTorch: encoder differs by at most {parity.encoder_difference:.1e} (relative), log-probabilities "
        f"by {parity.decoder_difference:.1e}; "
        + ", ".join(
            f"{'greedy' if g.beams == 1 else f'{g.beams} beams'} {g.equal} of {parity.rows} equal ({g.ties} ties)"
            for g in parity.generations
        )
    )
    return parity.to_json()


def _quantize(
    checkpoint: Path,
    directory: Path,
    reference: TorchTranslator,
    architecture: Architecture,
    graphs: tuple[Graph, Graph],
    options: ExportOptions,
    grader: _Grader,
    say: Say,
) -> dict[str, Any]:
    """Write the INT8 graphs; where they lose too much, with the most sensitive layers of the model left in fp32."""
    pairs = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    texts = [pair.source for pair in evenly(pairs, options.calibration_rows)]
    say(f"calibrating on {len(texts):,} rows ({options.method})")
    calibration = calibrate(directory, graphs, reference, texts)
    calibration.save(directory, options.method)
    ranges = calibration.ranges(options.method)
    quantize_nodes = 0

    def write(kept: Collection[str]) -> Quality:
        nonlocal quantize_nodes
        some = {name: r for name, r in ranges.items() if part_of(name) not in kept}
        encoder, decoder = build_encoder(architecture, some), build_decoder(architecture, some)
        save_graphs(directory, encoder, decoder, "int8")
        quantize_nodes = sum(
            node.op_type == "QuantizeLinear" for g in (encoder, decoder) for node in g.model.graph.node
        )
        return grader.grade("int8")

    whole = write(())
    say(f"quantized {len(ranges)} linear layers ({quantize_nodes} QuantizeLinear nodes) and the embedding")
    search = None
    if grader.drop(whole) > options.max_drop:
        loss, table = f"INT8 loses {grader.drop(whole):.2f} points of BLEU or chrF", grader.table
        say(f"{loss}: which layers need fp32?")
        parts = list(dict.fromkeys(map(part_of, ranges)))
        agreement = {}
        for part in parts:
            agreement[part] = write([part]).agreement
            say(f"with {part} in fp32 {agreement[part]:.1%} of the translations stay as they were")
        order = sorted(parts, key=lambda part: -agreement[part])
        try:
            search = fewest_in_fp32(order, lambda kept: grader.drop(write(kept)), options.max_drop, say=say)
        except ExportError as error:
            raise too_lossy(loss, options.max_drop, table, error) from error
    return {
        "linear_layers": sum(search is None or part_of(name) not in search.kept for name in ranges),
        "quantize_nodes": quantize_nodes,
        "method": options.method,
        "calibration_rows": len(texts),
        "search": {TRANSLATION_ENGINE: dataclasses.asdict(search)} if search else {},
    }


def part_of(layer: str) -> str:
    """The part of the model that stays in fp32 or not as one: a block of a layer, as in ``decoder.2.cross``."""
    return layer if layer.count(".") < 3 else layer.rsplit(".", 1)[0]


def calibrate(
    directory: Path, graphs: tuple[Graph, Graph], reference: TorchTranslator, texts: Sequence[str]
) -> Calibration:
    """Translate ``texts`` greedily in fp32, and collect what goes into every linear layer of both graphs."""
    encoder, decoder = graphs
    token_ids = reference.encode(texts)
    generation = dataclasses.replace(reference.task.generation, beam_size=1)
    names = TRANSLATION_FILES["fp32"]
    # Beside the graphs, whose file of weights they read too.
    paths = [directory / f"calibration.{name}" for name in names[:2]]
    for path, graph in zip(paths, graphs):
        onnx.save(with_activations(_as_saved(graph, directory / path.name.removeprefix("calibration."))).model, path)
    try:
        model = _Observed(directory, encoder, decoder)

        def run(observe: Observe) -> None:
            model.observe = observe
            for batch in equal_length_batches(token_ids):
                model.observe_encoder(batch)
            Decoder(model, reference.task).run([Sentence(ids, generation, scored=False) for ids in token_ids])

        return collect(run, len(texts), digest_of(list(texts)))
    finally:
        for path in paths:
            path.unlink()


class _Observed(Seq2SeqModel):
    """The fp32 graphs with every linear layer's input as an output; what the decoder takes in is shown to ``observe``."""

    FILES = tuple(f"calibration.{name}" for name in TRANSLATION_FILES["fp32"][:2])

    observe: Observe

    def __init__(self, folder: Path, encoder: Graph, decoder: Graph) -> None:
        self._encoder_activations, self._decoder_activations = encoder.activations, decoder.activations
        super().__init__(folder, "fp32", available_cpus(), files=self.FILES)

    def observe_encoder(self, batch: NDArray[np.int64]) -> None:
        """Rows of equal length, so no padding."""
        lengths = np.full(len(batch), batch.shape[1], np.int32)
        tensors = list(self._encoder_activations.values())
        values = self._encoder.run(tensors, {"input_ids": batch, "lengths": lengths})
        for name, value in zip(self._encoder_activations, values):
            self.observe(name, value)

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = super().step(tokens)
        outputs = self._binding.get_outputs()[-len(self._decoder_activations) :]
        for name, value in zip(self._decoder_activations, outputs):
            self.observe(name, value.numpy())
        return logits

    def _bind(self) -> None:
        super()._bind()
        for tensor in self._decoder_activations.values():
            self._binding.bind_output(tensor)


def _as_saved(graph: Graph, path: Path) -> Graph:
    """The graph as its file has it, with its weights where that file finds them."""
    return dataclasses.replace(graph, model=onnx.load(path, load_external_data=False))


class _Grader:
    """The same rows through PyTorch and the graphs of each precision: ``table`` has a line for each,
    ``metrics`` all of its metrics."""

    def __init__(self, directory: Path, reference: TorchTranslator, rows: Sequence[Pair]) -> None:
        self._directory, self._reference = directory, reference
        self._sources, self._targets = [pair.source for pair in rows], [pair.target for pair in rows]
        self._lines: dict[str, Quality] = {}
        self._expected: list[str] = []
        self.metrics: dict[str, Any] = {}

    @property
    def table(self) -> list[Quality]:
        return list(self._lines.values())

    def grade_checkpoint(self) -> None:
        self._expected = self._texts(self._reference)
        self._enter("fp32", "pytorch", self._expected, 0)

    def grade(self, precision: Precision) -> Quality:
        """Raises ExportError when ONNX Runtime runs none of INT8 graphs' layers in INT8."""
        files = TRANSLATION_FILES[precision]
        kernels = sum(int8_kernels(self._directory / file) for file in files[:2]) if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError("ONNX Runtime runs none of the layers in INT8", "upgrade onnxruntime")
        translator = load_translator(self._directory, self._reference.task, precision, available_cpus())
        return self._enter(precision, TRANSLATION_ENGINE, self._texts(translator), kernels)

    def drop(self, line: Quality) -> float:
        """Points of BLEU or of chrF, whichever is more, that it loses to the checkpoint."""
        reference = self.table[0]
        return max(reference.bleu - line.bleu, reference.chrf - line.chrf)

    def _texts(self, translator: TextTranslator) -> list[str]:
        return [translated.text for translated in translator.translate(self._sources)]

    def _enter(self, precision: str, engine: str, texts: list[str], kernels: int) -> Quality:
        metrics = translation_metrics(texts, self._targets, self._sources)
        agreement = float(np.mean([a == b for a, b in zip(texts, self._expected)]))
        line = Quality(precision, engine, metrics["bleu"], metrics["chrf"], agreement, kernels)
        key = f"{engine}-{precision}"
        self._lines[key], self.metrics[key] = line, metrics
        return line


def _rows(
    checkpoint: Path, reference: TorchTranslator, source: str | None, split: str, options: ExportOptions
) -> list[Pair]:
    """Pairs from a file, cleaned, or from the run's own splits."""
    task = reference.task

    def read_file(path: str, part: str) -> list[Pair]:
        raw, _ = load_pairs(path, source=task.source, target=task.target, encoding=options.encoding, split=part)
        return clean_pairs(raw, source=task.source, target=task.target)[0]

    return pick_rows(checkpoint, source, split, Pair, read_file)
