"""Find the most probable tokens of each row with ONNX Runtime's kernels.

They are several times faster than numpy, and release the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.runtime.engines.onnxruntime import session_options

# Serialized ONNX models of one node each: y = LogSoftmax(x) and v, i = TopK(x, k), over the last of x's two axes (opset
# 17). They are constants because a serving machine has no onnx to build them with. A test compares them with onnx's
# own.
LOG_SOFTMAX = (
    b'\x08\x08\x12\x00:E\n\x12\n\x01x\x12\x01y"\nLogSoftmax\x12\x01gZ\x15\n\x01x\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12'
    b"\x01r\n\x03\x12\x01vb\x15\n\x01y\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01r\n\x03\x12\x01vB\x04\n\x00\x10\x11"
)
TOP_K = (
    b'\x08\x08\x12\x00:m\n\x12\n\x01x\n\x01k\x12\x01v\x12\x01i"\x04TopK\x12\x01gZ\x15\n\x01x\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01r\n\x03\x12\x01wZ\x0f\n\x01'
    b"k\x12\n\n\x08\x08\x07\x12\x04\n\x02\x08\x01b\x15\n\x01v\x12\x10\n\x0e\x08\x01\x12\n\n\x03\x12\x01r\n\x03\x12\x01nb\x15\n\x01i\x12\x10\n\x0e\x08\x07\x12\n\n\x03\x12\x01r\n\x03\x12\x01nB\x04\n\x00\x10\x11"
)
_IN_CACHE = 1 << 20  # values per run, so that they stay in the CPU's cache

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


class BestTokens:
    """``BestTokens`` on ``threads`` CPU threads. Not for concurrent calls.

    ``logits`` are float32 [rows, vocabulary]; no row depends on another.
    """

    def __init__(self, threads: int) -> None:
        options = session_options(threads, spin=True)
        self._log_softmax, self._top_k = (
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]) for model in (LOG_SOFTMAX, TOP_K)
        )
        self._scratch = np.empty(0, np.float32)
        self._binding = self._log_softmax.io_binding()
        self._bound: tuple[int, tuple[int, ...], int] | None = None

    def __call__(self, logits: Floats, k: int) -> tuple[Floats, Ints]:
        """Return the ``k`` best tokens of each row: log-probabilities, descending, and ids, [rows, k] each.

        Of equal logits the lower id comes first.
        """
        count = np.array([k], np.int64)
        parts = [self._top_k.run(None, {"x": part, "k": count}) for part in self._log_probabilities(logits)]
        if len(parts) == 1:
            return parts[0][0], parts[0][1]
        values, columns = zip(*parts)
        return np.concatenate(values), np.concatenate(columns)

    def of(self, logits: Floats, tokens: Ints) -> Floats:
        """Return the log-probability of one token of each row: float32 [rows]."""
        each = iter(tokens)
        return np.array([row[next(each)] for part in self._log_probabilities(logits) for row in part], np.float32)

    def log_sums(self, logits: Floats) -> Floats:
        """Return log(sum(exp(logits))) of each row, float32 [rows]: logits minus it are log-probabilities."""
        best = logits.argmax(axis=1)  # the most probable token loses the fewest bits
        highest: Floats = logits[np.arange(len(logits)), best]
        return highest - self.of(logits, best)

    def _log_probabilities(self, logits: Floats) -> Iterator[Floats]:
        """Yield log-probabilities of some rows at a time, each time in the same memory."""
        rows, width = logits.shape
        size = max(1, min(rows, _IN_CACHE // width))
        if self._scratch.size < size * width:
            self._scratch = np.empty(size * width, np.float32)
        for first in range(0, rows, size):
            part = np.ascontiguousarray(logits[first : first + size])
            result = self._scratch[: part.size].reshape(part.shape)
            # Logits are mostly in the same memory, and binding takes longer than a small softmax.
            if self._bound != (bound := (part.ctypes.data, part.shape, result.ctypes.data)):
                self._binding.bind_input("x", "cpu", 0, np.float32, part.shape, part.ctypes.data)
                self._binding.bind_output("y", "cpu", 0, np.float32, part.shape, result.ctypes.data)
                self._bound = bound
            self._log_softmax.run_with_iobinding(self._binding)
            yield result
