"""Map a language model's weight file, and set the pointers of the C library's structures."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import EngineError
from deploykit.runtime.engines.native.weights import ACTIVATIONS, LARGEST_HEAD, NormStruct, WeightFile

COLUMNS = 16
"""Columns of a matrix that are stored together."""
BLOCK = 32
"""Number of inputs that share a scale in INT4; all matrices are padded to a multiple of it."""
_KINDS = {"fp32": 1, "int8": 2, "int4": 3, "fp16": 4}
CACHES = ("fp16", "int8", "fp32")
"""Types of keys and values."""
_CACHE_BYTES = {"fp16": 2, "int8": 1, "fp32": 4}
_SCALE_BYTES = 8
"""Of a key and a value in INT8."""
_PARTS = {
    "fp32": ("weight", "bias"),
    "int8": ("weight", "bias", "scale", "signs", "offset"),
    "int4": ("weight", "bias", "scale", "low"),
}


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "scale", "low", "bias", "signs", "offset")),
        *((name, c_int32) for name in ("in_", "out", "kind", "together")),
    )  # fmt: skip


_MATRICES = ("qkv", "out", "up", "down")
_NORMS = ("attention_norm", "feed_forward_norm", "query_norm", "key_norm", "after_attention", "after_feed_forward")


class CausalLayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, MatrixStruct) for name in _MATRICES),
        *((name, NormStruct) for name in _NORMS),
        *((name, c_int32) for name in ("rope", "turned", "window", "gated", "parallel", "activation")),
    )


class CausalModelStruct(ctypes.Structure):
    _fields_ = (
        ("layer", POINTER(CausalLayerStruct)), ("embedding", MatrixStruct), ("head", MatrixStruct), ("norm", NormStruct),
        ("positions", c_void_p),
        *((name, c_int32) for name in ("layers", "hidden", "inner", "heads", "key_heads", "head_size", "cache")),
        *((name, c_float) for name in ("scale", "embedding_scale", "attention_cap", "logit_cap")),
    )  # fmt: skip


class CausalBatchStruct(ctypes.Structure):
    _fields_ = (
        ("rows", c_int32), ("wanted", c_int32), ("tokens", c_void_p), ("positions", c_void_p), ("slots", c_void_p),
        ("places", c_void_p), ("rope", c_void_p), ("keys", c_void_p), ("values", c_void_p),
        ("positions_of_slot", c_int64), ("logits", c_void_p),
    )  # fmt: skip


class CausalWeights(WeightFile):
    """A language model. ``longest``: number of learned positions, None for any. ``ropes``: frequencies, float32
    [channels / 2], and the scale of each table of rotations. ``cache``: type of keys and values, one of CACHES."""

    def _lay(self, model: Mapping[str, Any]) -> None:
        model = model["causal"]
        sizes = {name: int(model[name]) for name in ("hidden", "inner", "heads", "key_heads", "head_size")}
        hidden, size = sizes["hidden"], sizes["head_size"]
        if not 0 < size <= LARGEST_HEAD or min(sizes.values()) < 1 or sizes["heads"] % sizes["key_heads"]:
            raise ValueError(f"{sizes['heads']} heads of {size}, and {sizes['key_heads']} of keys")
        self.vocabulary, self.longest = int(model["vocabulary"]), model["longest"]
        self.key_heads, self.head_size, self.layers = sizes["key_heads"], size, len(model["layers"])
        self.ropes: list[tuple[NDArray[np.float32], float]] = [
            (np.array(rope["frequencies"], np.float32), float(rope["scale"])) for rope in model["ropes"]
        ]
        self.cache = model.get("cache", "fp16")  # older files lack it
        if self.cache not in CACHES:
            raise ValueError(f"keys and values are {self.cache!r}")
        if model["norm"] is None or (model["positions"] is None) != (self.longest is None):
            raise ValueError("the last norm or the learned positions are incomplete")
        layers = (CausalLayerStruct * self.layers)()
        for layer, given in zip(layers, model["layers"]):
            self._lay_layer(layer, given, **sizes)
        self._kept.append(layers)
        self.model = CausalModelStruct(
            layer=layers,
            embedding=self._matrix(model["embedding"], hidden, self.vocabulary),
            head=self._matrix(model["head"], hidden, self.vocabulary),
            norm=self._norm(model["norm"], hidden),
            positions=self._at(model["positions"], np.float32, hidden * (self.longest or 0)),
            layers=self.layers,
            cache=_KINDS[self.cache],
            **sizes,
            **{name: model[name] for name in ("scale", "embedding_scale", "attention_cap", "logit_cap")},
        )
        if self.model.embedding.kind == _KINDS["int4"]:
            raise ValueError("the embedding is INT4")

    def _lay_layer(
        self, layer: CausalLayerStruct, given: Mapping[str, Any], *, hidden: int, inner: int, heads: int, key_heads: int,
        head_size: int,
    ) -> None:  # fmt: skip
        width = heads * head_size
        panels = -(-inner // COLUMNS) * COLUMNS
        shapes = {
            "qkv": (hidden, (heads + 2 * key_heads) * head_size), "out": (width, hidden), "down": (inner, hidden),
            "up": (hidden, 2 * panels if given["gated"] else inner),
        }  # fmt: skip
        for name in _MATRICES:
            setattr(layer, name, self._matrix(given[name], *shapes[name]))
        for name in _NORMS:
            setattr(layer, name, self._norm(given[name], head_size if name in ("query_norm", "key_norm") else hidden))
        if not (layer.attention_norm.gamma and layer.feed_forward_norm.gamma):
            raise ValueError("a layer lacks a norm")
        layer.rope, layer.window = int(given["rope"]), int(given["window"])
        layer.gated, layer.parallel = int(given["gated"]), int(given["parallel"])
        layer.activation = ACTIVATIONS.index(given["activation"])
        if layer.rope >= len(self.ropes):
            raise ValueError(f"there is no table {layer.rope} of rotations")
        if layer.rope >= 0:
            layer.turned = len(self.ropes[layer.rope][0])
            if 2 * layer.turned > head_size:
                raise ValueError(f"{2 * layer.turned} of {head_size} channels are rotated")

    def _matrix(self, given: Mapping[str, Any], inputs: int, outputs: int) -> MatrixStruct:
        if (given["in"], given["out"]) != (inputs, outputs):
            raise ValueError(f"a matrix is {given['in']} x {given['out']}, not {inputs} x {outputs}")
        rows, columns = -(-inputs // BLOCK) * BLOCK, -(-outputs // COLUMNS) * COLUMNS
        kind = given["kind"]
        if kind == "int8" and "signs" not in given:
            raise EngineError(f"{self.path}: an earlier version of deploykit wrote this file", "export the model again")
        if any(given[part] is None for part in _PARTS[kind]):
            raise ValueError("a matrix lacks a part")
        matrix = MatrixStruct(in_=inputs, out=outputs, kind=_KINDS[kind])
        matrix.bias = self._at(given["bias"], np.float32, columns)
        if kind == "fp32":
            matrix.weight = self._at(given["weight"], np.float32, rows * columns)
        elif kind == "int8":
            matrix.weight = self._at(given["weight"], np.int8, rows * columns)
            matrix.scale = self._at(given["scale"], np.float32, columns)
            matrix.signs = self._at(given["signs"], np.float32, rows)
            matrix.offset = self._at(given["offset"], np.int32, columns)
            matrix.together = together = int(given["together"])
            if together < BLOCK or together & (together - 1) or rows % together:
                raise ValueError(f"{together} of {rows} inputs are transformed together")
        else:
            matrix.weight = self._at(given["weight"], np.uint8, rows * columns // 2)
            matrix.scale = self._at(given["scale"], np.uint16, rows * columns // BLOCK)
            matrix.low = self._at(given["low"], np.uint16, rows * columns // BLOCK)
        return matrix

    @property
    def head_bytes(self) -> tuple[int, int]:
        """Bytes of a key and of a value of one head in the caches."""
        value_bytes = -(-self.head_size // 16) * 16 * _CACHE_BYTES[self.cache]
        return value_bytes + (_SCALE_BYTES if self.cache == "int8" else 0), value_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the caches."""
        return self.layers * self.key_heads * sum(self.head_bytes)

    @property
    def quantized_matrices(self) -> int:
        """Number of INT8 and INT4 matrices, the embedding left out."""
        layers = [self.model.layer[i] for i in range(self.layers)]
        all_of_them = [getattr(layer, name) for layer in layers for name in _MATRICES] + [self.model.head]
        return sum(matrix.kind != _KINDS["fp32"] for matrix in all_of_them)
