"""Map a weight file of the engine ``native``, and set the pointers of the C library's structures.

Format: safetensors (length of the header, JSON header, tensors).
"""

from __future__ import annotations

import ctypes
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import CorruptArtifactError, EngineError

FORMAT = "deploykit-native-1"
"""Format version in the file's metadata; change it together with the library."""
PANEL = 64
"""Number of a linear layer's columns that are stored together."""
ALIGNMENT = 64
_TYPES = {"I8": np.int8, "U8": np.uint8, "U16": np.uint16, "I32": np.int32, "F32": np.float32}
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu by tanh", "tanh")
LARGEST_HEAD = 256


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p), ("scale", c_void_p), ("offset", c_void_p), ("bias", c_void_p),
        ("in_", c_int32), ("out", c_int32), ("is_float", c_int32),
    )  # fmt: skip


class NormStruct(ctypes.Structure):
    _fields_ = (("gamma", c_void_p), ("beta", c_void_p), ("epsilon", c_float))


class LayerStruct(ctypes.Structure):
    _fields_ = (
        *((name, LinearStruct) for name in ("qkv", "out", "cross_query", "cross_out", "up", "gate", "down")),
        *((name, NormStruct) for name in ("attention_norm", "cross_norm", "feed_forward_norm")),
    )


class StackStruct(ctypes.Structure):
    _fields_ = (
        ("embedding", c_void_p), ("embedding_scale", c_void_p), ("positions", c_void_p), ("bias", c_void_p),
        ("layer", POINTER(LayerStruct)), ("embedding_norm", NormStruct), ("last_norm", NormStruct), ("last", LinearStruct),
        ("scale", c_float), ("output_scale", c_float), ("layers", c_int32), ("hidden", c_int32), ("heads", c_int32),
        ("head_size", c_int32), ("pre_norm", c_int32), ("activation", c_int32), ("distances", c_int32),
        ("zero_distance", c_int32),
    )  # fmt: skip


class HeadStruct(ctypes.Structure):
    _fields_ = (("out", LinearStruct), ("activation", c_int32))


class WeightFile(ABC):
    """A memory-mapped weight file. Raises EngineError or CorruptArtifactError naming the file that cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            (length,) = struct.unpack("<Q", self._bytes[:8].tobytes())
            header = json.loads(self._bytes[8 : 8 + length].tobytes())
            metadata = header.pop("__metadata__")
            self._begin = 8 + length
            self._tensors: Mapping[str, Any] = header
            if metadata["format"] != FORMAT:
                raise EngineError(f"{path}: is of the format {metadata['format']}, not {FORMAT}", "export it again")
            self._kept: list[Any] = []
            self._lay(json.loads(metadata["model"]))
        except OSError as error:
            raise EngineError(f"{path}: {error.strerror or error}", "export it again") from error
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise CorruptArtifactError(
                f"{path}: is not a weight file: {type(error).__name__} {error}", "export it again"
            ) from error

    @abstractmethod
    def _lay(self, model: Mapping[str, Any]) -> None:
        """Point the structures of ``model`` at the tensors. Raises ValueError or KeyError if they do not fit."""

    def _stack(self, model: Mapping[str, Any]) -> StackStruct:
        layers = (LayerStruct * len(model["layers"]))()
        for layer, given in zip(layers, model["layers"]):
            for name in (field[0] for field in LayerStruct._fields_):
                if name.endswith("norm"):
                    setattr(layer, name, self._norm(given.get(name), model["hidden"]))
                else:
                    setattr(layer, name, self._linear(given.get(name)))
        self._kept.append(layers)
        if not 0 < model["head_size"] <= LARGEST_HEAD:
            raise ValueError(f"heads of {model['head_size']}")
        _check_shapes(model)
        tokens = model["vocabulary"]
        return StackStruct(
            embedding=self._at(model["embedding"], np.int8, tokens * model["hidden"]),
            embedding_scale=self._at(model["embedding_scale"], np.float32, tokens),
            positions=self._at(model["positions"], np.float32, model["hidden"] * (model["longest"] or 0) * model.get("types", 1)),
            bias=self._at(model["bias"], np.float32, model["heads"] * model["distances"]),
            layer=layers,
            embedding_norm=self._norm(model["embedding_norm"], model["hidden"]),
            last_norm=self._norm(model["last_norm"], model["hidden"]),
            last=self._linear(model["last"]),
            activation=ACTIVATIONS.index(model["layers"][0]["activation"]),
            layers=len(layers),
            **{
                name: model[name]
                for name in ("scale", "output_scale", "hidden", "heads", "head_size", "pre_norm", "distances",
                             "zero_distance")
            },
        )  # fmt: skip

    def _linear(self, given: Mapping[str, Any] | None) -> LinearStruct:
        if given is None:
            return LinearStruct()
        inputs, outputs = given["in"], given["out"]
        columns = -(-outputs // PANEL) * PANEL
        linear = LinearStruct(in_=inputs, out=outputs, bias=self._at(given["bias"], np.float32, columns))
        if "scale" not in given:
            linear.weight, linear.is_float = self._at(given["weight"], np.float32, columns * inputs), 1
            return linear
        linear.weight = self._at(given["weight"], np.int8, columns * (-(-inputs // 4) * 4))
        linear.scale = self._at(given["scale"], np.float32, columns)
        linear.offset = self._at(given["offset"], np.int32, columns)
        return linear

    def _norm(self, given: Mapping[str, Any] | None, hidden: int) -> NormStruct:
        if given is None:
            return NormStruct()
        gamma, beta = (self._at(given[name], np.float32, hidden) for name in ("gamma", "beta"))
        return NormStruct(gamma, beta, given["epsilon"])

    def _at(self, name: str | None, kind: type[Any], least: int) -> int | None:
        """Return the address of a tensor of at least ``least`` values. Raises ValueError for a smaller one."""
        if name is None:
            return None
        tensor = self._tensors[name]
        first, last = tensor["data_offsets"]
        if (
            _TYPES[tensor["dtype"]] is not kind
            or not 0 <= first <= last <= len(self._bytes) - self._begin
            or (self._begin + first) % ALIGNMENT
            or last - first < least * np.dtype(kind).itemsize
        ):
            raise ValueError(f"the tensor {name} is truncated")
        address: int = self._bytes.ctypes.data + self._begin + first
        return address


class Weights(WeightFile):
    """Encoder and decoder of a translator. ``longest``: largest number of positions, None for any."""

    def _lay(self, model: Mapping[str, Any]) -> None:
        self.encoder, self.decoder = self._stack(model["encoder"]), self._stack(model["decoder"])
        self.source_vocabulary: int = model["encoder"]["vocabulary"]
        self.vocabulary: int = model["decoder"]["vocabulary"]
        self.longest = tuple(model[name]["longest"] for name in ("encoder", "decoder"))
        width = model["decoder"]["heads"] * model["decoder"]["head_size"]
        cross = 2 * len(model["decoder"]["layers"]) * width
        if model["encoder"]["last"]["out"] != cross or model["decoder"]["last"]["out"] != self.vocabulary:
            raise ValueError("encoder and decoder do not fit")


class EncoderWeights(WeightFile):
    """An encoder and its head.

    ``longest``: number of positions of each of its ``types`` of tokens, which have ``places`` rows each. ``padding``: the
    token that has row 0 and no position; None if there is none. ``by_token``: the head gives ``labels`` logits
    for every token, otherwise for each text.
    """

    def _lay(self, model: Mapping[str, Any]) -> None:
        encoder, head = model["encoder"], model["head"]
        self.encoder = self._stack(encoder)
        self.by_token = head is None
        self.head = HeadStruct()
        if head is not None:
            self.head = HeadStruct(self._linear(head["out"]), ACTIVATIONS.index(head["activation"]))
        self.vocabulary: int = encoder["vocabulary"]
        self.places: int = encoder["longest"]
        self.padding: int | None = encoder.get("padding")
        self.longest = self.places - (self.padding is not None)
        self.types: int = encoder.get("types", 1)
        self.labels: int = encoder["last"]["out"] if head is None else head["out"]["out"]
        if head is not None and head["out"]["in"] != encoder["last"]["out"]:
            raise ValueError("the head's layers do not fit")
        if encoder["pre_norm"] or not (self.longest > 0 and encoder["embedding_norm"]):
            raise ValueError("is not an encoder of this kind")

    @property
    def int8_layers(self) -> int:
        """Number of INT8 linear layers."""
        return _int8_layers(self.encoder)


def _check_shapes(model: Mapping[str, Any]) -> None:
    """Raise ValueError if a layer's outputs do not match the next one's inputs: the library would read out of
    bounds."""
    hidden, width = model["hidden"], model["heads"] * model["head_size"]
    for layer in model["layers"]:
        inner = layer["up"]["out"]
        expected = {"qkv": (hidden, 3 * width), "out": (width, hidden), "up": (hidden, inner), "gate": (hidden, inner),
                    "down": (inner, hidden), "cross_query": (hidden, width), "cross_out": (width, hidden)}  # fmt: skip
        for name, shape in expected.items():
            if (given := layer.get(name)) and (given["in"], given["out"]) != shape:
                raise ValueError(f"{name} is {given['in']} x {given['out']}")
        if inner != model["layers"][0]["up"]["out"]:
            raise ValueError("layers are of different widths")
        if not {"qkv", "out", "up", "down"} <= set(layer):
            raise ValueError("a layer lacks a part")
    if model["last"]["in"] != hidden:
        raise ValueError(f"last is {model['last']['in']} x {model['last']['out']}")


def int8_layers(path: Path) -> int:
    """Return the number of INT8 linear layers in a translator's weight file."""
    weights = Weights(path)
    return _int8_layers(weights.encoder) + _int8_layers(weights.decoder)


def _int8_layers(stack: StackStruct) -> int:
    names = [name for name, kind, *_ in LayerStruct._fields_ if kind is LinearStruct]
    linear = [getattr(stack.layer[i], name) for i in range(stack.layers) for name in names]
    return sum(bool(each.weight) and not each.is_float for each in (*linear, stack.last))
