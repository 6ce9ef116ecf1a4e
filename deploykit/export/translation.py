"""What the export of a translation checkpoint is made of: its graphs, their quantization, their quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
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
from deploykit.data.sample import evenly
from deploykit.errors import ExportError
from deploykit.export.architecture import Architecture
from deploykit.export.calibration import Calibration, Observe, collect, equal_length_batches
from deploykit.export.families import read_architecture
from deploykit.export.quantize import Ranges
from deploykit.export.run import ExportOptions, Say, Written, pick_rows
from deploykit.export.search import Search, fewest_in_fp32, too_lossy
from deploykit.export.seq2seq_graph import Standard, build_decoder, build_encoder, save_graphs, with_activations
from deploykit.export.seq2seq_parity import Parity, check_parity
from deploykit.export.seq2seq_writer import Graph
from deploykit.export.tables import render
from deploykit.export.tensorrt import EngineOptions, build_engine, plan, read_inputs
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
from deploykit.tasks import Translation

_PARITY_ROWS = 128
_MEASURED_ROWS = 500  # PyTorch, which is measured too, takes minutes for more
_TENSORRT_TYPES: dict[str, Standard] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "fp16"}
"""Precision of an engine -> what its layers compute in that are not INT8."""


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
    if options.trt is not None:
        plan(options.trt, _limits(reference.task))
    rows = _rows(checkpoint, reference, options.data, "test", options)
    rows = evenly(rows, options.measure_rows or _MEASURED_ROWS)
    say("writing the graphs")
    architecture = read_architecture(reference.model)
    encoder, decoder = build_encoder(architecture), build_decoder(architecture)
    save_graphs(directory, encoder, decoder, TRANSLATION_FILES["fp32"])
    prefix = source_prefix(reference.task) or None
    save_translation_tokenizer(checkpoint, reference.tokenizer, directory, prefix=prefix)
    parity_rows = [pair.source for pair in evenly(rows, _PARITY_ROWS)]
    parity = _check(directory, reference, parity_rows, say)
    metrics: dict[str, Any] = {"rows": len(rows), "parity": parity.to_json()}
    say(f"measuring on {len(rows):,} rows")
    grader = _Grader(directory, reference, rows)
    grader.grade_checkpoint()
    grader.grade("fp32")
    ranges: Ranges = {}
    if options.int8:
        metrics["quantization"], ranges = _quantize(
            checkpoint, directory, reference, architecture, (encoder, decoder), options, grader, say
        )
    if options.trt is not None:
        _build_engines(
            directory, reference, architecture, parity_rows, ranges, options, options.trt, grader, metrics, say
        )
    metrics["test"] = grader.metrics
    metrics["accuracy_table"] = [dataclasses.asdict(line) for line in grader.table]
    for line in render(metrics["accuracy_table"]):
        say(line)
    return Written(reference.task, metrics)


def _check(directory: Path, reference: TorchTranslator, texts: Sequence[str], say: Say) -> Parity:
    token_ids = reference.encode(texts)
    task = reference.task
    tokenizer = load_translation_tokenizer(directory, task.source, task.target)
    for text, theirs, ours in zip(texts, token_ids, tokenizer.encode([normalize(text) for text in texts])):
        if theirs != ours and len(ours) <= task.max_source_length:  # longer ones are cut by one and split by the other
            raise ExportError(f"the tokenizer cuts {text!r} differently from the checkpoint's", "report this text")
    model = Seq2SeqModel(directory, TRANSLATION_FILES["fp32"], available_cpus())
    parity = check_parity(reference, model, token_ids)
    say(f"parity with PyTorch: {_told(parity)}")
    return parity


def _told(parity: Parity) -> str:
    searches = (
        f"{'greedy' if g.beams == 1 else f'{g.beams} beams'} {g.equal} of {parity.rows} equal ({g.ties} ties)"
        for g in parity.generations
    )
    return (
        f"encoder differs by at most {parity.encoder_difference:.1e} (relative), log-probabilities by "
        f"{parity.decoder_difference:.1e}; {', '.join(searches)}"
    )


def _quantize(
    checkpoint: Path,
    directory: Path,
    reference: TorchTranslator,
    architecture: Architecture,
    graphs: tuple[Graph, Graph],
    options: ExportOptions,
    grader: _Grader,
    say: Say,
) -> tuple[dict[str, Any], Ranges]:
    """Write the INT8 graphs; where they lose too much, with the most sensitive layers of the model left in fp32.

    Returns what the manifest says of it, and the ranges of the layers that are INT8.
    """
    pairs = _rows(checkpoint, reference, options.calibration, options.calibration, options)
    texts = [pair.source for pair in evenly(pairs, options.calibration_rows)]
    say(f"calibrating on {len(texts):,} rows ({options.method})")
    calibration = calibrate(directory, graphs, reference, texts)
    ranges = calibration.ranges(options.method)
    calibration.save(directory, options.method, ranges)
    quantize_nodes = 0

    def write(kept: Collection[str]) -> Quality:
        nonlocal quantize_nodes
        some = _without(ranges, kept)
        encoder, decoder = build_encoder(architecture, some), build_decoder(architecture, some)
        save_graphs(directory, encoder, decoder, TRANSLATION_FILES["int8"])
        quantize_nodes = sum(
            node.op_type == "QuantizeLinear" for g in (encoder, decoder) for node in g.model.graph.node
        )
        return grader.grade("int8")

    search = _hold_limit("INT8", write, ranges, options, grader, say)
    written = _without(ranges, search.kept if search else ())
    say(f"quantized {len(written)} linear layers ({quantize_nodes} QuantizeLinear nodes) and the embedding")
    record = {
        "linear_layers": len(written),
        "quantize_nodes": quantize_nodes,
        "method": options.method,
        "calibration_rows": len(texts),
        "search": {TRANSLATION_ENGINE: dataclasses.asdict(search)} if search else {},
    }
    return record, written


def _hold_limit(
    name: str, write: Callable[[Collection[str]], Quality], ranges: Ranges, options: ExportOptions, grader: _Grader,
    say: Say,
) -> Search | None:  # fmt: skip
    """Let ``write`` quantize all layers that have ``ranges``, or, where that loses too much, all but a few parts.

    ``write`` is given the parts of the model that stay as they are. Raises ExportError when nothing holds the limit.
    """
    whole = write(())
    if grader.drop(whole) <= options.max_drop:
        return None
    loss, table = f"{name} loses {grader.drop(whole):.2f} points of BLEU or chrF", grader.table
    say(f"{loss}: which layers must not be INT8?")
    agreement = {}
    for part in dict.fromkeys(map(part_of, ranges)):
        agreement[part] = write([part]).agreement
        say(f"with {part} left as it was {agreement[part]:.1%} of the translations stay as they were")
    order = sorted(agreement, key=lambda part: -agreement[part])
    try:
        return fewest_in_fp32(order, lambda kept: grader.drop(write(kept)), options.max_drop, say=say)
    except ExportError as error:
        raise too_lossy(loss, options.max_drop, table, error) from error


def _without(ranges: Ranges, kept: Collection[str]) -> Ranges:
    return {name: range_ for name, range_ in ranges.items() if part_of(name) not in kept}


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

    FILES = (*(f"calibration.{name}" for name in TRANSLATION_FILES["fp32"][:2]), TRANSLATION_FILES["fp32"][2])

    observe: Observe

    def __init__(self, folder: Path, encoder: Graph, decoder: Graph) -> None:
        self._encoder_activations, self._decoder_activations = encoder.activations, decoder.activations
        super().__init__(folder, self.FILES, available_cpus())

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
        return self._enter(precision, TRANSLATION_ENGINE, self._texts(self._load(files)), kernels)

    def grade_for_tensorrt(self, precision: str) -> Quality:
        """The graphs that engines are built from, as ONNX Runtime computes them on the CPU."""
        translator = self._load(tensorrt_files(precision))
        return self._enter(f"trt {precision}", TRANSLATION_ENGINE, self._texts(translator), 0)

    def _load(self, files: Sequence[str]) -> TextTranslator:
        return load_translator(self._directory, self._reference.task, files, available_cpus())

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


def tensorrt_files(precision: str) -> tuple[str, str, str]:
    """The graphs of standard ONNX that engines of ``precision`` are built from, and the weights that both use."""
    return f"encoder.trt.{precision}.onnx", f"decoder.trt.{precision}.onnx", f"shared.trt.{precision}.bin"


def _limits(task: Translation) -> dict[str, int]:
    return {"length": task.max_source_length, "past": task.max_target_length}


def _build_engines(
    directory: Path, reference: TorchTranslator, architecture: Architecture, texts: Sequence[str], ranges: Ranges,
    options: ExportOptions, trt: EngineOptions, grader: _Grader, metrics: dict[str, Any], say: Say,
) -> None:  # fmt: skip
    """Write both graphs in standard ONNX, in each precision, and build their engines. Adds to the ``metrics``.

    In fp32 they must be PyTorch's; other types are the same nodes, and are graded where a CPU can compute them. INT8 is
    Q/DQ in the fp16 graphs, of the layers that have ``ranges``.
    """

    def write(precision: str, kept: Collection[str] = ()) -> None:
        some = _without(ranges, kept) if precision == "int8" else None
        kind = _TENSORRT_TYPES[precision]
        encoder, decoder = (build(architecture, some, standard=kind) for build in (build_encoder, build_decoder))
        save_graphs(directory, encoder, decoder, tensorrt_files(precision))

    def write_int8(kept: Collection[str]) -> Quality:
        write("int8", kept)
        return grader.grade_for_tensorrt("int8")

    write("fp32")
    model = Seq2SeqModel(directory, tensorrt_files("fp32"), available_cpus())
    parity = check_parity(reference, model, reference.encode(texts), beams=False)
    say(f"parity of the graphs for TensorRT: {_told(parity)}")
    metrics["parity"]["tensorrt"] = parity.to_json()
    if "fp32" not in trt.precisions:
        for file in tensorrt_files("fp32"):
            (directory / file).unlink()
    metrics["engines"] = []
    for precision in trt.precisions:
        if precision == "int8":
            search = _hold_limit("INT8 for TensorRT", write_int8, ranges, options, grader, say)
            if search:
                metrics["quantization"]["search"]["tensorrt"] = dataclasses.asdict(search)
        elif precision != "fp32":
            write(precision)
        if precision == "fp16" and (drop := grader.drop(grader.grade_for_tensorrt("fp16"))) > options.max_drop:
            raise ExportError(
                f"the fp16 graphs lose {drop:.2f} points of BLEU or chrF, more than --max-drop {options.max_drop}",
                "give --precision bf16, whose range is wider, or raise --max-drop; nothing was written",
            )
        *graphs, weights = (directory / file for file in tensorrt_files(precision))
        for graph in graphs:
            engine = build_engine(
                graph, precision, trt, _limits(reference.task), say, inputs=read_inputs(graph), weights=weights
            )
            metrics["engines"].append(dataclasses.asdict(engine))


def _rows(
    checkpoint: Path, reference: TorchTranslator, source: str | None, split: str, options: ExportOptions
) -> list[Pair]:
    """Pairs from a file, cleaned, or from the run's own splits."""
    task = reference.task

    def read_file(path: str, part: str) -> list[Pair]:
        raw, _ = load_pairs(path, source=task.source, target=task.target, encoding=options.encoding, split=part)
        return clean_pairs(raw, source=task.source, target=task.target)[0]

    return pick_rows(checkpoint, source, split, Pair, read_file)
