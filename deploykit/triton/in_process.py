"""Our Triton backend without Triton: its ``model.py`` runs in this process, and batches as Triton's dynamic batcher does.

The backend asks Triton for tensors, errors and metrics through the module ``triton_python_backend_utils``, which Triton
alone has: here, what it uses of it. Requests that come while a batch runs form the next one; a translator's are handed
over as they come, and answered through their senders. What streams (NAME_stream) is for Triton.

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

from deploykit.errors import DeploykitError

log = logging.getLogger(__name__)

_MODULE = "triton_python_backend_utils"
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    """A name, and an array; BYTES are arrays of Python's bytes."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> NDArray[Any]:
        return self._array


class TritonError(Exception):
    """Why a request has no answer. ``code`` is one of those below."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class TritonModelException(Exception):
    """A model that cannot be loaded."""


class InferenceRequest:
    """Texts of each input, object [rows, 1] of bytes; the outputs wanted; request parameters. ``answer`` is what becomes of
    it."""

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
        return False  # a client that leaves is not noticed before its answer is written

    def get_response_sender(self) -> ResponseSender:
        return ResponseSender(self)


class ResponseSender:
    """Sends the one answer to a request, from any thread."""

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
    """Metrics, which nobody asks for without Triton."""

    COUNTER, GAUGE = range(2)

    def __init__(self, **described: Any) -> None:
        """Takes name, description and kind."""

    def Metric(self, labels: Mapping[str, str]) -> Metric:
        return Metric()


class Metric:
    def increment(self, value: float) -> None:
        """Counts nothing."""


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor:
    return Tensor(name, request.texts[name])


class InProcessModel:
    """Version ``version`` in ``folder``, behind its ``config`` (as Triton tells it in JSON); loaded when it is made.

    ``infer`` may be called from any thread; one thread runs the engine. Raises DeploykitError if it cannot be loaded.
    """

    config: Mapping[str, Any]

    def __init__(self, name: str, folder: Path, version: str, config: Mapping[str, Any]) -> None:
        self.name, self.version, self.config = name, version, config
        self.max_batch_size = int(config["max_batch_size"])
        policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
        self._queue: queue.Queue[InferenceRequest | None] = queue.Queue(int(policy.get("max_queue_size", 0)))
        self._model = _backend_module().TritonPythonModel()
        arguments = {"model_config": json.dumps(config), "model_repository": str(folder), "model_version": version}
        try:
            self._model.initialize(arguments)
        except TritonModelException as error:
            message, _, remedy = str(error).partition("\n  remedy: ")
            raise DeploykitError(message, remedy or None) from None
        self._thread = threading.Thread(target=self._work, name="deploykit-batches", daemon=True)
        self._thread.start()

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """Answers, or says in the response's error why there is none."""
        try:
            self._queue.put_nowait(request)
        except queue.Full:
            full = TritonError("Exceeds maximum queue size", TritonError.UNAVAILABLE)
            return InferenceResponse([], full)
        return request.answer.result()

    def close(self) -> None:
        """Answer what waits, and end."""
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
                responses = self._model.execute(batch) or ()  # None: they are answered later
            except Exception as error:  # one batch failed; the next may not
                log.exception("the model failed")
                failed = TritonError(f"the model failed on this request: {type(error).__name__}")
                responses = [InferenceResponse([], failed)] * len(batch)
            for request, response in zip(batch, responses):
                request.answer.set_result(response)
            item = item and self._queue.get()


def _backend_module() -> ModuleType:
    sys.modules.setdefault(_MODULE, sys.modules[__name__])
    return importlib.import_module("deploykit.triton.backend.model")
