"""Calibration of a classifier: what goes into its linear layers while fp32 answers real rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from deploykit.artifacts import digest_of
from deploykit.quantization.activations import show_activations
from deploykit.quantization.calibration import Calibration, collect
from deploykit.quantization.qdq import linear_layers
from deploykit.runtime.engines import ENGINES
from deploykit.runtime.tokenizer import TextTokenizer
from deploykit.tasks.classification.facts import Classification
from deploykit.text import normalize

_GRAPH = ENGINES["onnxruntime"].graphs["fp32"]


def activations_of(folder: Path) -> set[str]:
    """The tensors that go into linear layers of the fp32 graph."""
    return {layer.activation for layer in linear_layers(onnx.load(folder / _GRAPH))}


def calibrate(folder: Path, task: Classification, texts: Sequence[str], graph: str = _GRAPH) -> Calibration:
    """Run ``texts`` through an fp32 ``graph`` in ``folder``."""
    return calibrate_tokens(folder / graph, tokenized(folder, task, texts), digest_of(list(texts)))


def tokenized(folder: Path, task: Classification, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of ``texts`` as the export in ``folder`` is served them."""
    return TextTokenizer(folder / "tokenizer.json", task.max_length).encode([normalize(text) for text in texts])


def calibrate_tokens(graph: Path, token_ids: Sequence[Sequence[int]], rows_digest: str) -> Calibration:
    """Run tokenized rows, unpadded, through the fp32 ``graph`` and collect its quantizable activations.

    Only activations with a row for each token count: what comes after pooling is a single row a
    text, costs nothing in fp32, and decides the answer.
    """
    return collect(lambda observe: show_activations(graph, token_ids, observe), len(token_ids), rows_digest)
