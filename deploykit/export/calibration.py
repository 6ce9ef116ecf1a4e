"""Calibration: the range of each quantized activation, from real rows through the fp32 graph.

Two passes: the first finds each tensor's exact minimum and maximum, the second fills a histogram
between them. Rows of equal length run together, so no padding position is ever counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.export.quantize import Ranges, linear_layers

Method = Literal["minmax", "entropy", "percentile", "mse"]
METHODS: tuple[str, ...] = get_args(Method)

BINS = 2048
_TOKENS_PER_BATCH = 1024  # bounds the activations held at once
_LEVELS = 128  # of an INT8 magnitude
_PERCENTILE = 99.99


@dataclass(frozen=True)
class Histogram:
    """``counts`` int64 [BINS] over equal bins from ``low`` to ``high``, the tensor's exact extremes."""

    low: float
    high: float
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """What real rows did to each activation; ``rows_digest`` identifies the rows."""

    histograms: Mapping[str, Histogram]
    rows: int
    rows_digest: str

    def ranges(self, method: Method) -> dict[str, tuple[float, float]]:
        """Tensor name -> (low, high) to represent, by ``method``."""
        return {name: clipped_range(histogram, method) for name, histogram in self.histograms.items()}

    def save(self, folder: Path, method: str, ranges: Ranges) -> None:
        """Write calibration.json (the ``ranges`` chosen by ``method``) and calibration.npz (the histograms)."""
        names = list(self.histograms)
        np.savez_compressed(
            folder / "calibration.npz",
            names=np.array(names),
            low=np.array([self.histograms[n].low for n in names]),
            high=np.array([self.histograms[n].high for n in names]),
            counts=np.stack([self.histograms[n].counts for n in names]),
        )
        record = {
            "method": method,
            "rows": self.rows,
            "rows_digest": self.rows_digest,
            "ranges": {name: list(pair) for name, pair in ranges.items()},
        }
        (folder / "calibration.json").write_text(json.dumps(record, indent=1) + "\n")


Observe = Callable[[str, NDArray[np.float32]], None]
"""Called with the name of an activation and its values; padding positions are not among them."""


def collect(run: Callable[[Observe], None], rows: int, rows_digest: str) -> Calibration:
    """Build the histograms of all activations that ``run`` shows: it is called twice and must show the same."""
    extremes: dict[str, tuple[float, float]] = {}

    def widen(name: str, values: NDArray[np.float32]) -> None:
        low, high = extremes.get(name, (np.inf, -np.inf))
        extremes[name] = (min(low, float(values.min())), max(high, float(values.max())))

    run(widen)
    counts = {name: np.zeros(BINS, np.int64) for name in extremes}

    def count(name: str, values: NDArray[np.float32]) -> None:
        counts[name] += np.histogram(values, bins=BINS, range=_nonempty(*extremes[name]))[0]

    run(count)
    histograms = {name: Histogram(*_nonempty(*extremes[name]), counts[name]) for name in extremes}
    return Calibration(histograms, rows, rows_digest)


def calibrate(graph: Path, token_ids: Sequence[Sequence[int]], rows_digest: str) -> Calibration:
    """Run tokenized rows, unpadded, through the fp32 ``graph`` of a classifier and collect its quantizable activations.

    Only activations with a row for each token count: what comes after pooling is a single row a
    text, costs nothing in fp32, and decides the answer.
    """
    return collect(lambda observe: show_activations(graph, token_ids, observe), len(token_ids), rows_digest)


def show_activations(graph: Path, token_ids: Sequence[Sequence[int]], observe: Observe) -> None:
    """Run tokenized rows, unpadded, through the fp32 ``graph`` of a classifier and show ``observe`` what goes into its
    linear layers, where that has a row for each token."""
    session, names = _session_with_activations(graph)
    for batch in equal_length_batches(token_ids):
        for name, values in _activations(session, names, batch):
            observe(name, values)


def clipped_range(histogram: Histogram, method: Method) -> tuple[float, float]:
    """The range that ``method`` keeps of a histogram; values beyond it saturate."""
    if method == "minmax":
        return histogram.low, histogram.high
    magnitudes, width = _magnitudes(histogram)
    if method == "percentile":
        cumulative = np.cumsum(magnitudes)
        kept = int(np.searchsorted(cumulative, cumulative[-1] * _PERCENTILE / 100)) + 1
    elif method == "entropy":
        kept = _least_divergence(magnitudes)
    else:
        kept = _least_squared_error(magnitudes, width)
    threshold = kept * width
    return max(histogram.low, -threshold), min(histogram.high, threshold)


def _magnitudes(histogram: Histogram) -> tuple[NDArray[np.float64], float]:
    """Fold a two-sided histogram to one of absolute values, BINS bins from 0; returns it and the bin width."""
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    centres = np.abs((edges[:-1] + edges[1:]) / 2)
    width = max(abs(histogram.low), abs(histogram.high)) / BINS
    bins = np.minimum((centres / width).astype(int), BINS - 1)
    return np.bincount(bins, weights=histogram.counts, minlength=BINS).astype(np.float64), width


def _least_divergence(magnitudes: NDArray[np.float64]) -> int:
    """How many bins to keep so that 128 levels lose the least information.

    Kullback-Leibler divergence between the clipped distribution and its quantized self (S.
    Migacz, "8-bit inference with TensorRT", GTC 2017).
    """
    best, kept = np.inf, BINS
    for size in range(_LEVELS, BINS + 1, 8):
        clipped = magnitudes[:size].copy()
        clipped[-1] += magnitudes[size:].sum()
        reference = magnitudes[:size]
        level = np.arange(size) * _LEVELS // size
        filled = reference > 0
        mass = np.bincount(level, weights=reference, minlength=_LEVELS)
        shares = np.bincount(level, weights=filled, minlength=_LEVELS)
        quantized = np.where(filled, (mass / np.maximum(shares, 1))[level], 0)
        divergence = _divergence(clipped, quantized)
        if divergence < best:
            best, kept = divergence, size
    return kept


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    if q.sum() == 0:
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    # Clipped mass may land where the quantized distribution has none: a small floor keeps that a
    # large, finite penalty.
    q = np.maximum(q, 1e-9)
    occupied = p > 0
    return float((p[occupied] * np.log(p[occupied] / q[occupied])).sum())


def _least_squared_error(magnitudes: NDArray[np.float64], width: float) -> int:
    """How many bins to keep so that rounding and clipping together cost the least squared error."""
    values = (np.arange(BINS) + 0.5) * width
    best, kept = np.inf, BINS
    for size in range(_LEVELS, BINS + 1, 8):
        scale = size * width / (_LEVELS - 1)
        quantized = np.minimum(np.rint(values / scale), _LEVELS - 1) * scale
        error = float((magnitudes * (values - quantized) ** 2).sum())
        if error < best:
            best, kept = error, size
    return kept


def _nonempty(low: float, high: float) -> tuple[float, float]:
    """A range that a histogram can be laid over, also where a tensor is constant."""
    return (low, high) if high > low else (low - 1e-6, low + 1e-6)


def _session_with_activations(graph: Path) -> tuple[ort.InferenceSession, list[str]]:
    model = onnx.load(graph)
    names = sorted({layer.activation for layer in linear_layers(model)})
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), names


def equal_length_batches(token_ids: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int64]]:
    """int64 [rows, length] without padding, bounded in tokens."""
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for ids in token_ids:
        by_length[len(ids)].append(ids)
    for length, rows in sorted(by_length.items()):
        size = max(1, _TOKENS_PER_BATCH // length)
        for start in range(0, len(rows), size):
            yield np.array(rows[start : start + size], np.int64)


def _activations(
    session: ort.InferenceSession, names: Sequence[str], input_ids: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    inputs = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}
    tokens = input_ids.size
    for name, values in zip(names, session.run(list(names), inputs)):
        if values.size // values.shape[-1] == tokens and (values.ndim > 2 or input_ids.shape[1] > 1):
            yield name, values
