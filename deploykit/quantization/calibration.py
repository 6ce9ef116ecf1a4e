"""Calibrate: find the range of each quantized activation from real rows that run through the fp32 graph.

There are two passes. The first finds each tensor's exact minimum and maximum, the second fills a histogram between
them. Rows of equal length run together, so padding positions are never counted.

ONNX Runtime's histogram calibrators keep the activations of all rows in memory until they compute the ranges.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from deploykit.artifacts import MANIFEST, load_manifest
from deploykit.errors import ArtifactError, CorruptArtifactError, DataError, ExportError, first_line
from deploykit.peak_memory import PeakMemory
from deploykit.quantization.qdq import Ranges

Method = Literal["minmax", "entropy", "percentile", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 2048
_TOKENS_PER_BATCH = 1024  # bounds the activations in memory at once
_LEVELS = 128  # magnitudes of INT8
_PERCENTILE = 99.99
_HISTOGRAMS = "calibration.npz"
_SHOWN = 80

Row = TypeVar("Row")


@dataclass(frozen=True)
class Histogram:
    """A histogram: ``counts`` int64 [BINS] over equal bins from ``low`` to ``high``, the tensor's exact extremes."""

    low: float
    high: float
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Calibration:
    """Histograms of each activation over real rows, which ``rows_digest`` identifies.

    Collecting them took ``seconds``; the process used up to ``peak_memory_mb`` (1e6 bytes), including what it had
    loaded before.
    """

    histograms: Mapping[str, Histogram]
    rows: int
    rows_digest: str
    seconds: float
    peak_memory_mb: float

    def ranges(self, method: Method) -> dict[str, tuple[float, float]]:
        """Return tensor name -> (low, high), the range chosen by ``method``."""
        return {name: clipped_range(histogram, method) for name, histogram in self.histograms.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything but the histograms."""
        return {
            "rows": self.rows,
            "rows_digest": self.rows_digest,
            "seconds": self.seconds,
            "peak_memory_mb": self.peak_memory_mb,
        }

    def save(self, folder: Path) -> None:
        """Write the histograms to calibration.npz."""
        names = list(self.histograms)
        np.savez_compressed(
            folder / _HISTOGRAMS,
            names=np.array(names),
            low=np.array([self.histograms[n].low for n in names]),
            high=np.array([self.histograms[n].high for n in names]),
            counts=np.stack([self.histograms[n].counts for n in names]),
        )

    def save_ranges(self, folder: Path, method: str, ranges: Ranges) -> None:
        """Write the ``ranges`` chosen by ``method`` to calibration.json."""
        record = {
            "method": method,
            "rows": self.rows,
            "rows_digest": self.rows_digest,
            "ranges": {name: list(pair) for name, pair in ranges.items()},
        }
        (folder / "calibration.json").write_text(json.dumps(record, indent=1) + "\n")

    def told(self, method: Method) -> str:
        """Return a summary line."""
        return (
            f"ranges of {len(self.histograms)} tensors by {method}, from {self.rows:,} rows, collected in "
            f"{self.seconds:.1f} s and at most {self.peak_memory_mb:,.0f} MB"
        )

    def check(self, activations: Collection[str]) -> None:
        """Raise ArtifactError for a tensor that is not one of a graph's ``activations``."""
        if foreign := sorted(set(self.histograms) - set(activations)):
            raise ArtifactError(
                f"the calibration has the tensor {foreign[0]}, which is not an input of any linear layer of this checkpoint's graph",
                "run deploykit calibrate again",
            )


def is_saved(calibration: str) -> bool:
    """Return whether ``calibration`` is an artifact rather than the name of rows."""
    return (Path(calibration) / MANIFEST).is_file()


def load_calibration(folder: Path, parent: str) -> Calibration:
    """Load an artifact of ``deploykit calibrate``.

    Raises ArtifactError if it is of another checkpoint than the one with the digest ``parent``.
    """
    manifest = load_manifest(folder, "calibration")
    if manifest.parent != parent:
        raise ArtifactError(
            f"{folder}: is a calibration of another checkpoint ({manifest.parent}, not {parent})",
            "collect one of this checkpoint with deploykit calibrate, or leave --calib out",
        )
    try:
        with (folder / _HISTOGRAMS).open("rb") as file, np.load(file) as arrays:
            names, low, high, counts = (arrays[key] for key in ("names", "low", "high", "counts"))
        histograms = {str(name): Histogram(float(low[i]), float(high[i]), counts[i]) for i, name in enumerate(names)}
    except Exception as error:  # NumPy raises whatever zipfile and zlib raise
        raise CorruptArtifactError(
            f"{folder / _HISTOGRAMS}: cannot be read ({first_line(error)})", "run deploykit calibrate again"
        ) from error
    return Calibration(
        histograms, *(manifest.metrics[key] for key in ("rows", "rows_digest", "seconds", "peak_memory_mb"))
    )


class NotFiniteError(DataError):
    """The error of a calibration ``row``, in words, for which the model computes NaN or infinity in ``layer``."""

    def __init__(self, row: str, layer: str) -> None:
        self.layer = layer
        super().__init__(
            f"the fp32 model computes NaN or infinity for {row} ({layer}), and INT8 would hide it",
            "deploykit evaluate CHECKPOINT --data FILE names all such rows: leave them out, or train the model again",
        )


Observe = Callable[[str, NDArray[np.float32]], None]
"""Called with the name of an activation and its values, without padding positions."""


def collect(run: Callable[[Observe], None], rows: int, rows_digest: str) -> Calibration:
    """Build the histograms of all activations that ``run`` observes. ``run`` is called twice and must observe the same.

    Raises ExportError if there are none, and NotFiniteError if one has NaN or infinity.
    """
    extremes: dict[str, tuple[float, float]] = {}

    def widen(name: str, values: NDArray[np.float32]) -> None:
        least, most = float(values.min()), float(values.max())  # NaN if any is
        if not (math.isfinite(least) and math.isfinite(most)):
            raise NotFiniteError("a calibration row", name)
        low, high = extremes.get(name, (np.inf, -np.inf))
        extremes[name] = (min(low, least), max(high, most))

    def count(name: str, values: NDArray[np.float32]) -> None:
        counts[name] += np.histogram(values, bins=BINS, range=_nonempty(*extremes[name]))[0]

    started = time.monotonic()
    with PeakMemory(None) as memory:
        run(widen)
        if not extremes:
            raise ExportError(
                "no layer can be quantized: the graph has no MatMul or Gemm with a constant weight before pooling",
                "export without --int8; INT8 is not supported for this architecture",
            )
        counts = {name: np.zeros(BINS, np.int64) for name in extremes}
        run(count)
    histograms = {name: Histogram(*_nonempty(*extremes[name]), counts[name]) for name in extremes}
    seconds = round(time.monotonic() - started, 2)
    return Calibration(histograms, rows, rows_digest, seconds, round(memory.peak_mb or 0.0, 1))


def calibrate_named(calibrate: Callable[[Sequence[Row]], Calibration], rows: Sequence[Row]) -> Calibration:
    """Return ``calibrate(rows)``. If one row alone causes a NotFiniteError, the error names the row by its ``origin``, or by the
    beginning of its text."""
    try:
        return calibrate(rows)
    except NotFiniteError as error:
        layer, some = error.layer, rows
        while len(some) > 1:
            half = len(some) // 2
            some = some[:half] if _is_refused(calibrate, some[:half]) else some[half:]
        if not _is_refused(calibrate, some):
            raise  # only several rows together
        row = getattr(some[0], "origin", None) or repr(some[0])[:_SHOWN]
        raise NotFiniteError(f"the calibration row {row}", layer) from None


def _is_refused(calibrate: Callable[[Sequence[Row]], Calibration], rows: Sequence[Row]) -> bool:
    try:
        calibrate(rows)
    except NotFiniteError:
        return True
    except DataError:  # so few rows may not suffice
        return False
    return False


def clipped_range(histogram: Histogram, method: Method) -> tuple[float, float]:
    """Return the range that ``method`` chooses for a histogram. Values outside saturate."""
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
    """Fold a histogram to absolute values, BINS bins from 0. Returns it and the bin width."""
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    centres = np.abs((edges[:-1] + edges[1:]) / 2)
    width = max(abs(histogram.low), abs(histogram.high)) / BINS
    bins = np.minimum((centres / width).astype(int), BINS - 1)
    return np.bincount(bins, weights=histogram.counts, minlength=BINS).astype(np.float64), width


def _least_divergence(magnitudes: NDArray[np.float64]) -> int:
    """Return the number of bins to keep so that 128 levels lose the least information.

    It minimizes the Kullback-Leibler divergence between the clipped distribution and its quantized form (S. Migacz,
    "8-bit inference with TensorRT", GTC 2017).
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
    # Clipped mass may fall into bins where the quantized distribution is 0. A small floor keeps the divergence large
    # but finite.
    q = np.maximum(q, 1e-9)
    occupied = p > 0
    return float((p[occupied] * np.log(p[occupied] / q[occupied])).sum())


def _least_squared_error(magnitudes: NDArray[np.float64], width: float) -> int:
    """Return the number of bins to keep so that rounding and clipping together have the least squared error."""
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
    """Widen a range of zero width, so that a histogram of a constant tensor is possible."""
    return (low, high) if high > low else (low - 1e-6, low + 1e-6)


def equal_length_batches(token_ids: Sequence[Sequence[int]]) -> Iterator[NDArray[np.int64]]:
    """Yield batches int64 [rows, length] without padding, bounded in tokens."""
    for rows in equal_length_rows(token_ids):
        yield np.array([token_ids[row] for row in rows], np.int64)


def equal_length_rows(token_ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the numbers of rows that ``equal_length_batches`` runs together."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for row, ids in enumerate(token_ids):
        by_length[len(ids)].append(row)
    for length, rows in sorted(by_length.items()):
        size = max(1, _TOKENS_PER_BATCH // length)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
