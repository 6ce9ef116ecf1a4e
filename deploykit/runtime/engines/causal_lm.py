"""A decoder-only language model on ONNX Runtime: graphs in the layout of optimum's ``text-generation-with-past``.

Source: optimum documentation, "Export a model to ONNX", task text-generation-with-past.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploykit.runtime.engines.onnxruntime import open_session, session_options


class CausalLm(Protocol):
    """A decoder-only language model with a KV cache.

    ``run`` feeds some tokens of each row after those of ``cache`` (None: an empty cache).
    """

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64], cache: Any, *, last: bool
    ) -> tuple[NDArray[np.float32], Any]:
        """Return logits, float32 [rows, tokens, vocabulary], or [rows, 1, vocabulary] of the ``last`` token only, and
        the cache with these tokens. ``ids`` and ``positions``: [rows, tokens]; ``mask``: [rows, past + tokens], 0 for
        padding, which is on the left."""

    def keep(self, cache: Any, rows: Sequence[int]) -> Any:
        """Return a cache with only these rows, in this order; a row may be repeated."""


class OnnxCausalLm:
    """``CausalLm`` on CPU threads. A cache is a list of OrtValues: keys and values of each layer in turn."""

    def __init__(self, graph: Path, threads: int) -> None:
        self._session = open_session(graph, session_options(threads))
        caches = [i for i in self._session.get_inputs() if i.name.startswith("past_key_values.")]
        self._pasts = [i.name for i in caches]
        self._presents = [name.replace("past_key_values", "present") for name in self._pasts]
        self._heads, self._size = (int(n) for n in (caches[0].shape[1], caches[0].shape[3]))

    def run(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64], cache: Any, *, last: bool
    ) -> tuple[NDArray[np.float32], list[ort.OrtValue]]:
        if cache is None:
            empty = np.zeros((len(ids), self._heads, 0, self._size), np.float32)
            cache = [ort.OrtValue.ortvalue_from_numpy(empty)] * len(self._pasts)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for name, v in inputs.items()}
        values.update(zip(self._pasts, cache))
        logits, *presents = self._session.run_with_ort_values(["logits", *self._presents], values)
        array = logits.numpy()
        return (array[:, -1:] if last else array), presents

    def keep(self, cache: list[ort.OrtValue], rows: Sequence[int]) -> list[ort.OrtValue]:
        return [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[list(rows)])) for value in cache]
