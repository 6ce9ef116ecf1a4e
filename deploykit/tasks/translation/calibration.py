"""Calibrate a translator: observe the inputs of its linear layers while it translates real rows in fp32."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.artifacts import digest_of
from deploykit.graphs.seq2seq import read_graph, with_activations
from deploykit.hardware import available_cpus
from deploykit.quantization.calibration import Calibration, Observe, collect, equal_length_batches
from deploykit.runtime.decoding import Decoder
from deploykit.runtime.engines import TRANSLATION_FILES
from deploykit.runtime.engines.onnxruntime import session_options
from deploykit.runtime.engines.seq2seq import Seq2SeqModel, cache_names
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.predictor import Translator
from deploykit.tasks.translation.tokenizer import load_translation_tokenizer

_LARGE_CACHES = 4096  # values a position. Measured: INT8 gains with 6,144 (opus-mt), and loses with 768


def activations_of(folder: Path) -> set[str]:
    """Return the names of the linear layers of both fp32 graphs, and of the decoder's caches if INT8 makes them
    faster."""
    encoder, decoder = (read_graph(folder / file) for file in TRANSLATION_FILES["fp32"][:2])
    present = [output for output in decoder.model.graph.output if output.name.startswith("present.")]
    _, heads, _, head_size = (dim.dim_value for dim in present[0].type.tensor_type.shape.dim)
    return {*encoder.activations, *decoder.activations, *_caches(len(present) // 2, heads * head_size)}


def _caches(layers: int, width: int) -> list[str]:
    """Return the names of the caches if many rows' caches exceed the CPU's cache; smaller ones are faster in fp32."""
    return cache_names(layers) if 2 * layers * width >= _LARGE_CACHES else []


def calibrate(folder: Path, task: Translation, texts: Sequence[str]) -> Calibration:
    """Translate ``texts`` greedily with the fp32 graphs in ``folder``, and record the inputs of every linear layer and
    the values written to the caches."""
    model = _Observed(folder, TRANSLATION_FILES["fp32"], available_cpus())
    tokenizer = load_translation_tokenizer(folder, task.source, task.target)
    translator = Translator(task, tokenizer, Decoder(model, task))
    generation = dataclasses.replace(task.generation, beam_size=1)

    def run(observe: Observe) -> None:
        model.observe = observe
        translator.translate(texts, generation, scored=False)

    return collect(run, len(texts), digest_of(list(texts)))


class _Observed(Seq2SeqModel):
    """Graphs that output every linear layer's input too, and pass it to ``observe`` under the layer's name."""

    observe: Observe

    def encode(self, token_ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Encode in batches of equal length, so that no padding is observed."""
        tensors = _unique(self._encoder_activations)
        for batch in equal_length_batches(token_ids):
            lengths = np.full(len(batch), batch.shape[1], np.int32)
            *values, cross = self._encoder.run([*tensors, "cross"], {"input_ids": batch, "lengths": lengths})
            self._show(self._encoder_activations, dict(zip(tensors, values)))
            self._show_caches("cross", np.moveaxis(cross.reshape(*batch.shape, 2 * self._layers, -1), 2, 0))
        return super().encode(token_ids)

    def step(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = super().step(tokens)
        tensors = _unique(self._decoder_activations)
        outputs = self._binding.get_outputs()[-len(tensors) :]
        self._show(self._decoder_activations, {t: value.numpy() for t, value in zip(tensors, outputs)})
        each = np.arange(self.rows)
        self._show_caches("self", np.moveaxis(self._self.view[:, each, :, self._past[each] - 1], 1, 0))
        return logits

    def _show_caches(self, of: str, values: NDArray[np.float32]) -> None:
        """Observe ``values``, [2 x layers, ...], that were written to the caches."""
        names = _caches(self._layers, self._heads * self._head_size)
        for name, each in zip((name for name in names if of in name), values):
            self.observe(name, each)

    def _show(self, activations: Mapping[str, str], values: Mapping[str, NDArray[np.float32]]) -> None:
        for name, tensor in activations.items():
            self.observe(name, values[tensor])

    def _open(self, threads: int) -> tuple[ort.InferenceSession, ...]:
        graphs = [read_graph(path) for path in self._paths]
        self._encoder_activations, self._decoder_activations = (graph.activations for graph in graphs)
        options = session_options(threads, spin=True)
        folder = str(self._paths[0].parent)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return tuple(
            ort.InferenceSession(
                with_activations(graph).model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            for graph in graphs
        )

    def _bind(self) -> None:
        super()._bind()
        for tensor in _unique(self._decoder_activations):
            self._binding.bind_output(tensor)


def _unique(activations: Mapping[str, str]) -> list[str]:
    """Return each tensor once: several layers may read the same one."""
    return list(dict.fromkeys(activations.values()))
