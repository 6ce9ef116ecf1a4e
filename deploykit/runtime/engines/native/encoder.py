"""Run INT8 encoders (classifiers, question answering) with deploykit's own engine, the C code in ``csrc/``."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, byref, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.native.loader import open_library
from deploykit.runtime.engines.native.weights import EncoderWeights, HeadStruct, StackStruct


def _library() -> ctypes.CDLL:
    library = open_library()
    library.deploykit_new_classifier.restype = c_void_p
    library.deploykit_new_classifier.argtypes = (POINTER(StackStruct), POINTER(HeadStruct), ctypes.c_int)
    library.deploykit_classify.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, ctypes.c_int, c_void_p)
    return library


class NativeEngine:
    """An encoder on the engine ``native``. It does not compute padding. A text's result depends neither on the rest of the
    batch nor on the number of threads.

    ``run`` returns logits [texts, labels]; for a head of every token an array [texts, padded length] for each of its outputs,
    0 at padding.
    """

    computes_padding = False

    def __init__(self, graph: Path, threads: int, device: int = 0) -> None:
        self._library = _library()
        self._weights = EncoderWeights(graph)
        # With a head for every token, each thread computes whole texts, and has little left to wait for at a call's end. Other
        # calls are not faster with more tokens, which would take hundreds of MB for intermediate results.
        self.token_budget = 16384 if self._weights.by_token else 1024
        self._context = self._library.deploykit_new_classifier(
            byref(self._weights.encoder), byref(self._weights.head), threads
        )
        if not self._context:
            raise EngineError("there is not enough memory for another model", "close other programs")

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._library.deploykit_free(self._context)
            self._context = None

    def run(self, inputs: Mapping[str, NDArray[np.int64]]) -> list[NDArray[Any]]:
        mask = inputs["attention_mask"] != 0
        ids = inputs["input_ids"][mask]
        lengths = mask.sum(axis=1)
        starts = np.zeros(len(mask) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        types = inputs["token_type_ids"][mask] if "token_type_ids" in inputs else np.zeros_like(ids)
        self._check(ids, lengths, types)
        if self._weights.padding is None:
            position = np.cumsum(mask, axis=1) - 1
        else:  # also if a text contains the padding token
            counted = mask & (inputs["input_ids"] != self._weights.padding)
            position = np.cumsum(counted, axis=1) * counted
        places = (position[mask] + types * self._weights.places).astype(np.int32)
        logits = np.empty((len(ids) if self._weights.by_token else len(mask), self._weights.labels), np.float32)
        if not self._library.deploykit_classify(
            self._context, ids.ctypes.data, places.ctypes.data, starts.ctypes.data, len(mask), logits.ctypes.data
        ):
            raise EngineError("there is not enough memory for this batch", "close other programs")
        if not self._weights.by_token:
            return [logits]
        padded = np.zeros((self._weights.labels, *mask.shape), np.float32)
        padded[:, mask] = logits.T
        return list(padded)

    def int8_kernels(self) -> int:
        return self._weights.int8_layers

    def _check(self, ids: NDArray[np.int64], lengths: NDArray[np.int64], types: NDArray[np.int64]) -> None:
        """Refuse tokens and positions outside the model's tables: the library does not check them."""
        w = self._weights
        if not 0 <= types.min(initial=0) <= types.max(initial=0) < w.types:
            raise EngineError(f"a token's type is not one of the model's {w.types}", "export the model again")
        if lengths.min() < 1 or lengths.max() > w.longest:
            raise EngineError(f"the model knows texts of 1 to {w.longest} tokens", "lower max_length")
        if not 0 <= ids.min() <= ids.max() < w.vocabulary:
            raise EngineError(f"a token is not one of the model's {w.vocabulary}", "export the model again")
