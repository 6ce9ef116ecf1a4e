"""Stream a document's translation sentence by sentence: the backend of NAME_stream, which calls the model NAME.

It has no weights. It splits the document, requests all sentences from the other model at once, so that they are decoded
together, and sends them in order, each as soon as it and those before it are done.

Source: Triton Python backend README, "Business Logic Scripting" and "Decoupled mode".
"""

from __future__ import annotations

import asyncio
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from deploykit.artifacts import Manifest
from deploykit.errors import DataError
from deploykit.runtime.triton_decoding import send_last
from deploykit.runtime.triton_messages import QUEUE_FULL, RELOADING
from deploykit.runtime.triton_requests import INPUT, CancelledError, FailedError, RefusedError, Rows, parameters_of
from deploykit.tasks.translation.facts import Translation
from deploykit.tasks.translation.sentences import split_sentences
from deploykit.tasks.translation.source_prefix import cut_code
from deploykit.text import normalize

_AHEAD = 32  # most sentences of a document in the other model's queue, which all requests share
_OF_SENTENCE = ("TRANSLATION", "SCORE", "SOURCE_TOKENS", "TARGET_TOKENS", "FINISH")


class StreamBackend:
    inputs: Sequence[Mapping[str, Any]] = (INPUT,)
    outputs: Sequence[Mapping[str, Any]] = (
        {"name": "TRANSLATION", "data_type": "TYPE_STRING", "dims": [1]},
        {"name": "INDEX", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "FINAL", "data_type": "TYPE_BOOL", "dims": [1]},
        {"name": "SCORE", "data_type": "TYPE_FP32", "dims": [1]},
        {"name": "SOURCE_TOKENS", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "TARGET_TOKENS", "data_type": "TYPE_INT32", "dims": [1]},
        {"name": "FINISH", "data_type": "TYPE_STRING", "dims": [1]},
    )

    def __init__(self, config: Mapping[str, Any], folder: Path, manifest: Manifest, device: int) -> None:
        assert isinstance(manifest.task, Translation)
        self._task = manifest.task
        self._model = str(manifest.options["streams"])

    async def execute(self, requests: Sequence[Any]) -> None:
        await asyncio.gather(*map(self._answer, requests))

    def close(self) -> None:
        """Do nothing: Triton waits for the streams."""

    async def _answer(self, request: Any) -> None:
        sender = request.get_response_sender()
        failed = None
        try:
            await self._stream(request, sender)
        except RefusedError as refusal:
            failed = refusal
        except Exception as error:
            pb_utils.Logger.log_error(traceback.format_exc())
            failed = FailedError(error)
        # An error must be the last response: without the guard, an error before another response crashes Triton 2.51 if the
        # client asks for gRPC's own status codes (the header triton_grpc_error).
        send_last(sender, failed and failed.response())

    async def _stream(self, request: Any, sender: Any) -> None:
        [text] = Rows(request).texts
        try:
            code, text = cut_code(normalize(text), self._task)
        except DataError as error:
            raise RefusedError(f"the text {error.message}: {error.remedy}") from error
        sentences = [(s, space) for s, space in split_sentences(text) if s] or [("", "")]
        requested = frozenset(request.requested_output_names())
        wanted = [name for name in _OF_SENTENCE if name in requested | {"TRANSLATION"}]
        parameters = {name: _sendable(value) for name, value in parameters_of(request).items()}
        parameters["split"] = "none"  # these are sentences already

        def asked() -> Iterator[asyncio.Task[dict[str, Any]]]:
            for sentence, _ in sentences:
                yield asyncio.ensure_future(self._translate(code + sentence, wanted, parameters))

        asking = asked()
        under_way = deque(islice(asking, _AHEAD))
        try:
            for index, (_, space) in enumerate(sentences):
                outputs = await under_way.popleft()
                if sender.is_cancelled():
                    raise CancelledError
                under_way.extend(islice(asking, 1))
                outputs["TRANSLATION"] = np.array([outputs["TRANSLATION"][0] + space.encode()], np.object_)
                outputs["INDEX"] = np.array([index], np.int32)
                outputs["FINAL"] = np.array([index == len(sentences) - 1])
                tensors = [pb_utils.Tensor(n, value) for n, value in outputs.items() if n in requested]
                sender.send(pb_utils.InferenceResponse(tensors))
        finally:
            for task in under_way:
                task.cancel()

    async def _translate(self, sentence: str, wanted: list[str], parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the other model's outputs for one sentence. Raises RefusedError if it refuses the sentence."""
        text = pb_utils.Tensor(INPUT["name"], np.array([[sentence.encode()]], np.object_))
        ask = pb_utils.InferenceRequest(
            model_name=self._model, inputs=[text], requested_output_names=wanted, parameters=parameters
        )
        answer = await ask.async_exec()
        if answer.has_error():
            raise RefusedError(answer.error().message(), _code(answer.error().message()))
        return {name: pb_utils.get_output_tensor_by_name(answer, name).as_numpy().reshape(-1) for name in wanted}


def _code(message: str) -> Any:
    """Return the code for an error of the other model: Triton 2.51 calls all of them internal."""
    if message.startswith("the model failed"):
        return pb_utils.TritonError.INTERNAL
    busy = bool(QUEUE_FULL.search(message) or RELOADING.search(message))
    return pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INVALID_ARG


def _sendable(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value
