"""Send prompts to the language models of a Triton server over gRPC, each prompt as a separate stream.

The models are decoupled, with the tensors of Triton's vLLM backend.

Source: Triton, "vLLM backend: Additional Outputs"; "Inference Protocols: GRPC".
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc.aio as triton
from numpy.typing import NDArray

from deploykit.openai.errors import PATIENCE_S, PAUSE_S, ApiError, overloaded, restarting
from deploykit.openai.generator import GenerationRequest, Piece
from deploykit.openai.sampling_fields import FIELD_OF
from deploykit.runtime.tracing import trace_headers
from deploykit.runtime.triton_messages import CONTEXT_HOLDS, ONLY_RELOADING, QUEUE_FULL

_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_OUTPUTS = ("text_output", "finish_reason", "num_input_tokens", "num_output_tokens")
_FAILED = "the model failed on this request"
"""Beginnings of errors, which have no code in a stream."""
_NOT_SENT = "Internal error from Core"
"""gRPC's details, with the code of an internal error, if the connection closes before the request is sent (grpc/grpc#36066)."""
_ID = "[request id: <id_unknown>] "  # Triton's prefix for a request without an id
_FIRST_WORD = re.compile(r"\W*(\w+)")
_COMPOUND = re.compile(r"\b(" + "|".join(name for name in FIELD_OF if "_" in name) + r")\b")
_LIMITS = re.compile(r"\b(max|min)_new_tokens\b")


class TritonGenerator:
    """The models on the Triton server whose gRPC address is ``address``; satisfies ``Generator``.

    All requests share one connection, which belongs to the event loop of the first.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._client: Any = None

    async def generate(self, asked: GenerationRequest) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of the answers. See ``Generator``."""
        deadline: float | None = None
        begun = False
        while not begun:
            try:
                async with aclosing(self._stream(asked)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
                if not begun:
                    raise ApiError("the model ended the request without an answer", 500)
            except ApiError as error:
                if begun or not error.restarting:
                    raise
                now = time.monotonic()
                deadline = deadline or now + PATIENCE_S
                if now > deadline:
                    raise
                await asyncio.sleep(PAUSE_S)

    async def ready(self) -> bool:
        """Return whether all models answer."""
        try:
            return bool(await self._connection().is_server_ready(client_timeout=1.0))
        except triton.InferenceServerException:
            return False

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _connection(self) -> Any:
        if self._client is None:
            self._client = triton.InferenceServerClient(self._address, channel_args=list(_CHANNEL))
        return self._client

    async def _stream(self, asked: GenerationRequest) -> AsyncGenerator[Piece, None]:
        call = self._connection().stream_infer(_request(asked), headers=trace_headers())
        try:
            async for result, error in call:
                if error is not None:
                    raise _api_error(None, error.message(), asked)
                yield _piece(result, asked)
        except grpc.aio.AioRpcError as error:
            raise _api_error(error.code(), error.details() or "", asked) from None
        finally:
            call.cancel()  # no effect on a stream that has ended


async def _request(asked: GenerationRequest) -> AsyncIterator[dict[str, Any]]:
    """Yield the one request of a stream."""
    flags = {
        "stream": asked.stream,
        "exclude_input_in_output": True,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_logprobs": asked.logprobs,
    }
    texts = {"text_input": asked.text, "messages": asked.messages, "sampling_parameters": json.dumps(asked.sampling)}
    inputs = [
        _input(name, "BYTES", np.array([text.encode()], np.object_)) for name, text in texts.items() if text is not None
    ]
    if asked.ids is not None:
        inputs.append(_input("input_ids", "INT64", np.array(asked.ids, np.int64)))
    inputs += [_input(name, "BOOL", np.array([value])) for name, value in flags.items()]
    wanted = [*_OUTPUTS, *(["logprobs"] if asked.logprobs else [])]
    outputs = [triton.InferRequestedOutput(name) for name in wanted]
    yield {"model_name": asked.model, "inputs": inputs, "outputs": outputs}


def _input(name: str, datatype: str, values: NDArray[Any]) -> Any:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def _piece(result: Any, asked: GenerationRequest) -> Piece:
    def column(name: str) -> list[Any]:
        return list(result.as_numpy(name).reshape(-1).tolist())

    return Piece(
        [text.decode() for text in column("text_output")],
        [finish.decode() for finish in column("finish_reason")],
        column("num_input_tokens")[0],
        column("num_output_tokens"),
        [json.loads(tokens) for tokens in column("logprobs")] if asked.logprobs else (),
    )


def _api_error(code: grpc.StatusCode | None, message: str, asked: GenerationRequest) -> ApiError:
    """Return the error for one of Triton's; ``code`` is that of the stream, None for an error in the stream."""
    message = message.removeprefix(_ID).strip()
    if QUEUE_FULL.match(message) or code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return overloaded(message)
    if code == grpc.StatusCode.UNAVAILABLE or message == _NOT_SENT or ONLY_RELOADING.match(message):
        return restarting(f"the model does not answer now ({message})")
    if code is not None or message.startswith(_FAILED):
        return ApiError(f"the model failed: {message.removeprefix('the model failed ')}", 500)
    field = _field(message, asked)
    if field == "min_tokens":  # it is compared with another field
        message = _LIMITS.sub(r"\1_tokens", message)
    code_of_api = "context_length_exceeded" if CONTEXT_HOLDS in message else "invalid_value"
    return ApiError(message, param=field, code=code_of_api)


def _field(message: str, asked: GenerationRequest) -> str | None:
    """Return the field of the request that a model's error is about: its first word, or a name in it."""
    if message.startswith(("the prompt ", "the chat template ", "the last message ", "a message ")):
        return "prompt" if asked.messages is None else "messages"
    if message.startswith("json_schema "):
        return asked.schema_field
    first = _FIRST_WORD.match(message)
    name = _COMPOUND.search(message) if first is None or first[1] not in FIELD_OF else first
    return FIELD_OF[name[1]] if name is not None else None
