"""Run the Triton backend without Triton: ``model.py`` in this process, with dynamic batching like Triton's.

The backend gets tensors, errors and metrics from the module ``triton_python_backend_utils``, which only Triton
provides. This module implements the part that the backend uses. Requests that arrive while a batch runs form the next
batch. A translator's requests are passed on as they arrive, and answered through their senders. NAME_stream needs
Triton.

Source: Triton Python backend README, "triton_python_backend_utils", "Decoupled mode", "Custom Metrics".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from deploykit.errors import DeploykitError, EngineError

log = logging.getLogger(__name__)

_MODULE = "triton_python_backend_utils"
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    """A named array. BYTES tensors are arrays of Python bytes."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class TritonError:
    """The error in a response, not raised, as in Triton. ``code`` is one of those below."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class TritonModelException(EngineError):
    """Raised when a model cannot be loaded."""


class InferenceRequest:
    """A request: texts of each input, object [rows, 1] of bytes; requested outputs; parameters. ``answer`` will hold
    the response."""

    def __init__(
        self, texts: Mapping[str, NDArray[Any]], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> None:
        self.texts, self._outputs, self._parameters = texts, tuple(outputs), json.dumps(parameters)
        self.rows = len(next(iter(texts.values())))
        self.answer: Future[InferenceResponse] = Future()

    def requested_output_names(self) -> tuple[str, ...]:
        return self._outputs

    def parameters(self) -> str:
        return self._parameters

    def is_cancelled(self) -> bool:
        return False  # a lost client is noticed only when the answer is written

    def get_response_sender(self) -> ResponseSender:
        return ResponseSender(self)


class ResponseSender:
    """Sends the response to a request, from any thread."""

    def __init__(self, request: InferenceRequest) -> None:
        self._request = request

    def send(self, response: InferenceResponse, flags: int) -> None:
        self._request.answer.set_result(response)


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


class Logger:
    log_error = staticmethod(log.error)


class MetricFamily:
    """A stand-in that discards metrics, because nothing reads them without Triton."""

    COUNTER, GAUGE = range(2)

    def __init__(self, **described: Any) -> None:
        """Accept name, description and kind."""

    def Metric(self, labels: Mapping[str, str]) -> Metric:
        return Metric()


class Metric:
    def increment(self, value: float) -> None:
        """Do nothing."""


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor:
    return Tensor(name, request.texts[name])


class InProcessModel:
    """Version ``version`` of the model in ``folder``, with its ``config`` (in Triton's JSON form). The constructor
    loads it.

    ``infer`` may be called from any thread; one thread runs the engine. Raises DeploykitError if the model cannot be
    loaded.
    """

    config: Mapping[str, Any]

    def __init__(self, name: str, folder: Path, version: str, config: Mapping[str, Any]) -> None:
        self.name, self.version, self.config = name, version, config
        self.max_batch_size = int(config["max_batch_size"])
        policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
        self._queue: queue.Queue[InferenceRequest | None] = queue.Queue(int(policy.get("max_queue_size", 0)))
        self._model = _backend_module().TritonPythonModel()
        arguments = {
            "model_name": name,
            "model_config": json.dumps(config),
            "model_repository": str(folder),
            "model_version": version,
        }
        try:
            self._model.initialize(arguments)
        except TritonModelException as error:
            message, _, remedy = str(error).partition("\n  remedy: ")
            raise DeploykitError(message, remedy or None) from None
        self._thread = threading.Thread(target=self._work, name="deploykit-batches", daemon=True)
        self._thread.start()

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Return the response, which holds the error if there is one."""
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            full = TritonError("Exceeds maximum queue size", TritonError.UNAVAILABLE)
            return InferenceResponse([], full)
        return request.answer.result()

    def close(self) -> None:
        """Answer the waiting requests, then stop."""
        self._queue.put(None)
        self._thread.join()
        self._model.finalize()

    def _work(self) -> None:
        item = self._queue.get()
        while item is not None:
            batch, rows = [item], item.rows
            with contextlib.suppress(queue.Empty):
                while rows < self.max_batch_size and (item := self._queue.get_nowait()) is not None:
                    batch.append(item)
                    rows += item.rows
            try:
                responses = self._model.execute(batch) or ()  # None: the backend answers them later
            except Exception as error:  # only this batch failed
                log.exception("the model failed")
                failed = TritonError(f"the model failed on this request: {type(error).__name__}")
                responses = [InferenceResponse([], failed)] * len(batch)
            for request, response in zip(batch, responses):
                request.answer.set_result(response)
            item = item and self._queue.get()


def _backend_module() -> ModuleType:
    sys.modules.setdefault(_MODULE, sys.modules[__name__])
    return importlib.import_module("deploykit.triton.backend.model")
