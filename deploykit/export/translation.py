"""What the export of a translation checkpoint is made of: its graphs, their quantization, their quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
    if options.int8:
        metrics["quantization"] = _quantize(
            checkpoint, directory, reference, architecture, (encoder, decoder), options, say
        )
    say(f"measuring on {len(rows):,} rows")
    table, metrics["test"] = _measure(directory, reference, rows)
    metrics["accuracy_table"] = [dataclasses.asdict(line) for line in table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    _guard(table, options.max_drop)
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
    say: Say,
) -> dict[str, Any]:
    pairs = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    texts = [pair.source for pair in evenly(pairs, options.calibration_rows)]
    say(f"calibrating on {len(texts):,} rows ({options.method})")
    calibration = calibrate(directory, graphs, reference, texts)
    calibration.save(directory, options.method)
    ranges = calibration.ranges(options.method)
    encoder, decoder = build_encoder(architecture, ranges), build_decoder(architecture, ranges)
    save_graphs(directory, encoder, decoder, "int8")
    layers = len(encoder.activations) + len(decoder.activations)
    quantize_nodes = sum(node.op_type == "QuantizeLinear" for g in (encoder, decoder) for node in g.model.graph.node)
    say(f"quantized {layers} linear layers ({quantize_nodes} QuantizeLinear nodes) and the embedding")
    return {
        "linear_layers": layers,
        "quantize_nodes": quantize_nodes,
        "method": options.method,
        "calibration_rows": len(texts),
    }


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


def _measure(directory: Path, reference: TorchTranslator, rows: Sequence[Pair]) -> tuple[list[Quality], dict[str, Any]]:
    """The same rows through PyTorch and the graphs of each precision."""
    sources, targets = [pair.source for pair in rows], [pair.target for pair in rows]

    def texts(translator: TextTranslator) -> list[str]:
        return [translated.text for translated in translator.translate(sources)]

    expected = texts(reference)
    full = {"pytorch-fp32": translation_metrics(expected, targets, sources)}
    lines = [("fp32", "pytorch", expected, 0)]
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    for precision in precisions:
        files = TRANSLATION_FILES[precision]
        if not (directory / files[0]).exists():
            continue
        kernels = sum(int8_kernels(directory / file) for file in files[:2]) if precision == "int8" else 0
        if precision == "int8" and kernels == 0:
            raise ExportError("ONNX Runtime runs none of the layers in INT8", "upgrade onnxruntime")
        ours = texts(load_translator(directory, reference.task, precision, available_cpus()))
        full[f"{TRANSLATION_ENGINE}-{precision}"] = translation_metrics(ours, targets, sources)
        lines.append((precision, TRANSLATION_ENGINE, ours, kernels))
    table = []
    for (precision_name, engine, ours, kernels), metrics in zip(lines, full.values()):
        agreement = float(np.mean([a == b for a, b in zip(ours, expected)]))
        table.append(Quality(precision_name, engine, metrics["bleu"], metrics["chrf"], agreement, kernels))
    return table, full


def _guard(table: Sequence[Quality], max_drop: float) -> None:
    reference = table[0]
    for line in table:
        drop = max(reference.bleu - line.bleu, reference.chrf - line.chrf)
        if line.precision == "int8" and drop > max_drop:
            raise ExportError(
                f"INT8 loses {drop:.2f} points of BLEU or chrF, more than --max-drop {max_drop}:\n"
                + "\n".join("  " + text for text in render([dataclasses.asdict(each) for each in table])),
                "try another --method, more --calibration-rows, or export without --int8; nothing was written",
            )


def _rows(
    checkpoint: Path, reference: TorchTranslator, source: str | None, split: str, options: ExportOptions
) -> list[Pair]:
    """Pairs from a file, cleaned, or from the run's own splits."""
    task = reference.task

    def read_file(path: str, part: str) -> list[Pair]:
        raw, _ = load_pairs(path, source=task.source, target=task.target, encoding=options.encoding, split=part)
        return clean_pairs(raw, source=task.source, target=task.target)[0]

    return pick_rows(checkpoint, source, split, Pair, read_file)
