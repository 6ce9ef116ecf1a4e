"""Requests that are valid but for some random faults: JSON bodies, bodies with binary tensors, and gRPC messages."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

from tritonclient.grpc import service_pb2

Request = service_pb2.ModelInferRequest
Tensor = Request.InferInputTensor

_NESTED: Any = json.loads("[" * 90 + "]" * 90)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 10**5000,
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "a", "1", "-1", "true", "NaN", "user", "\ud800", "😀", "é" * 3000, "w1 w2",
    [], [[]], [None], [1], ["a"], ["a", 1], [[1, 2], [3]], list(range(300)), _NESTED, {}, {"": ""}, {"a": {"b": [1]}}, {"type": "object"},
    {"role": "user", "content": "a"}, "BYTES", "INT64", "FP32", "BOOL", "FP16", "BF16", "UINT8", "TEXT",
)  # fmt: skip
"""What a field may be set to."""
NAMES = (
    "", "x", "\0", "é", "\ud800", "model", "input", "stream", "n", "seed", "stop", "top_k", "temperature", "max_tokens", "logprobs", "name",
    "shape", "data", "datatype", "parameters", "outputs", "id", "priority", "timeout", "sequence_id", "sequence_start", "binary_data_size",
    "shared_memory_region", "classification", "json_schema", "regex", "grammar", "choice", "best_of", "num_beams", "beam_size",
    "triton_enable_empty_final_response",
)  # fmt: skip
"""Names of fields that are added."""
_BYTES = (b"\xff", b"\xc3", b"\0", b'"', b"{", b"}", b",", b"\\u", b"\\ud83d", b"NaN", b"1e999", b"\x1b[0m", b"//")


class Mutator:
    """Makes faulty requests of valid ones, the same for the same ``seed``."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def body(self, valid: Any) -> bytes:
        """Return JSON with one to three other values, names or places, and sometimes with other bytes."""
        found = copy.deepcopy(valid)
        for _ in range(self._random.choice((1, 1, 1, 2, 3))):
            found = self._changed(found)
        raw = _json(found)
        return self._broken(raw) if self.chance(0.15) else raw

    def binary(self, valid: Any, tensor: bytes) -> tuple[bytes, str]:
        """Return a body whose one input has the bytes ``tensor`` behind the JSON, and what the header says is its length."""
        found = copy.deepcopy(valid)
        del found["inputs"][0]["data"]
        sizes = (len(tensor), 0, 1, 4, len(tensor) - 1, len(tensor) + 1, 2**31, 2**63, -1)
        found["inputs"][0]["parameters"] = {"binary_data_size": self._random.choice(sizes)}
        head = _json(self._changed(found)) if self.chance(0.6) else _json(found)
        if self.chance(0.7):
            tensor = self._tensor(tensor)
        size = len(head)
        length = self._random.choice(
            (*[size] * 12, 0, 1, size - 1, size + 1, size + len(tensor) + 1, -1, 2**32, "", "a")
        )
        return head + tensor, str(length)

    def message(self, valid: Request) -> Request:
        """Return a gRPC message of which one to three fields differ."""
        found = Request()
        found.CopyFrom(valid)
        for _ in range(self._random.choice((1, 1, 2, 3))):
            self._change_message(found)
        return found

    def name(self) -> str:
        return "".join(self._random.choices("abz09-_.~%/ é?#\\:", k=self._random.randrange(1, 30)))

    def _value(self) -> Any:
        return copy.deepcopy(self._random.choice(VALUES))

    def _changed(self, value: Any) -> Any:
        places = list(_places(value))
        if not places or self.chance(0.02):
            return self._value()
        holder, key = self._random.choice(places)
        what = self._random.randrange(10)
        if what < 6:
            holder[key] = self._value()
        elif what == 6:
            del holder[key]
        elif what == 7 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif isinstance(holder, dict):
            holder[self._random.choice(NAMES)] = self._value()
        else:
            holder[key] = [copy.deepcopy(holder[key])] * self._random.choice((1, 2, 200))
        return value

    def _broken(self, raw: bytes) -> bytes:
        at = self._random.randrange(len(raw) + 1)
        what = self._random.randrange(4)
        if what == 0:
            return raw[:at]
        if what == 1:
            return raw[:at] + self._random.choice(_BYTES) + raw[at:]
        if what == 2:
            return raw[:at] + self._random.choice(_BYTES) + raw[at + 1 :]
        return raw + self._random.choice((b"{}", b"]", b"\0", b"x", raw))

    def _tensor(self, raw: bytes) -> bytes:
        what = self._random.randrange(5)
        if what == 0:
            return raw[: self._random.randrange(len(raw) + 1)]
        if what == 1:  # the length before a text
            return struct.pack("<I", self._random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1))) + raw[4:]
        if what == 2:
            return raw + self._random.randbytes(self._random.randrange(1, 20))
        if what == 3:
            return self._random.randbytes(self._random.randrange(40))
        return raw[:4] + self._random.choice(_BYTES) + raw[4:]

    def _change_message(self, message: Request) -> None:
        what = self._random.randrange(12)
        numbers = (0, 1, -1, 2, 3, 64, 65, 10**9, 2**62, 2**63 - 1, -(2**63))
        tensor = self._random.choice(message.inputs) if message.inputs else message.inputs.add(name="TEXT")
        if what == 0:
            tensor.name = self._random.choice(("", "x", "TEXT", "text_input", "messages", "stream", "input_ids"))
        elif what == 1:
            tensor.datatype = self._random.choice(("", "x", "BYTES", "INT64", "BOOL", "FP32", "FP16", "BF16", "UINT8"))
        elif what == 2:
            del tensor.shape[:]
            tensor.shape.extend(self._random.choices(numbers, k=self._random.choice((0, 1, 1, 2, 2, 3, 60))))
        elif what == 3 and message.raw_input_contents:
            at = self._random.randrange(len(message.raw_input_contents))
            message.raw_input_contents[at] = self._tensor(message.raw_input_contents[at])
        elif what == 4:
            message.raw_input_contents.append(self._random.randbytes(self._random.randrange(20)))
        elif what == 5 and message.raw_input_contents:
            message.raw_input_contents.pop()
        elif what == 6:
            kind = self._random.choice([field.name for field in tensor.contents.DESCRIPTOR.fields])
            values = getattr(tensor.contents, kind)
            values.append(b"a" if kind == "bytes_contents" else self._random.choice((0, 1)))
        elif what == 7:
            holder = self._random.choice((message.parameters, tensor.parameters))
            self._set(holder[self._random.choice(NAMES).encode(errors="ignore").decode()])
        elif what == 8:
            output = message.outputs.add(
                name=self._random.choice(("", "x", "LABEL", "SCORES", "text_output", "ANSWER"))
            )
            if self.chance(0.5):
                self._set(
                    output.parameters[self._random.choice(("classification", "binary_data", "shared_memory_region"))]
                )
        elif what == 9:
            message.model_version = self._random.choice(("", "0", "1", "2", "-1", "a", "1" * 30))
        elif what == 10:
            message.id = self._random.choice(("", "a", "\0", "é" * 3000))
        else:
            message.inputs.add().CopyFrom(tensor) if self.chance(0.5) else message.inputs.pop()

    def _set(self, parameter: Any) -> None:
        kind = self._random.choice(("bool_param", "int64_param", "string_param", "double_param", "uint64_param"))
        values: dict[str, tuple[Any, ...]] = {
            "bool_param": (True, False), "int64_param": (0, 1, -1, 2**63 - 1, -(2**63)), "string_param": ("", "a", "1", "é\0"),
            "double_param": (0.5, -1.0, float("nan"), float("inf")), "uint64_param": (0, 1, 2**64 - 1),
        }  # fmt: skip
        setattr(parameter, kind, self._random.choice(values[kind]))


def _json(value: Any) -> bytes:
    """Return ``value`` as JSON, with half surrogate pairs as escapes and numbers of any length."""
    import sys

    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all places in ``value``: a list or an object, and an index or a name in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])
