"""Parts of the Triton backend common to all tasks: config.pbtxt, texts of a request, refusals, output tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from deploykit.errors import DeploykitError, ServerError
from deploykit.hardware import threads_of_each
from deploykit.text import MAX_TEXT_CHARS

INPUT: Mapping[str, Any] = {"name": "TEXT", "data_type": "TYPE_STRING", "dims": [1]}
ERROR = "ERROR"
"""The output that says why a row has no answer."""

_MOST_BYTES = 2000
"""Maximum bytes of an error's message: gRPC clients lose an error of more than 8 KiB, which comes in trailing metadata, with three bytes
for each that is not ASCII."""


class RefusedError(ServerError):
    """Raised for a request that gets an error response. Other requests of the batch are not affected."""

    def __init__(self, message: str, code: Any = None) -> None:
        super().__init__(message)
        self._code = pb_utils.TritonError.INVALID_ARG if code is None else code

    def response(self) -> Any:
        """Return the error response. Its message may quote the request, which may contain any text."""
        message = str(self).encode(errors="backslashreplace")
        if len(message) > _MOST_BYTES:
            half = _MOST_BYTES // 2
            message = b"%b \xe2\x80\xa6 %b" % (message[:half], message[-half:])
        text = message.decode(errors="ignore")  # half a character at a cut
        return pb_utils.InferenceResponse([], error=pb_utils.TritonError(text, self._code))


class CancelledError(RefusedError):
    """Raised for a request that the client cancelled."""

    def __init__(self) -> None:
        super().__init__("the client cancelled the request", pb_utils.TritonError.CANCELLED)


class FailedError(RefusedError):
    """Raised when the model failed. The client learns only the type of ``error``; details go to the log."""

    def __init__(self, error: Exception) -> None:
        told = "its process has no memory left for it" if _out_of_memory(error) else type(error).__name__
        super().__init__(f"the model failed on this request: {told}", pb_utils.TritonError.INTERNAL)


def _out_of_memory(error: Exception) -> bool:
    # Each engine has its own exceptions.
    return isinstance(error, MemoryError) or re.search("bad_alloc|allocat.* memory", str(error)) is not None


class Rows:
    """The texts of one request in the input ``name``, with an error ("" for none) for each row.

    With ``pair``, the name of a second input, a row is the two texts that ``join`` makes one. Raises RefusedError when no
    row is valid, and when a row is not and the request does not want the output that says so.
    """

    def __init__(
        self,
        request: Any,
        name: str = INPUT["name"],
        *,
        pair: str = "",
        join: Callable[[str, str], str] = "{}{}".format,
    ) -> None:
        self._name, self._request = name, request
        self._texts, self.errors = _texts(request, name)
        if pair:
            others, errors = _texts(request, pair)
            if len(others) != len(self._texts):
                raise RefusedError(f"{name} has {len(self._texts)} rows and {pair} {len(others)}")
            self._texts = [join(text, other) for text, other in zip(self._texts, others)]
            self.errors = [one or two for one, two in zip(self.errors, errors)]
        self._choose()

    def fail(self, errors: Mapping[int, str]) -> None:
        """Set errors found later, by row number."""
        for row, error in errors.items():
            self.errors[row] = error
        self._choose()

    def _choose(self) -> None:
        self.good = [row for row, error in enumerate(self.errors) if not error]
        """Numbers of the rows without an error."""
        self.texts = [self._texts[row] for row in self.good]
        """Texts of the rows without an error."""
        if not self.good:
            raise RefusedError(
                f"row 0 of {self._name}: {self.errors[0]}" if self.errors else f"{self._name} has no rows"
            )
        if len(self.good) < len(self.errors) and ERROR not in self._request.requested_output_names():
            row, error = next((row, error) for row, error in enumerate(self.errors) if error)
            raise RefusedError(
                f"row {row} of {self._name}: {error}; request the output {ERROR} too, to get the answers of the other rows"
            )


def _texts(request: Any, name: str) -> tuple[list[str], list[str]]:
    """Return the texts of an input, and for each "" or why it is refused. Raises RefusedError for a request without the input."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise RefusedError(f"the input {name} is missing")
    texts, errors = [], []
    for value in tensor.as_numpy().reshape(-1).tolist():
        text = error = ""
        try:
            text = value.decode()
            if len(text) > MAX_TEXT_CHARS:
                error = f"the text has {len(text)} characters, the maximum is {MAX_TEXT_CHARS}"
        except UnicodeDecodeError as fault:
            error = f"the text is not UTF-8: byte {value[fault.start]:#04x} at position {fault.start}"
        texts.append(text)
        errors.append(error)
    return texts, errors


def parameters_of(request: Any) -> dict[str, Any]:
    """Return the request parameters that the client sent, without those for Triton. Raises RefusedError if they are not UTF-8.

    Triton makes parameters of what /generate gets besides the inputs, the request's id included.
    """
    try:
        text = request.parameters()
    except UnicodeDecodeError as fault:
        raise RefusedError(f"the name or the text of a parameter is not UTF-8: {fault.reason}") from None
    if text in ("", "{}"):
        return {}
    return {name: value for name, value in json.loads(text).items() if name != "id" and not name.startswith("triton_")}


def refuse_unknown(given: Iterable[str], known: Iterable[str], earlier: Collection[str] = ()) -> None:
    """Raise RefusedError for a parameter that is neither in ``known`` nor in ``earlier``, names that still work."""
    names = list(known)
    for name in given:
        if name not in names and name not in earlier:
            raise RefusedError(f"unknown parameter {name}: known ones are {', '.join(names)}")


def strings(name: str, values: Iterable[str]) -> Any:
    """Return an output tensor with one string per row."""
    return pb_utils.Tensor(name, np.array([[value.encode()] for value in values], np.object_))


def repeated(name: str, value: str, rows: int) -> Any:
    """Return an output tensor with the same string in each of ``rows``."""
    return strings(name, [value] * rows)


def numbers(name: str, values: Iterable[float], dtype: type[np.generic]) -> Any:
    """Return an output tensor with one number per row."""
    column: NDArray[Any] = np.array([[value] for value in values], dtype)
    return pb_utils.Tensor(name, column)


def text_parameter(config: Mapping[str, Any], name: str, default: str) -> str:
    """Return a parameter of config.pbtxt, or ``default``."""
    return str(config.get("parameters", {}).get(name, {}).get("string_value", default))


def number_parameter(config: Mapping[str, Any], name: str, default: int) -> int:
    """Return a whole number >= 0 from the parameters of config.pbtxt. Raises DeploykitError."""
    text = text_parameter(config, name, str(default))
    if not text.isascii() or not text.isdigit():
        raise DeploykitError(f"config.pbtxt: parameter {name} is {text!r}", "make it a whole number, 0 or more")
    return int(text)


def cpu_threads(config: Mapping[str, Any]) -> int:
    """Return the parameter ``threads``; if it is 0, the instance's share of the CPUs."""
    instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
    return number_parameter(config, "threads", 0) or threads_of_each(instances)
